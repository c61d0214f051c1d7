"""`salr export`: a .salr file in the form of another tool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import console

app = typer.Typer(help="Write FILE in the form of another tool.", no_args_is_help=True)


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


app.command("hf")(console.guarded(hf))
