"""`salr export`: a .salr file in the form that other tools run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console

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
    from ..converter.peft_export import export_peft

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
    quiet: console.Quiet = False,
) -> None:
    """Write a directory that transformers loads, packed, after `import salr`."""
    from ..converter.export_hf import export_hf

    export_hf(path, out)
    console.say(f"wrote {out}", quiet=quiet)
    console.say(
        f'next:  python -c "import salr; from transformers import AutoModelForCausalLM as A; '
        f"A.from_pretrained('{out}')\"",
        quiet=quiet,
    )
