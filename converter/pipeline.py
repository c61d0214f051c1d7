"""The conversion from top to bottom: open, plan, write.

Invariant: the bytes are a function of input, options, device kind and library versions; each tensor has its place
before the first is written.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

import numpy as np
import torch

from ..formats import naming
from ..formats.errors import OptionError
from ..formats.manifest import Manifest
from ..formats.output_file import check_output
from ..formats.reader import SalrFile
from ..formats.writer import SalrWriter
from .adapters.records import input_file
from .budget import with_budget
from .execution import Job, Outcome, Progress, beside, one_thread_each, resolve_device, worker_count
from .opening import open_source
from .options import ConvertOptions
from .plan import Plan, make_plan
from .report import ConvertReport, error_report, size_report
from .sources import sha256


def convert(
    source: str | Path, out: str | Path, options: ConvertOptions | None = None, *, progress: Progress | None = None
) -> ConvertReport:
    """Convert a model or a PEFT LoRA (a directory, a .gguf file or a hub id) to one .salr file.

    Raises:
        SourceError, AdapterError: the input cannot be read or converted.
        OptionError: the options do not fit the input.
        OutputError: the output exists, cannot be written, or does not fit.
    """
    options = options or ConvertOptions()
    check_output(Path(out), force=options.force)
    return convert_plan(plan_conversion(source, options), out, progress=progress)


def convert_plan(plan: Plan, out: str | Path, *, progress: Progress | None = None) -> ConvertReport:
    """Carry out a plan and report on the finished file."""
    started = time.perf_counter()
    outcome = write_plan(plan, out, progress or (lambda done, total: None))
    file = SalrFile(out)
    return ConvertReport(
        path=str(out),
        sizes=size_report(file),
        error=error_report(file.modules),
        n_modules=len(plan.modules),
        n_kept=len(plan.kept),
        n_inputs=len(plan.ledger),
        seconds=time.perf_counter() - started,
        notes=tuple(outcome.notes),
    )


def plan_conversion(source: str | Path, options: ConvertOptions) -> Plan:
    """Open the source with its adapters and decide what becomes of every tensor."""
    checkpoint, adapters = open_source(source, options)
    plan = make_plan(checkpoint, adapters, options)
    if options.target_bits is None:
        return plan
    if not options.module.sparsity or options.overrides:
        raise OptionError(
            "--target-bits chooses every sparsity and rank itself", fix="drop --sparsity 0, --preset and --set"
        )
    device = resolve_device(options.device)
    with one_thread_each(worker_count(options, device)) as pool:
        budgeted, _ = with_budget(plan, options, device, pool)
    return make_plan(checkpoint, adapters, budgeted)


def write_plan(plan: Plan, out: str | Path, progress: Progress) -> Outcome:
    """Carry out a plan; nothing of the final name exists until all of it is done."""
    options, device = plan.options, resolve_device(plan.options.device)
    with (
        SalrWriter(out, plan.specs(), force=options.force, fresh=options.fresh) as writer,
        one_thread_each(worker_count(options, device)) as pool,
        beside(2) as helpers,
    ):
        copies = helpers.submit(_copy_unchanged, plan, writer)
        hashes = [(name, helpers.submit(sha256, path)) for name, path in _source_files(plan)]
        outcome = Job(plan, device, writer).run(pool, progress)
        copies.result()
        files = [{"name": name, "sha256": future.result()} for name, future in hashes]
        writer.finish(_manifest(plan, outcome, device, files))
    return outcome


def _copy_unchanged(plan: Plan, writer: SalrWriter) -> None:
    """Write what is carried along bit for bit: tensors that stay dense, and assets."""
    for tensor in plan.kept:
        writer.write_pieces(tensor.name, plan.checkpoint.pieces(tensor.name))
    for asset in plan.assets():
        writer.write_pieces(naming.ASSET_PREFIX + asset.name, [asset.read()])


def _source_files(plan: Plan) -> list[tuple[str, Path]]:
    """Return the files read, each under the name that the ledger gives it."""
    files = [(path.name, path) for path in plan.checkpoint.source_paths()]
    return files + [(input_file(a.name, path.name), path) for a in plan.adapters for path in a.weight_paths()]


def _manifest(plan: Plan, outcome: Outcome, device: torch.device, files: list[dict[str, str]]) -> Manifest:
    from .. import __version__

    return Manifest(
        generator=f"salr {__version__}",
        modules=outcome.entries,
        checksums={},
        ledger=plan.ledger,
        options=outcome.options.recorded(),
        source={
            "architecture": plan.checkpoint.architecture,
            "class": plan.class_name,
            "files": files,
            **plan.checkpoint.provenance,
        },
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
