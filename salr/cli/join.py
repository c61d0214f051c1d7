"""`salr join`: one file from shards, or from the parts that several jobs made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..formats.errors import OptionError
from ..formats.joining import join as join_shards
from . import console


def join(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="SHARDS... OUT.salr", help="Shards, or a directory of them; then the output."),
    ],
    force: Annotated[bool, typer.Option(help="Replace an existing output.")] = False,
    fresh: Annotated[bool, typer.Option(help="Discard what an interrupted run left.")] = False,
    quiet: console.Quiet = False,
) -> None:
    """Join all shards of a model to OUT.salr: the very file that a conversion without shards or parts gives."""
    *sources, out = paths
    if not sources:
        raise OptionError("one path", needed="shards (or a directory of them), and then the output")
    with console.progress_bar("join", quiet=quiet) as progress:
        n_bytes = join_shards(sources, out, force=force, fresh=fresh, progress=progress)
    console.say(f"wrote {out}, {console.megabytes(n_bytes)}", quiet=quiet)
    console.say_next(["verify", out], quiet=quiet)
