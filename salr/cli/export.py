"""`salr export`: a .salr file in the form that other tools run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import console
from .eval import result_cells, result_columns

if TYPE_CHECKING:
    from ..converter.export.model_card import CardEvaluation

app = typer.Typer(no_args_is_help=True, help="Write a .salr file in the form that other tools run.")


@app.callback()
def group() -> None:
    """Write a .salr file in the form that other tools run."""


@app.command("peft")
@console.guarded
def peft(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT/", help="The directory to make.")],
    dtype: Annotated[str, typer.Option(help="source, bf16, fp16 or fp32 for the base's float tensors.")] = "source",
    with_residual: Annotated[
        bool, typer.Option("--with-residual", help="The residual in each trained adapter too, for one a request.")
    ] = False,
    quiet: console.Quiet = False,
) -> None:
    """Write the pruned base, its residual and each trained adapter as directories that PEFT loads."""
    from ..converter.export.peft import export_peft

    with console.progress_bar("export", quiet=quiet) as progress:
        export = export_peft(path, out, dtype=dtype, with_residual=with_residual, progress=progress)
    if export.folded:
        found = f"{len(export.folded)} modules that PEFT cannot adapt ({export.folded[0]} ...)"
        console.say(f"! {found} have their residual in the base.", quiet=quiet)
    for made in (export.base, *export.adapters.values()):
        console.say(f"wrote {made}", quiet=quiet)


@app.command("hf")
@console.guarded
def hf(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT/", help="The directory to make.")],
    evaluation: Annotated[
        Path | None,
        typer.Option("--eval", metavar="FILE.json", help="What `salr eval --save` wrote, for the model card."),
    ] = None,
    quiet: console.Quiet = False,
) -> None:
    """Write a directory that transformers loads, packed, after `import salr`, with a model card."""
    from ..converter.export.hf import export_hf

    export_hf(path, out, None if evaluation is None else _recorded(path, evaluation))
    console.say(f"wrote {out}", quiet=quiet)
    code = f"import salr; from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(out)!r})"
    console.say(f"next:  python -c {shlex.quote(code)}", quiet=quiet)


def _recorded(file: Path, path: Path) -> CardEvaluation:
    """Return a recorded evaluation of a .salr file as the table of a model card."""
    from ..converter.export.model_card import CardEvaluation
    from ..evaluation.results import results_of
    from ..formats.reader import SalrFile

    found = results_of(SalrFile(file), path)
    results, protocol = found.results, found.protocol
    compared = any(result.is_reference for result in results)
    told = ", ".join(f"{key} {value}" for key, value in protocol.items() if value is not None)
    rows = [result_cells(result, compared) for result in results]
    return CardEvaluation(f"Measured by `salr eval`: {told}.", result_columns(compared), rows)


@app.command("onnx")
@console.guarded
def onnx(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT/", help="The directory to make.")],
    weights: Annotated[str, typer.Option(help="sparse (packed, a copy of FILE beside the graph) or dense.")] = "sparse",
    adapters: Annotated[
        str, typer.Option(help="fused, or overridable: exchanged at run time by .onnx_adapter files.")
    ] = "fused",
    opset: Annotated[int, typer.Option(help="18 to 25.")] = 23,
    dtype: Annotated[str, typer.Option(help="fp32 or fp16 for activations, keys and values.")] = "fp32",
    library: Annotated[bool, typer.Option("--library", help="Put the native library into OUT/ too.")] = False,
    verify: Annotated[
        bool | None, typer.Option("--verify/--no-verify", help="Compare with torch. [up to 300 M packed weights]")
    ] = None,
    quiet: console.Quiet = False,
) -> None:
    """Write an ONNX graph with all that ONNX Runtime and onnxruntime-genai need (docs/onnx.md)."""
    from ..onnx.export import export_onnx

    made = export_onnx(
        path, out, weights=weights, adapters=adapters, opset=opset, dtype=dtype, library=library, verify=verify
    )
    checked = made.verification
    if checked is not None:
        native = "not checked: " + str(checked.library_missing)
        if checked.with_library is not None:
            native = f"{checked.with_library:.1e}"
        told = f"function body {checked.with_body:.1e}, native library {native}"
        console.say(f"differs from torch by (share of the largest output): {told}", quiet=quiet)
    for warning in made.warnings:
        console.say(f"! {warning}", quiet=quiet)
    for name in made.adapter_files:
        console.say(f"adapter {out / name}", quiet=quiet)
    console.say(f"wrote {out}", quiet=quiet)
