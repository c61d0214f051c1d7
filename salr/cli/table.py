"""Tables of every command: rich on a terminal, plain padded lines off it (nothing wrapped, nothing coloured)."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from . import console


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Print rows of text under ``columns``; the first ``left`` columns are aligned to the left, the others right."""
    if console.out.is_terminal:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, title in enumerate(columns):
            table.add_column(Text(title), justify="left" if index < left else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        return console.out.print(table)
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        console.say("  ".join(cells).rstrip())
    return None
