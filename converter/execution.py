"""Carrying out a plan: which worker packs which module, on which device.

Invariant: the bytes never depend on the number of workers: each numerical task runs with one thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from ..formats.errors import CalibrationError, OptionError
from ..formats.manifest import ModuleEntry
from ..formats.writer import SalrWriter
from .options import NO_DATA, CalibrationOptions, ConvertOptions
from .packing import PackedModule, pack_module
from .plan import Plan, PlannedModule, is_solved
from .sequential import BlockRun, open_block_run

_MOST_WORKERS = 8
#: threads that feed one GPU, so that writing overlaps computing
_GPU_WORKERS = 2
#: packed modules that may wait for the disk
_MOST_UNWRITTEN = 8

#: called with (modules done, modules in all)
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Outcome:
    """Manifest entries by module, what the user should know, and the options as they were really used."""

    entries: dict[str, ModuleEntry]
    notes: list[str]
    options: ConvertOptions


class Job:
    """A plan, and the file it is written to."""

    def __init__(self, plan: Plan, device: torch.device, writer: SalrWriter) -> None:
        self._plan, self._options, self._device, self._writer = plan, plan.options, device, writer

    def run(self, pool: ThreadPoolExecutor, progress: Progress) -> Outcome:
        """Pack and write every module.

        Raises:
            SalrError: a weight or the calibration data is unusable, or writing failed.
        """
        if self._options.data is None:
            return Outcome(self._independent(pool, progress), [], self._options)
        try:
            run = open_block_run(self._plan, self._options, self._device, pool)
        except CalibrationError as error:
            if self._options.calibration is not None:
                raise
            self._options = replace(self._options, calibration=CalibrationOptions(NO_DATA))
            note = f"Random calibration tokens could not be used: {error.found}. Chosen by weights alone."
            return Outcome(self._independent(pool, progress), [note], self._options)
        with tensor_cores(self._device, self._options.method_info.corrects):
            entries = self._calibrated(run, progress)
        return Outcome(entries, _notes(self._plan, entries, run), self._options)

    def _pack(self, module: PlannedModule) -> tuple[str, ModuleEntry]:
        return module.name, self._write(pack_module(module, self._plan.checkpoint, self._options, self._device))

    def _write(self, packed: PackedModule) -> ModuleEntry:
        for name, array in packed.tensors.items():
            self._writer.write(name, array)
        return packed.entry

    def _independent(self, pool: ThreadPoolExecutor, progress: Progress) -> dict[str, ModuleEntry]:
        """Pack all modules in any order, the largest first, so that no worker is left alone with one at the end."""
        order = sorted(self._plan.modules, key=lambda module: -module.entry.n_weights)
        return dict(_finished([pool.submit(self._pack, module) for module in order], progress))

    def _calibrated(self, run: BlockRun, progress: Progress) -> dict[str, ModuleEntry]:
        """Pack block after block, then what lies outside the blocks."""
        entries: dict[str, ModuleEntry] = {}
        total = len(self._plan.modules)
        progress(0, total)
        with beside(1) as writing:  # the next block is packed meanwhile
            pending: deque[Future[ModuleEntry]] = deque()
            for module, packed in run.packed_modules():
                pending.append(writing.submit(self._write, replace(packed, matrices=[])))
                entries[module.name] = packed.entry
                while len(pending) > _MOST_UNWRITTEN:
                    pending.popleft().result()
                progress(len(entries), total)
            for write in pending:
                write.result()
        for module in self._plan.modules:
            if module.name not in entries:
                entries.update([self._pack(module)])
                progress(len(entries), total)
        return entries


def _finished(futures: list[Future[tuple[str, ModuleEntry]]], progress: Progress) -> Iterator[tuple[str, ModuleEntry]]:
    progress(0, len(futures))
    try:
        for done, future in enumerate(as_completed(futures), 1):
            yield future.result()
            progress(done, len(futures))
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _notes(plan: Plan, entries: dict[str, ModuleEntry], run: BlockRun) -> list[str]:
    """Return what calibration could not do as asked."""
    notes = []
    pruned = [module for module in plan.modules if is_solved(module.entry)]
    unseen = [module.name for module in pruned if entries[module.name].error.output is None]
    if unseen:
        notes.append(f"{len(unseen)} modules saw no calibration data and were chosen by weights alone: {unseen[0]} ...")
    singular = [m.name for m in pruned if m.name not in unseen and m.entry.n_columns > run.n_tokens]
    if singular:
        notes.append(
            f"{run.n_tokens} calibration tokens are fewer than the inputs of {len(singular)} modules "
            f"({singular[0]} ...): their Gram matrices are singular and were damped."
        )
    return notes


def worker_count(options: ConvertOptions, device: torch.device) -> int:
    """Return how many modules are packed at once."""
    default = _GPU_WORKERS if device.type == "cuda" else min(os.cpu_count() or 1, _MOST_WORKERS)
    return options.workers or default


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose workers each compute with one thread; the caller's setting is put back afterwards."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:
        torch.set_num_threads(n_threads)


@contextmanager
def beside(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool for what goes on beside the numerical work; after an error nothing new is begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def tensor_cores(device: torch.device, is_allowed: bool) -> Iterator[None]:
    """Let float32 products on a GPU round their inputs to TF32 meanwhile.

    A refit makes up for it (``joint`` twice as fast, the same perplexity); methods without one lose by it.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and is_allowed:
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def resolve_device(name: str) -> torch.device:
    """Return the torch device for ``cpu`` or ``cuda[:i]``.

    Raises:
        OptionError: there is no such device here.
    """
    if name != "cpu" and not name.startswith("cuda"):
        raise OptionError(f"device {name!r}", needed="cpu or cuda[:i]")
    try:
        device = torch.device(name)
        # torch loads its linear algebra at the first call, which must not come from two threads at once.
        torch.linalg.cholesky(torch.eye(2, device=device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {name!r} cannot be used ({reason})", fix="give --device cpu") from error
    return device
