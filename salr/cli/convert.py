"""`salr convert`: a Hugging Face or LoRA directory becomes one .salr file."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..formats.dtypes import tensor_bytes
from ..formats.errors import OptionError
from ..formats.reader import SalrFile
from . import console
from .inspect import show_modules, summary_lines

if TYPE_CHECKING:
    from ..converter.execution.packers import Executor
    from ..converter.options import CalibrationOptions, ConvertOptions
    from ..converter.plan import Plan
    from ..converter.report import ConvertReport

EXECUTORS = ("local", "ray")
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Directory or hub id of a model or a PEFT LoRA, or a .gguf file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.salr", help="The file to make.")],
    sparsity: Annotated[float | None, typer.Option(help="Fraction removed, 0 to 0.95.", show_default="0.5")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the residual adapter, 0 for none.", show_default="64")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="magnitude (the paper), alternating, wanda, sparsegpt or joint.",
            show_default="alternating; joint with a text",
        ),
    ] = None,
    values: Annotated[
        str | None, typer.Option(help="Of kept weights: source, bf16, fp16, fp32, int8 or nf4.", show_default="source")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale, for int8 and nf4.", show_default="128")
    ] = None,
    adapter_values: Annotated[
        str | None, typer.Option(help="The residual's storage: source or int8.", show_default="source")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="exact, balanced or small: a measured recipe; single options override it."),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(help="Where weights compete: layer, row or global.", show_default="the method's own"),
    ] = None,
    pattern: Annotated[str, typer.Option(help="unstructured or 2:4.")] = "unstructured",
    rounds: Annotated[int, typer.Option(help="Rounds of alternating and joint.")] = 60,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A .txt or .jsonl text; 'synthetic' for random tokens; 'none' for weights alone.",
            show_default="synthetic for alternating",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--calibration-samples", help="Windows of text.", show_default="64; 16 if synthetic")
    ] = None,
    length: Annotated[int, typer.Option("--calibration-length", help="Tokens a window.")] = 1024,
    seed: Annotated[int, typer.Option(help="Of the choice of windows.")] = 0,
    adapter: Annotated[
        list[str], typer.Option(metavar="[NAME=]DIR", help="LoRA kept exact, directory or hub id; repeatable.")
    ] = [],  # noqa: B006
    base: Annotated[Path | None, typer.Option(help="The base model of a LoRA: directory or hub id.")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", show_default="main")
    ] = None,
    include: Annotated[list[str], typer.Option(help="Glob or re: pattern of modules to pack besides.")] = [],  # noqa: B006
    exclude: Annotated[list[str], typer.Option(help="Glob or re: pattern of modules to keep dense.")] = [],  # noqa: B006
    target_bits: Annotated[
        float | None,
        typer.Option(help="Mean bits per packed weight, adapters counted; chooses sparsity and rank of each module."),
    ] = None,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="'PAT k=v,...'", help="Override options per module; repeatable.")
    ] = [],  # noqa: B006
    recipe: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="Options and overrides from a file.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Show the plan and each choice's reason; write nothing.")] = False,
    force: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
    fresh: Annotated[bool, typer.Option(help="Discard what an interrupted run left.")] = False,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="As 5GB: OUT becomes a directory of shards, with an index.")
    ] = None,
    part: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Make the I-th of N shards into the directory OUT; salr join joins them."),
    ] = None,
    plan_file: Annotated[
        Path | None,
        typer.Option("--plan", metavar="FILE", help="Keeps decisions about the whole model, made once for all parts."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda (all GPUs) or cuda:i,...")] = "cpu",
    workers: Annotated[int | None, typer.Option(help="Modules converted at once.", show_default="one a core")] = None,
    executor: Annotated[str, typer.Option(help="Who converts: local, or ray (a Ray cluster).")] = "local",
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """Convert SRC (a model, or a LoRA with its base; a directory, a .gguf file or a hub id) to one .salr file."""
    from ..converter.module_options import module_options, parse_override, read_recipe
    from ..converter.options import ConvertOptions
    from ..converter.pipeline import convert_plan, open_output, plan_conversion

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
        calibration=calibration_options(calibration, samples, length, seed),
        include=tuple(include),
        exclude=tuple(exclude),
        overrides=(*(read_recipe(recipe) if recipe else ()), *(parse_override(text) for text in settings)),
        adapters=parse_adapters(adapter),
        base=base,
        revision=revision,
        target_bits=target_bits,
        device=device,
        workers=workers,
        force=force,
        fresh=fresh,
        max_shard_size=None if max_shard_size is None else parse_size(max_shard_size),
        part=None if part is None else parse_part(part),
        plan_file=plan_file,
    )
    check_executor(executor)
    if dry_run:
        return show_plan(plan_conversion(source, options), as_json)
    silent = quiet or as_json
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


def parse_size(text: str) -> int:
    """Return the bytes of a size like 5GB or 300MB (powers of ten), or of a plain number."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if found is None:
        raise OptionError(f"size {text!r}", needed="a number with KB, MB, GB or TB, as 5GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_part(text: str) -> tuple[int, int]:
    """Parse I/N."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if found is None:
        raise OptionError(f"--part {text!r}", needed="I/N, as 3/8")
    return int(found[1]), int(found[2])


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


def calibration_options(text: str | None, samples: int | None, length: int, seed: int) -> CalibrationOptions | None:
    """Return the calibration asked for; None leaves the choice to the method."""
    from ..converter.options import SYNTHETIC, SYNTHETIC_SAMPLES, CalibrationOptions

    if text is None:
        return None
    usual = SYNTHETIC_SAMPLES if text == SYNTHETIC else CalibrationOptions(text).samples
    return CalibrationOptions(text, usual if samples is None else samples, length, seed)


def parse_adapters(texts: list[str]) -> tuple[tuple[str, Path], ...]:
    """Parse [NAME=]DIR; without a name the directory's own is used."""
    parsed = []
    for text in texts:
        name, equals, directory = text.partition("=")
        path = Path(directory if equals else text)
        parsed.append((name if equals else path.resolve().name, path))
    return tuple(parsed)


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
    return console.out.print(table)


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
    console.say(f"        {describe_method(options)}, {options.device}", quiet=quiet)
    console.say(
        f"        peak memory about {console.megabytes(needs.memory_bytes)}{memory}, disk "
        f"{console.megabytes(needs.disk_bytes)}{spool} ({console.megabytes(free)} free)",
        quiet=quiet,
    )
    if needs.exceeds_memory:
        console.say("! That is more memory than is free: fewer --workers need less.", quiet=quiet)


def describe_method(options: ConvertOptions) -> str:
    """Return method, scope, pattern and data in a few words."""
    data = options.data
    kind = "no data" if data is None else f"{data.samples} windows of {data.length} tokens"
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
    for warning in (*report.notes, *size_warnings(report)):
        console.say(f"! {warning}", quiet=quiet)
    console.say(f"wrote {report.path} in {report.seconds:.1f} s", quiet=quiet)
    checkpoint = plan.checkpoint
    given = "".join(f" --adapter {adapter.name}={adapter.directory}" for adapter in plan.adapters)
    console.say(f"next:  salr verify {report.path} --against {checkpoint.named}{given}", quiet=quiet)
    if checkpoint.location.is_dir():
        console.say(f"       salr eval {report.path} --reference {checkpoint.location} --text FILE", quiet=quiet)
    console.say(f"       salr inspect {report.path} --html page.html", quiet=quiet)


def size_warnings(report: ConvertReport) -> list[str]:
    """Return what makes this file larger than it could be."""
    sizes = report.sizes
    share = sizes.residual_bytes / sizes.packed_bytes
    if share <= 0.15:
        return []
    smaller = (sizes.file_bytes - 0.75 * sizes.residual_bytes) / sizes.source_bytes
    return [f"The residual is {100 * share:.0f} % of the packed bytes: a quarter of its rank gives {smaller:.2f}x."]
