"""`salr unpack`: a .salr file becomes a dense Hugging Face directory again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console


def unpack(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT/", help="The directory to make.")],
    merge: Annotated[bool, typer.Option("--merge", help="Add the trained adapters too.")] = False,
    residual: Annotated[bool, typer.Option("--residual/--no-residual", help="Add the residual adapter.")] = True,
    dtype: Annotated[str, typer.Option(help="source, bf16, fp16 or fp32 for every float tensor.")] = "source",
    quiet: console.Quiet = False,
) -> None:
    """Write FILE as a dense model directory that transformers loads."""
    from ..converter.export.unpack import unpack as run

    with console.progress_bar("unpack", quiet=quiet) as progress:
        run(path, out, residual=residual, merge=merge, dtype=dtype, progress=progress)
    console.say(f"wrote {out}", quiet=quiet)
