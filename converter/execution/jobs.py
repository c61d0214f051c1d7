"""Carrying out a plan: every module packed, written and journaled.

Invariant: the bytes never depend on the number of workers: each numerical task runs with one thread. A module's journal
line says all that a run which goes on from there needs to know of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...formats import naming
from ...formats.dtypes import byte_view
from ...formats.errors import CalibrationError
from ...formats.manifest import ModuleEntry, parse_module
from ...formats.resuming import ResumingWriter
from ..calibration.sequential import BlockRun, open_block_run
from ..options import NO_DATA, CalibrationOptions, ConvertOptions
from ..plan import Plan, PlannedModule, is_solved
from .packers import Team
from .packing import ModulePieces, PackedMatrix, PackedModule, trained_tensors, used_method
from .spool import HiddenSpool, Streams
from .threads import beside

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
    """A plan, and the writer of those of its modules that go to one output; inputs are watched meanwhile."""

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        writer: ResumingWriter,
        spool: HiddenSpool,
        watch_inputs: Callable[[], None],
    ) -> None:
        self._plan, self._options, self._device, self._writer = plan, plan.options, device, writer
        self._spool, self._watch_inputs = spool, watch_inputs
        self._modules = [m for m in plan.modules if writer.plans(naming.values_name(m.name))]
        self._entries = {
            note["module"]: parse_module(note["entry"], note["module"], str(writer.path))
            for note in writer.notes
            if "module" in note
        }
        self._n_stood = len(self._entries)

    def run(self, team: Team, progress: Progress) -> Outcome:
        """Pack and write every module that is not there yet.

        Raises:
            SalrError: a weight or the calibration data is unusable, or writing failed.
        """
        notes = []
        progress(len(self._entries), len(self._modules))
        if self._options.data is not None:
            notes = self._calibrated(team, progress)
        self._independent(team, progress)
        if self._n_stood:
            notes.insert(0, f"Went on with {self._n_stood} of {len(self._modules)} modules from an interrupted run.")
        return Outcome({m.name: self._entries[m.name] for m in self._modules}, notes, self._options)

    def _missing(self) -> list[PlannedModule]:
        return [module for module in self._modules if module.name not in self._entries]

    def _independent(self, team: Team, progress: Progress) -> None:
        """Pack modules in any order, the largest first, so that no worker is left alone with one at the end."""
        order = sorted(self._missing(), key=lambda module: -module.entry.n_weights)
        for name, entry in _finished([team.pool.submit(self._pack, module, team) for module in order]):
            self._done(name, entry, progress)

    def _done(self, name: str, entry: ModuleEntry, progress: Progress) -> None:
        self._entries[name] = entry
        progress(len(self._entries), len(self._modules))

    def _pack(self, module: PlannedModule, team: Team) -> tuple[str, ModuleEntry]:
        self._watch_inputs()
        method = used_method(self._options.chosen_method, has_data=False)
        with team.borrowed() as packer:
            return module.name, self._write(module, packer.matrices(module, self._options), method)

    def _write(self, module: PlannedModule, matrices: Iterable[PackedMatrix], method: str) -> ModuleEntry:
        """Write a module matrix by matrix, so that of stacked experts one is in memory at a time."""
        pieces, trained = ModulePieces(module), trained_tensors(module)
        streams = {s.name: self._writer.stream(s.name) for s in module.specs() if s.name not in trained}
        for matrix in matrices:
            for name, piece in pieces.of(matrix).items():
                streams[name].write(byte_view(piece))
        for name, piece in pieces.rest().items():
            streams[name].write(byte_view(piece))
        for stream in streams.values():
            stream.close()
        return self._record(module, pieces.entry(method), trained)

    def _write_packed(self, module: PlannedModule, packed: PackedModule) -> None:
        for name, array in packed.tensors.items():
            self._writer.write(name, array)
        self._record(module, packed.entry, trained_tensors(module))

    def _record(self, module: PlannedModule, entry: ModuleEntry, trained: Mapping[str, Any]) -> ModuleEntry:
        for name, array in trained.items():
            self._writer.write(name, array)
        note = {"module": module.name, "entry": asdict(entry)}
        self._writer.record([spec.name for spec in module.specs()], note)
        return entry

    def _calibrated(self, team: Team, progress: Progress) -> list[str]:
        """Pack block after block; return what calibration could not do as asked."""
        try:
            run = open_block_run(self._plan, self._options, self._device, team)
        except CalibrationError as error:
            if self._options.calibration is not None:
                raise
            self._options = replace(self._options, calibration=CalibrationOptions(NO_DATA))
            return [f"Random calibration tokens could not be used: {error.found}. Chosen by weights alone."]
        with tensor_cores(self._device, self._options.method_info.corrects):
            self._pack_blocks(run, progress)
            self._independent(team, progress)  # what lies outside the blocks
        return _notes(self._modules, self._entries, run)

    def _pack_blocks(self, run: BlockRun, progress: Progress) -> None:
        start, streams = self._border(run)
        by_block = run.by_block()
        for number, modules in by_block.items():
            if number >= start:  # run again as a whole, so that each module sees what it saw before
                for module in modules:
                    self._entries.pop(module.name, None)
        self._n_stood = len(self._entries)
        wanted = {module.name for module in self._missing()}
        with beside(1) as writing:  # the next block is packed meanwhile
            pending: deque[Future[None]] = deque()
            for number, packed, behind in run.packed_blocks(wanted, start, streams):
                self._watch_inputs()
                for module, result in packed:
                    pending.append(writing.submit(self._write_packed, module, replace(result, matrices=[])))
                    self._done(module.name, result.entry, progress)
                if number < max(by_block):
                    pending.append(writing.submit(self._mark, number + 1, behind))
                while len(pending) > _MOST_UNWRITTEN:
                    pending.popleft().result()
            for write in pending:
                write.result()

    def _mark(self, number: int, streams: Streams) -> None:
        """Keep the streams that enter block ``number``; those before it are no longer needed then."""
        self._writer.record(note=self._spool.save(number, streams))
        self._writer.flush()
        self._spool.drop(number - 1)

    def _border(self, run: BlockRun) -> tuple[int, Streams | None]:
        """Return the block to go on with, and the hidden states that enter it: block 0 without any."""
        by_block = run.by_block()
        mine = {module.name for module in self._modules}
        for note in sorted((n for n in self._writer.notes if "block" in n), key=lambda note: -note["block"]):
            before = {m.name for number, ms in by_block.items() if number < note["block"] for m in ms}
            streams = self._spool.load(note, self._device) if before & mine <= set(self._entries) else None
            if streams is not None:
                return note["block"], streams
        return 0, None


def _finished(futures: list[Future[tuple[str, ModuleEntry]]]) -> Iterator[tuple[str, ModuleEntry]]:
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _notes(modules: list[PlannedModule], entries: Mapping[str, ModuleEntry], run: BlockRun) -> list[str]:
    """Return what calibration could not do as asked."""
    notes = []
    pruned = [module for module in modules if is_solved(module.entry)]
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
