"""How every command talks: one story on stdout, errors in one line on stderr, a bar on a terminal only."""

from __future__ import annotations

import functools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..formats.errors import MismatchError, SalrError

_Arguments = ParamSpec("_Arguments")

#: columns off a terminal, where nothing is to be cut
_WIDE = 10_000

out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _WIDE)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]

Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for every module.")]


def say(text: str = "", *, quiet: bool = False) -> None:
    """Print a line of plain text (no markup is read from it)."""
    if not quiet:
        out.print(text, markup=False)


def say_next(*commands: Sequence[object], quiet: bool = False) -> None:
    """Print commands of salr, each from its words, as they can be pasted into a shell."""
    for number, words in enumerate(commands):
        say(("       " if number else "next:  ") + shlex.join(["salr", *map(str, words)]), quiet=quiet)


def say_json(value: Any) -> None:
    """Print a JSON object."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def fail(text: str) -> None:
    """Print an error in one line."""
    err.print("salr: " + " ".join(text.splitlines()), markup=False, style="red")


def guarded(command: Callable[_Arguments, None]) -> Callable[_Arguments, None]:
    """Turn errors of the library and of the system into one line and an exit status, and Ctrl-C into 130."""

    @functools.wraps(command)
    def run(*args: _Arguments.args, **options: _Arguments.kwargs) -> None:
        try:
            command(*args, **options)
        except MismatchError as error:
            fail(str(error))
            raise typer.Exit(3) from error
        except SalrError as error:
            fail(str(error))
            raise typer.Exit(1) from error
        except BrokenPipeError:
            raise  # whoever read the output has seen enough: click ends quietly
        except OSError as error:
            place = f"{error.filename!s:.200}: " if error.filename is not None else ""
            fail(f"{place}{error.strerror or error}; check the path, its permissions and the disk")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            fail("interrupted; nothing stands under the output's name; to convert or train on, give the same command")
            raise typer.Exit(130) from error

    return run


@contextmanager
def progress_bar(label: str, *, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yield a function (done, total) that draws a bar with time left; silent off a terminal."""
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, disable=quiet or not err.is_terminal, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def megabytes(n_bytes: float) -> str:
    """Return a size in MB or GB (powers of ten)."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def count(number: int) -> str:
    """Return a number of parameters in words: 134.5 M."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return str(number)


def percent(share: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * share:.1f} %"
