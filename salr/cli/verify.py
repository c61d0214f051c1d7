"""`salr verify`: digests and structure of a .salr file, and whether it is what its source gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..formats.errors import FormatError, OptionError, SalrError
from ..formats.reader import SalrFile
from . import console
from .convert_options import parse_adapters


def verify(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file.")],
    against: Annotated[Path | None, typer.Option(metavar="SRC", help="The source it was made from.")] = None,
    adapter: Annotated[list[str], typer.Option(metavar="[NAME=]DIR", help="As given to convert.")] = [],  # noqa: B006
    base: Annotated[Path | None, typer.Option(help="As given to convert.")] = None,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Check every digest and structure of FILE; --against SRC recomputes it. Exit status 3 on a mismatch."""
    if against is None and (adapter or base is not None):
        alone = "--adapter" if adapter else "--base"
        raise OptionError(f"{alone} without --against", needed="--against SRC beside it: they say what SRC was")
    try:
        file = SalrFile(path)
    except FormatError as error:
        if not path.exists():
            raise
        return _report([error], 0, 0, as_json)
    total = len(file.manifest.checksums) + len(file.modules)
    problems, n_checked = _collect(file.check_all(), total, "verify", quiet or as_json)
    n_compared = 0
    if against is not None and not problems:
        from ..converter.verification import compare_with_source

        findings = compare_with_source(file, against, parse_adapters(adapter), base)
        found, n_compared = _collect(findings, None, "compare", quiet or as_json)
        problems += found
    if not problems and not as_json:
        compared = f"; {n_compared} parts equal the source" if against is not None else ""
        console.say(f"{path}: header, manifest and {n_checked} checks are sound{compared}", quiet=quiet)
        for name, how in _made_here(file).items() if against is not None else ():
            console.say(f"not compared: adapter '{name}', which was {how} inside the file", quiet=quiet)
    return _report(problems, n_checked, n_compared, as_json)


def _made_here(file: SalrFile) -> dict[str, str]:
    """Return the adapters that no source holds, and how they were made."""
    from ..converter.adapters.records import is_made_here, is_merged

    every = [adapter for entry in file.modules.values() for adapter in entry.adapters if is_made_here(adapter)]
    return {a.name: "merged" if is_merged(a) else "trained" for a in sorted(every, key=lambda a: a.name)}


def _report(problems: list[SalrError], n_checked: int, n_compared: int, as_json: bool) -> None:
    """Print the problems, or everything as JSON; exit with 3 where there is a problem."""
    if as_json:
        console.say_json({"checked": n_checked, "compared": n_compared, "problems": [str(p) for p in problems]})
    else:
        for problem in problems:
            console.fail(str(problem))
    if problems:
        raise typer.Exit(3)


def _collect(
    findings: Iterator[tuple[str, SalrError | None]], total: int | None, label: str, quiet: bool
) -> tuple[list[SalrError], int]:
    problems, done = [], 0
    with console.progress_bar(label, quiet=quiet) as progress:
        for done, (_, problem) in enumerate(findings, 1):
            progress(done, max(total or 0, done))
            if problem is not None:
                problems.append(problem)
    return problems, done
