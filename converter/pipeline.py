"""The conversion from top to bottom: open, plan, write.

Invariant: the bytes are a function of input, options, device kind and library versions, never of the number of workers:
every numerical task runs with one thread, and each tensor has its place before the first is written.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats import naming
from ..formats.errors import OptionError, SourceError
from ..formats.manifest import Manifest, ModuleEntry
from ..formats.output_file import check_output
from ..formats.reader import SalrFile
from ..formats.writer import SalrWriter
from .adapters import Adapter, is_adapter_directory
from .options import ConvertOptions
from .packing import pack_module
from .plan import Plan, PlannedModule, make_plan
from .report import ConvertReport, error_report, size_report
from .sources import Checkpoint, sha256

_MOST_WORKERS = 8

#: called with (modules done, modules in all)
Progress = Callable[[int, int], None]


def convert(
    source: str | Path, out: str | Path, options: ConvertOptions | None = None, *, progress: Progress | None = None
) -> ConvertReport:
    """Convert a Hugging Face model directory, or a PEFT LoRA directory, to one .salr file.

    Raises:
        SourceError, AdapterError: the input cannot be read or converted.
        OptionError: the options do not fit the input.
        OutputError: the output exists, cannot be written, or does not fit.
    """
    options = options or ConvertOptions()
    check_output(Path(out), force=options.force)
    return convert_plan(plan_conversion(source, options), out, options, progress=progress)


def convert_plan(
    plan: Plan, out: str | Path, options: ConvertOptions, *, progress: Progress | None = None
) -> ConvertReport:
    """Carry out a plan and report on the finished file."""
    started = time.perf_counter()
    write_plan(plan, out, options, progress or (lambda done, total: None))
    file = SalrFile(out)
    return ConvertReport(
        path=str(out),
        sizes=size_report(file),
        error=error_report(file.modules),
        n_modules=len(plan.modules),
        n_kept=len(plan.kept),
        n_inputs=len(plan.ledger),
        seconds=time.perf_counter() - started,
    )


def plan_conversion(source: str | Path, options: ConvertOptions) -> Plan:
    """Open the source with its adapters and decide what becomes of every tensor."""
    checkpoint, adapters = open_source(Path(source), options)
    return make_plan(checkpoint, adapters, options)


def open_source(source: Path, options: ConvertOptions) -> tuple[Checkpoint, list[Adapter]]:
    """Open a model directory, or an adapter directory and its base.

    Raises:
        SourceError: an adapter's base is not on this machine.
    """
    named = list(options.adapters)
    base = source
    if is_adapter_directory(source):
        adapter = Adapter(source, "default")
        base = options.base or Path(adapter.base_model or "")
        if not base.is_dir() or (not adapter.base_model and options.base is None):
            raise SourceError(
                f"base {adapter.base_model or 'of the adapter'!r} is not on this machine",
                path=source,
                fix="give --base DIR",
            )
        named.insert(0, ("default", source))
    elif options.base is not None:
        raise OptionError("--base", path=source, needed="an adapter directory as source", fix="drop --base")
    return Checkpoint(base), [Adapter(directory, name) for name, directory in named]


@dataclass(frozen=True)
class _Job:
    plan: Plan
    options: ConvertOptions
    device: torch.device
    writer: SalrWriter

    def pack(self, module: PlannedModule) -> tuple[str, ModuleEntry]:
        packed = pack_module(module, self.plan.checkpoint, self.options.scope, self.device)
        for name, array in packed.tensors.items():
            self.writer.write(name, array)
        return module.name, packed.entry


def write_plan(plan: Plan, out: str | Path, options: ConvertOptions, progress: Progress) -> None:
    """Carry out a plan; nothing of the final name exists until all of it is done."""
    device = resolve_device(options.device)
    specs = plan.specs()
    workers = options.workers or min(os.cpu_count() or 1, _MOST_WORKERS)
    with SalrWriter(out, specs, force=options.force, fresh=options.fresh) as writer, one_thread_each(workers) as pool:
        job = _Job(plan, options, device, writer)
        hashes = {path: pool.submit(sha256, path) for path in _source_paths(plan)}
        # The largest first, so that no worker is left alone with one at the end.
        order = sorted(plan.modules, key=lambda module: -module.entry.n_weights)
        futures = [pool.submit(job.pack, module) for module in order]
        entries = dict(_results(futures, progress))
        for tensor in plan.kept:
            writer.write_pieces(tensor.name, plan.checkpoint.pieces(tensor.name))
        for name, path in plan.assets():
            writer.write_pieces(naming.ASSET_PREFIX + name, [path.read_bytes()])
        files = [{"name": path.name, "sha256": future.result()} for path, future in hashes.items()]
        writer.finish(_manifest(plan, options, device, entries, files))


def _results(futures: list[Future[tuple[str, ModuleEntry]]], progress: Progress) -> Iterator[tuple[str, ModuleEntry]]:
    progress(0, len(futures))
    try:
        for done, future in enumerate(as_completed(futures), 1):
            yield future.result()
            progress(done, len(futures))
    except BaseException:
        for future in futures:
            future.cancel()
        raise


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


def resolve_device(name: str) -> torch.device:
    """Return the torch device for ``cpu`` or ``cuda[:i]``.

    Raises:
        OptionError: there is no such device here.
    """
    if name != "cpu" and not name.startswith("cuda"):
        raise OptionError(f"device {name!r}", needed="cpu or cuda[:i]")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {name!r} cannot be used ({reason})", fix="give --device cpu") from error
    return device


def _source_paths(plan: Plan) -> list[Path]:
    paths = [plan.checkpoint.directory / "config.json", *plan.checkpoint.weight_paths()]
    return paths + [path for adapter in plan.adapters for path in adapter.weight_paths()]


def _manifest(
    plan: Plan, options: ConvertOptions, device: torch.device, entries: dict[str, ModuleEntry], files: list[Any]
) -> Manifest:
    from .. import __version__

    return Manifest(
        generator=f"salr {__version__}",
        modules=entries,
        checksums={},
        ledger=plan.ledger,
        options=options.recorded(),
        source={"architecture": plan.checkpoint.architecture, "class": plan.class_name, "files": files},
        environment=_environment(device),
    )


def _environment(device: torch.device) -> dict[str, str]:
    """Return the device kind and library versions that shape the bytes."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return {
        "device": f"{device.type}: {kind}",
        "machine": platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
