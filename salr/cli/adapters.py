"""`salr adapters`: the adapters of a .salr file listed, added, removed, rescaled and merged; its base stays."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..formats.rewriting import Destination
from . import console
from .table import show_table

if TYPE_CHECKING:
    from ..converter.adapters.summary import AdapterSummary

app = typer.Typer(no_args_is_help=True, help="List, add, remove, scale or merge the adapters of a .salr file.")

File = Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The adapter's name.")]
Output = Annotated[Path | None, typer.Option("-o", "--output", metavar="OUT", help="Write OUT, leave FILE alone.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing OUT.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Discard what an interrupted run left.")]


@app.command("list")
@console.guarded
def list_(path: File, as_json: console.Json = False) -> None:
    """Show each adapter of FILE: rank, scaling, modules, size and origin."""
    from ..converter.adapters.summary import list_adapters

    found = list_adapters(path)
    if as_json:
        return console.say_json([asdict(adapter) for adapter in found])
    if not found:
        return console.say(f"{path} holds no adapters")
    columns = ["adapter", "rank", "scaling", "alpha", "modules", "size", "origin"]
    return show_table(columns, [_row(adapter) for adapter in found])


@app.command("add")
@console.guarded
def add(
    path: File,
    adapter: Annotated[str, typer.Argument(metavar="[NAME=]DIR", help="A PEFT LoRA directory.")],
    out: Output = None,
    force: Force = False,
    fresh: Fresh = False,
    quiet: console.Quiet = False,
) -> None:
    """Add a PEFT LoRA directory to FILE, its factors bit for bit."""
    from ..converter.adapters.editing import add_adapter
    from .convert_options import parse_adapters

    ((name, directory),) = parse_adapters([adapter])
    with console.progress_bar("add", quiet=quiet) as progress:
        added = add_adapter(path, directory, name, Destination(out, force, fresh), progress)
    console.say(f"added {_describe(added)}; wrote {out or path}", quiet=quiet)


@app.command("remove")
@console.guarded
def remove(
    path: File,
    name: Name,
    out: Output = None,
    force: Force = False,
    fresh: Fresh = False,
    quiet: console.Quiet = False,
) -> None:
    """Take an adapter out of FILE."""
    from ..converter.adapters.editing import remove_adapter

    with console.progress_bar("remove", quiet=quiet) as progress:
        removed = remove_adapter(path, name, Destination(out, force, fresh), progress)
    console.say(f"removed {_describe(removed)}; wrote {out or path}", quiet=quiet)


@app.command("scale")
@console.guarded
def scale(
    path: File,
    name: Name,
    factor: Annotated[float | None, typer.Argument(metavar="[FACTOR]", help="Multiply each module's scaling.")] = None,
    scaling: Annotated[float | None, typer.Option(help="Set the scaling of every module instead.")] = None,
    out: Output = None,
    force: Force = False,
    fresh: Fresh = False,
    quiet: console.Quiet = False,
) -> None:
    """Change how strongly an adapter of FILE acts; no tensor changes."""
    from ..converter.adapters.editing import scale_adapter

    with console.progress_bar("scale", quiet=quiet) as progress:
        scaled = scale_adapter(
            path, name, factor=factor, scaling=scaling, destination=Destination(out, force, fresh), progress=progress
        )
    console.say(f"scaled {_describe(scaled)}; wrote {out or path}", quiet=quiet)


@app.command("merge")
@console.guarded
def merge(
    path: File,
    names: Annotated[
        list[str], typer.Argument(metavar="A B ...", help="Adapters; residual too, with --into residual.")
    ],
    into: Annotated[str, typer.Option(metavar="NAME", help="Name of the adapter that replaces them.")],
    rank: Annotated[int | None, typer.Option(help="Fit the sum again at this rank.", show_default="exact")] = None,
    out: Output = None,
    force: Force = False,
    fresh: Fresh = False,
    quiet: console.Quiet = False,
) -> None:
    """Replace several adapters of FILE by one with the sum of what they do.

    With the residual among them the sum becomes the residual, at its old cost if --rank is the residual's: a tuned
    adapter costs nothing any more when FILE runs, and cannot be switched off.
    """
    from ..converter.adapters.merging import merge_adapters

    with console.progress_bar("merge", quiet=quiet) as progress:
        report = merge_adapters(
            path, names, into, rank=rank, destination=Destination(out, force, fresh), progress=progress
        )
    console.say(f"merged {', '.join(names)} into {_describe(report.adapter)}", quiet=quiet)
    console.say(
        f"  {report.n_exact} modules exactly, {report.n_folded} with scalings folded in float32, "
        f"{report.n_fitted} fitted again",
        quiet=quiet,
    )
    if report.n_fitted:
        console.say(
            f"  error of the fit, share of |sum|^2: {report.error:.2e}, worst {report.worst_module} "
            f"{report.worst_error:.2e}",
            quiet=quiet,
        )
    console.say(f"wrote {out or path}", quiet=quiet)


def _describe(adapter: AdapterSummary) -> str:
    return (
        f"adapter '{adapter.name}': {adapter.n_modules} modules, rank {_range(adapter.ranks)}, "
        f"scaling {_range(adapter.scalings)}, {console.megabytes(adapter.n_bytes)}"
    )


def _row(adapter: AdapterSummary) -> list[str]:
    return [
        adapter.name,
        _range(adapter.ranks),
        _range(adapter.scalings),
        _range(adapter.alphas),
        str(adapter.n_modules),
        console.megabytes(adapter.n_bytes),
        "; ".join(adapter.origins),
    ]


def _range(numbers: tuple[int, ...] | tuple[float, ...]) -> str:
    """Return one number, or the least and the greatest."""
    shown = [f"{number:g}" for number in numbers]
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}" if shown else ""
