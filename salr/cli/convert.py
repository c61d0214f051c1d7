"""`salr convert`: a Hugging Face or LoRA directory becomes one .salr file."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ..formats.dtypes import tensor_bytes
from ..formats.errors import OptionError
from ..formats.reader import SalrFile
from . import console
from . import convert_options as option
from .inspect import show_modules, summary_lines

if TYPE_CHECKING:
    from ..converter.execution.packers import Executor
    from ..converter.options import ConvertOptions
    from ..converter.plan import Plan
    from ..converter.report import ConvertReport
    from ..converter.sources.checkpoint import Checkpoint

EXECUTORS = ("local", "ray")


def convert(
    source: option.Source,
    out: option.Output,
    sparsity: option.Sparsity = None,
    rank: option.Rank = None,
    method: option.Method = None,
    values: option.Values = None,
    group_size: option.GroupSize = None,
    adapter_values: option.AdapterValues = None,
    preset: option.Preset = None,
    scope: option.Scope = None,
    pattern: option.Pattern = "unstructured",
    rounds: option.Rounds = 60,
    calibration: option.Calibration = None,
    samples: option.Samples = None,
    length: option.Length = None,
    seed: option.Seed = None,
    adapter: option.Adapter = [],  # noqa: B006
    base: option.Base = None,
    revision: option.Revision = None,
    include: option.Include = [],  # noqa: B006
    exclude: option.Exclude = [],  # noqa: B006
    target_bits: option.TargetBits = None,
    settings: option.Settings = [],  # noqa: B006
    recipe: option.Recipe = None,
    dry_run: option.DryRun = False,
    force: option.Force = False,
    fresh: option.Fresh = False,
    max_shard_size: option.MaxShardSize = None,
    part: option.Part = None,
    plan_file: option.PlanFile = None,
    device: option.Device = "cpu",
    workers: option.Workers = None,
    executor: option.Executor = "local",
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """Convert SRC (a model, or a LoRA with its base; a directory, a .gguf file or a hub id) to one .salr file."""
    from ..converter.module_options import module_options, parse_override, read_recipe
    from ..converter.options import ConvertOptions
    from ..converter.pipeline import plan_conversion

    if target_bits is not None and (sparsity is not None or rank is not None):
        raise OptionError("--target-bits chooses every sparsity and rank itself", fix="drop --sparsity and --rank")
    options = ConvertOptions(
        module=module_options(
            preset,
            sparsity=sparsity,
            rank=rank,
            values=values,
            group_size=group_size,
            adapter_values=adapter_values,
        ),
        method=method,
        scope=scope,
        pattern=pattern,
        rounds=rounds,
        calibration=option.calibration_options(calibration, samples, length, seed),
        include=tuple(include),
        exclude=tuple(exclude),
        overrides=(*(read_recipe(recipe) if recipe else ()), *(parse_override(text) for text in settings)),
        adapters=option.parse_adapters(adapter),
        base=base,
        revision=revision,
        target_bits=target_bits,
        device=device,
        workers=workers,
        force=force,
        fresh=fresh,
        max_shard_size=None if max_shard_size is None else option.parse_size(max_shard_size),
        part=None if part is None else option.parse_part(part),
        plan_file=plan_file,
    )
    check_executor(executor)
    if dry_run:
        return show_plan(plan_conversion(source, options), as_json)
    return make(source, out, options, executor, as_json=as_json, quiet=quiet, verbose=verbose)


def make(
    source: Path, out: Path, options: ConvertOptions, executor: str, *, as_json: bool, quiet: bool, verbose: bool
) -> None:
    """Convert, and say what is found, done and measured."""
    from ..converter.execution.devices import resolve_devices
    from ..converter.pipeline import convert_plan, open_output, plan_conversion

    silent = quiet or as_json
    resolve_devices(options.device)
    with open_output(out, options) as partial:
        plan = plan_conversion(source, options, partial)
        show_source(plan, options, partial.path, silent)
        with console.progress_bar("convert", quiet=silent) as progress:
            report = convert_plan(plan, partial, progress=progress, executor=open_executor(executor, source, options))
    if as_json:
        return console.say_json(asdict(report))
    if verbose:
        show_modules(SalrFile(report.path))
    return show_report(report, plan, quiet)


def check_executor(name: str) -> None:
    """Refuse an executor that is none.

    Raises:
        OptionError: see above.
    """
    if name not in EXECUTORS:
        raise OptionError(f"executor {name!r}", needed="one of " + ", ".join(EXECUTORS))


def open_executor(name: str, source: Path, options: ConvertOptions) -> Executor | None:
    """Return who packs, None for this process.

    Raises:
        OptionError: Ray is not installed.
    """
    if name == "local":
        return None
    from ..integrations.ray_executor import RayExecutor

    return RayExecutor(source, options)


def show_plan(plan: Plan, as_json: bool) -> None:
    """Print each input tensor with what becomes of it and why."""
    if as_json:
        return console.say_json([asdict(line) for line in plan.ledger])
    table = Table("tensor", "fate", "removed", "rank", "reason", box=None, pad_edge=False)
    modules = {module.entry.source_tensor: module for module in plan.modules}
    for line in plan.ledger:
        module = modules.get(line.key)
        removed = console.percent(1 - module.entry.nnz / module.entry.n_weights) if module else ""
        table.add_row(line.key, line.fate, removed, str(module.residual_rank) if module else "", line.reason)
    console.out.print(table)
    return show_warnings(plan.notes)


def show_source(plan: Plan, options: ConvertOptions, out: Path, quiet: bool) -> None:
    """Print what was found and what will be done."""
    from ..converter.execution.devices import resolve_devices, worker_count
    from ..converter.execution.preflight import needs_of

    checkpoint = plan.checkpoint
    n_parameters = sum(math.prod(tensor.shape) for tensor in checkpoint.tensors.values())
    n_bytes = sum(tensor_bytes(tensor.dtype, tensor.shape) for tensor in checkpoint.tensors.values())
    dtypes = sorted({tensor.dtype for tensor in checkpoint.tensors.values()})
    packed = sum(module.entry.n_weights for module in plan.modules)
    removed = 1 - sum(module.entry.nnz for module in plan.modules) / packed
    ranks = sorted({module.residual_rank for module in plan.modules})
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    free = shutil.disk_usage(out.parent).free
    console.say(
        f"{Path(checkpoint.named).name}   {checkpoint.architecture or 'no model class'}, {'/'.join(dtypes).lower()}, "
        f"{console.count(n_parameters)} parameters, {console.megabytes(n_bytes)}",
        quiet=quiet,
    )
    console.say(
        f"plan    pack {len(plan.modules)} linears ({100 * packed / n_parameters:.0f} % of weights), keep "
        f"{len(plan.kept)} tensors dense, {100 * removed:.0f} % removed, {rank}",
        quiet=quiet,
    )
    for adapter in plan.adapters:
        console.say(f"        adapter '{adapter.name}' kept exact: {len(adapter.pairs)} modules", quiet=quiet)
    needs = needs_of(plan, worker_count(options.workers, resolve_devices(options.device)))
    spool = f" and {console.megabytes(needs.spool_bytes)} meanwhile" if needs.spool_bytes else ""
    available = needs.free_memory_bytes
    memory = f" ({console.megabytes(available)} free)" if available is not None else ""
    console.say(f"        {describe_method(options, plan.checkpoint)}, {options.device}", quiet=quiet)
    console.say(
        f"        peak memory about {console.megabytes(needs.memory_bytes)}{memory}, disk "
        f"{console.megabytes(needs.disk_bytes)}{spool} ({console.megabytes(free)} free)",
        quiet=quiet,
    )
    if needs.exceeds_memory:
        show_warnings(["That is more memory than is free: fewer --workers need less."], quiet)
    show_warnings(plan.notes, quiet)


def describe_method(options: ConvertOptions, checkpoint: Checkpoint) -> str:
    """Return method, scope, pattern and data in a few words."""
    from ..converter.calibration.data import window_length

    data = options.data
    kind = "no data" if data is None else f"{data.samples} windows of {window_length(data, checkpoint)} tokens"
    source = "" if data is None else " (random tokens)" if data.text == "synthetic" else f" ({Path(data.text).name})"
    scope = "2:4" if options.pattern == "2:4" else f"per {options.chosen_scope}"
    return f"{options.chosen_method} {scope}, {kind}{source}"


def show_report(report: ConvertReport, plan: Plan, quiet: bool) -> None:
    """Print what was measured, and what to do next."""
    console.say(quiet=quiet)
    for line in summary_lines(SalrFile(report.path)):
        console.say(line, quiet=quiet)
    console.say(
        f"ledger                  {report.n_inputs} of {report.n_inputs} input tensors accounted for", quiet=quiet
    )
    said = set(plan.notes)
    show_warnings([note for note in (*report.notes, *size_warnings(report)) if note not in said], quiet)
    console.say(f"wrote {report.path} in {report.seconds:.1f} s", quiet=quiet)
    checkpoint = plan.checkpoint
    out = report.path
    given = [word for adapter in plan.adapters for word in ("--adapter", f"{adapter.name}={adapter.directory}")]
    commands: list[list[object]] = [["verify", out, "--against", checkpoint.named, *given]]
    if checkpoint.location.is_dir():
        commands.append(["eval", out, "--reference", checkpoint.location, "--text", "FILE"])
    console.say_next(*commands, ["inspect", out, "--html", "page.html"], quiet=quiet)


def show_warnings(warnings: Iterable[str], quiet: bool = False) -> None:
    """Print what the user should know, a line each."""
    for warning in warnings:
        console.say(f"! {warning}", quiet=quiet)


def size_warnings(report: ConvertReport) -> list[str]:
    """Return what makes this file larger than it could be."""
    sizes = report.sizes
    share = sizes.residual_bytes / sizes.packed_bytes
    if share <= 0.15:
        return []
    smaller = (sizes.file_bytes - 0.75 * sizes.residual_bytes) / sizes.source_bytes
    return [f"The residual is {100 * share:.0f} % of the packed bytes: a quarter of its rank gives {smaller:.2f}x."]
