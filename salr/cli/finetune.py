"""`salr finetune`: adapters and the residual of a .salr file trained on a file of examples."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..formats.errors import OptionError
from . import console

if TYPE_CHECKING:
    from ..training.finetuning import FinetuneReport, Progress, TrainingPlan
    from ..training.options import FinetuneOptions

_ENDS = 10


def finetune(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file; it stays as it is.")],
    data: Annotated[
        Path,
        typer.Option(metavar="TRAIN.jsonl", help="prompt + completion, messages, question + answer, or text a line."),
    ],
    out: Annotated[Path, typer.Option("-o", "--output", metavar="OUT.salr", help="The file to make.")],
    rank: Annotated[int, typer.Option(help="Of the new adapter.")] = 16,
    alpha: Annotated[float | None, typer.Option(help="Its scaling times rank.", show_default="2 x rank")] = None,
    target: Annotated[str, typer.Option(help="Layers it goes on: names between commas.")] = "all-linear",
    dropout: Annotated[float, typer.Option(help="Of its inputs.")] = 0.0,
    name: Annotated[str, typer.Option(help="Its name in the file.")] = "default",
    freeze_residual: Annotated[bool, typer.Option("--freeze-residual", help="Train the new adapter alone.")] = False,
    lr: Annotated[float, typer.Option(help="Learning rate (AdamW, cosine).")] = 2e-4,
    residual_lr: Annotated[float | None, typer.Option(help="Of the residual.", show_default="lr / 10")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Steps at most.", show_default="all")] = None,
    batch: Annotated[int, typer.Option(help="Examples at once.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    max_length: Annotated[int, typer.Option(help="Tokens an example; longer ones are cut.")] = 1024,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Less memory, slower steps.")] = False,
    seed: Annotated[int, typer.Option(help="Of the adapter's start and the order of examples.")] = 0,
    device: Annotated[str, typer.Option(help="cpu (float32) or cuda (bf16).")] = "cpu",
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Go on where an interrupted run stopped, or discard it.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Train a LoRA adapter, and the residual at its own rate, on the packed base of FILE."""
    from ..training.options import FinetuneOptions

    _check_output(out)
    options = FinetuneOptions(
        rank, alpha, target, dropout, name, freeze_residual, lr, residual_lr, epochs, max_steps, batch, accumulate,
        max_length, checkpointing, seed, device, save_every,
    )  # fmt: skip
    from ..training.finetuning import finetune as run

    silent, start = quiet or as_json, time.perf_counter()
    with ExitStack() as stack:
        bars: list[Progress] = []

        def begin(plan: TrainingPlan) -> None:
            _show_plan(path, data, plan, options, silent)
            bars.append(stack.enter_context(console.progress_bar("train", quiet=silent)))  # below what was said

        report = run(
            path, data, out, options, force=force, fresh=not resume,
            started=begin, progress=lambda done, total: bars[0](done, total),
        )  # fmt: skip
    seconds = time.perf_counter() - start
    if as_json:
        return console.say_json(_as_json(report, seconds))
    return _show_report(report, seconds, quiet)


def _check_output(out: Path) -> None:
    if out.suffix != ".salr":
        raise OptionError(f"output {str(out)!r}", needed="a file name ending in .salr")


def _show_plan(path: Path, data: Path, plan: TrainingPlan, options: FinetuneOptions, quiet: bool) -> None:
    named = {"adapters": f"adapter '{options.name}' rank {options.rank}"}
    parts = [f"{named.get(name, name)} ({console.count(size)}) at {lr:g}" for name, size, lr in plan.groups]
    parts += [] if len(plan.groups) > 1 else ["residual frozen"]
    console.say(f"{path.name}   {data.name}: {plan.data.describe()}", quiet=quiet)
    examples = min(options.batch * options.accumulate, len(plan.data.examples))
    kind = "float32" if options.device == "cpu" else "bf16"
    console.say(f"train   {', '.join(parts)}", quiet=quiet)
    console.say(f"        {plan.n_steps} steps of {examples} examples, {options.device} {kind}", quiet=quiet)
    if plan.n_done:
        console.say(f"        going on after step {plan.n_done}", quiet=quiet)


def _show_report(report: FinetuneReport, seconds: float, quiet: bool) -> None:
    first, last = _ends(report)
    n_ends = min(_ENDS, len(report.losses))
    console.say(f"loss    {first:.3f} -> {last:.3f} (means of the first and last {n_ends} steps)", quiet=quiet)
    for adapter in report.saved.adapters:
        ranks = " to ".join(f"{rank}" for rank in sorted({adapter.ranks[0], adapter.ranks[-1]}))
        size = console.megabytes(adapter.n_bytes)
        console.say(f"adapter {adapter.name:<10} {adapter.n_modules} modules, rank {ranks}, {size}", quiet=quiet)
    if report.curve is None:
        console.say(f"! No image of the losses: {report.no_curve_because}.", quiet=quiet)
    drawn = f"; losses in {report.curve}" if report.curve else ""
    out = report.saved.path
    console.say(f"wrote {out}, {console.megabytes(report.saved.n_bytes)}, in {seconds:.1f} s{drawn}", quiet=quiet)
    commands = ["verify", out], ["generate", out, "PROMPT"], ["eval", out, "--text", "FILE"]
    console.say_next(*commands, quiet=quiet)


def _ends(report: FinetuneReport) -> tuple[float, float]:
    """Return the mean loss of the first and of the last steps."""
    losses = [loss for _, loss in report.losses]
    first, last = losses[:_ENDS], losses[-_ENDS:]
    return sum(first) / len(first), sum(last) / len(last)


def _as_json(report: FinetuneReport, seconds: float) -> dict[str, object]:
    data = report.plan.data
    return {
        "path": str(report.saved.path),
        "bytes": report.saved.n_bytes,
        "adapters": [asdict(adapter) for adapter in report.saved.adapters],
        "groups": [{"name": name, "parameters": size, "lr": lr} for name, size, lr in report.plan.groups],
        "examples": len(data.examples),
        "form": data.form,
        "tokens": data.n_tokens,
        "tokens_learned": data.n_learned,
        "cut": data.n_cut,
        "left_out": data.n_left_out,
        "losses": [[step, loss] for step, loss in report.losses],
        "curve": None if report.curve is None else str(report.curve),
        "seconds": seconds,
    }
