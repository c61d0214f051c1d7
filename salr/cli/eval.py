"""`salr eval`: perplexity of models on a text, and how far each is from a reference."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..formats.errors import OptionError, OutputError
from ..formats.output_file import OutputFile
from . import console
from .table import show_table

if TYPE_CHECKING:
    from ..evaluation.protocol import EvalOptions
    from ..evaluation.results import EvalResult


def evaluate(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL", help="Model directories or .salr files.")],
    text: Annotated[Path, typer.Option(metavar="FILE", help="The text to predict, as one string.")],
    reference: Annotated[
        Path | None, typer.Option(metavar="SRC", help="Compare with this model: agreement, KL.")
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    stride: Annotated[int, typer.Option(help="Tokens between windows.", show_default="0 = window")] = 0,
    max_windows: Annotated[int | None, typer.Option(help="Score the first N windows only.", show_default="all")] = None,
    device: Annotated[str, typer.Option(help="cpu (float32) or cuda[:i] (bf16 autocast).")] = "cpu",
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the results, for inspect --eval.")
    ] = None,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Measure each MODEL's perplexity on a text; --reference adds next-token agreement and KL divergence."""
    from ..evaluation.protocol import EvalOptions, read_text
    from ..evaluation.results import as_json as results_as_json

    options = EvalOptions(window, stride, max_windows, device)
    content = read_text(text)
    with nullcontext() if save is None else open_results(save) as output:
        from ..evaluation.evaluate import evaluate as run

        start = time.perf_counter()
        with console.progress_bar("eval", quiet=quiet or as_json) as progress:
            results = run(models, text, reference, options, progress=progress)
        found, seconds = results_as_json(results, content, options), time.perf_counter() - start
        if as_json:
            console.say_json(found)
        elif not quiet:
            console.say(f"{content.name}   {_scored(results[0], options)}")
            show_results(results)
        if output is not None:
            output.write(0, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
            output.commit()
    console.say(f"measured in {seconds:.1f} s" + (f"; wrote {save}" if save else ""), quiet=quiet or as_json)


def _scored(first: EvalResult, options: EvalOptions) -> str:
    return (
        f"{first.n_windows} windows of {options.window} tokens, stride {options.step}, {first.n_scored} predictions, "
        f"{options.precision} on {options.device}"
    )


def open_results(path: Path) -> OutputFile:
    """Return the file to save results in, held before the first is measured; older results are replaced at the end.

    Raises:
        OptionError: its name does not end in .json, or its folder is missing.
        OutputError: it cannot be written, or holds something else than results.
    """
    from ..evaluation.errors import EvaluationError
    from ..evaluation.results import read_results

    check_report(path, ".json")
    if path.exists() and path.stat().st_size:
        try:
            read_results(path)
        except EvaluationError as error:
            found = "the output exists and holds no results of `salr eval`"
            raise OutputError(found, path=path, fix="choose another name") from error
    return OutputFile(path, 0, force=True, fresh=True)


def show_results(results: list[EvalResult]) -> None:
    """Print one line a model."""
    compared = results[0].is_reference
    show_table(result_columns(compared), [result_cells(result, compared) for result in results])


def result_columns(compared: bool) -> list[str]:
    """Return the heads of the table; ``compared``: with those of a reference."""
    return ["model", "bits/weight", "size", "perplexity", *(["ratio", "agreement", "KL (nats)"] if compared else [])]


def result_cells(result: EvalResult, compared: bool) -> list[str]:
    """Return one model's line."""
    cells = [
        result.model + (" (reference)" if result.is_reference else ""),
        f"{result.bits_per_weight:.2f}",
        console.megabytes(result.n_bytes),
        f"{result.perplexity:.2f}",
    ]
    if compared:
        cells += [f"{result.ratio:.3f}x", console.percent(result.agreement or 0.0), f"{result.kl:.4f}"]
    return cells


def check_report(path: Path, suffix: str) -> None:
    """Refuse a report's path that could destroy something else, or whose folder is missing.

    Raises:
        OptionError: see above.
    """
    if path.suffix != suffix or path.is_dir():
        raise OptionError(f"output {str(path)!r}", needed=f"a file name ending in {suffix}")
    if not path.parent.is_dir():
        raise OptionError(f"output {str(path)!r}: no such directory", fix="make it first")
