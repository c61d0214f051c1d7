"""HTML and SVG as safe text: what comes from a file is escaped, elements always close.

Invariant: only ``tag`` and ``together`` make ``Markup``; every other string they are given is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

_VOID = {"meta", "br", "hr"}


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an element; ``class_`` means class, ``_`` in other names means ``-``; None leaves an attribute out."""
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{text}>")
    return Markup(f"<{name}{text}>{together(children)}</{name}>")


def together(children: Iterable[object]) -> Markup:
    """Return pieces one after the other, escaped where they are no Markup; None is nothing."""
    return Markup("".join(_child(child) for child in children if child is not None))


def _child(child: object) -> str:
    return child if isinstance(child, Markup) else escape(_number(child))


def _number(value: object) -> str:
    """Write a coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
