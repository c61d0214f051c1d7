"""`salr bench`: tokens per second, prefill and memory of a .salr file here, against dense."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .generate import Backend, Device, Dtype
from .table import show_table

if TYPE_CHECKING:
    from ..runtime.benchmark import BenchResult, Comparison


def bench(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file.")],
    against: Annotated[Path | None, typer.Option(metavar="SRC", help="The dense model to compare with.")] = None,
    batch: Annotated[list[int], typer.Option(help="Sequences at once; repeatable.", show_default="1, 8, 32")] = [],  # noqa: B006
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 16,
    repeats: Annotated[int, typer.Option(help="Runs of each figure; the median counts.")] = 3,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    backend: Backend = None,
    as_json: console.Json = False,
) -> None:
    """Measure how fast FILE runs on this machine; --against: the dense model too, and from which batch it wins."""
    from ..runtime.benchmark import BenchOptions
    from ..runtime.benchmark import bench as run

    options = BenchOptions(tuple(batch) or BenchOptions.batches, prompt_tokens, new_tokens, repeats)
    found = run(path, against, options, device=device, dtype=dtype, backend=backend)
    if as_json:
        return console.say_json(asdict(found))
    return show(found, options.prompt_tokens, options.new_tokens)


def show(found: Comparison, prompt_tokens: int, new_tokens: int) -> None:
    """Print one line a batch size, and who wins where."""
    packed = found.results[0]
    for result in found.results:
        used = "" if result.memory_bytes is None else f", {console.megabytes(result.memory_bytes)} of memory"
        console.say(
            f"{result.name} ({result.backend})   loaded in {result.load_seconds:.2f} s, "
            f"first call {result.first_call_seconds:.2f} s{used}"
        )
    console.say(f"tokens per second over all sequences; prompt {prompt_tokens}, {new_tokens} new tokens, random ids")
    columns = ["batch", "write", "read prompt"]
    if len(found.results) > 1:
        columns += ["dense write", "ratio", "dense read", "ratio"]
    show_table(columns, [_cells(found.results, index) for index in range(len(packed.speeds))])
    if len(found.results) > 1:
        console.say(_verdict(found))


def _cells(results: tuple[BenchResult, ...], index: int) -> list[str]:
    speed = results[0].speeds[index]
    cells = [str(speed.batch), f"{speed.tokens_per_second:.1f}", f"{speed.prefill_tokens_per_second:.0f}"]
    for dense in (result.speeds[index] for result in results[1:]):
        cells += [f"{dense.tokens_per_second:.1f}", f"{speed.tokens_per_second / dense.tokens_per_second:.2f}x"]
        ratio = speed.prefill_tokens_per_second / dense.prefill_tokens_per_second
        cells += [f"{dense.prefill_tokens_per_second:.0f}", f"{ratio:.2f}x"]
    return cells


def _verdict(found: Comparison) -> str:
    if found.crossover is None:
        return f"packed writes faster at every batch up to {found.results[0].speeds[-1].batch}"
    return f"dense writes faster from batch {found.crossover} on"
