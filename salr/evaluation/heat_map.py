"""Heat maps of layers by kinds of layers, on a colour scale that several of them share.

Invariant: twelve steps from 0 to the largest value shown; the mean of each kind stands beside its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .charts import WIDTH, layer_ticks, svg
from .markup import Markup, tag
from .report_data import ModuleRow

_STEPS = 12
_LEFT = 150.0
_RIGHT = 62.0
_ROW = 24.0

Cells = Mapping[tuple[str, int], float]


def cells_of(rows: Sequence[ModuleRow], value: Callable[[ModuleRow], float | None]) -> dict[tuple[str, int], float]:
    """Return the mean value of each (kind, layer), weighted by energy; modules without one are left out."""
    sums: dict[tuple[str, int], tuple[float, float]] = {}
    for row in rows:
        found = value(row)
        if found is not None and row.layer is not None:
            weight = row.entry.error.energy or 1e-30
            total, weights = sums.get((row.kind, row.layer), (0.0, 0.0))
            sums[row.kind, row.layer] = (total + weight * found, weights + weight)
    return {key: total / weights for key, (total, weights) in sums.items()}


def heat_map(
    title: str, cells: Cells, kind_names: Sequence[str], labels: Mapping[str, str], layers: Sequence[int], top: float
) -> Markup:
    """Return a map with a row a kind and a column a layer; ``top`` is the value of the last colour."""
    step = (WIDTH - _LEFT - _RIGHT) / max(len(layers), 1)
    drawn = [tag("text", title, x=0, y=15, class_="strong"), *_scale(top)]
    drawn.append(tag("text", "mean", x=WIDTH, y=32, text_anchor="end"))
    for row, kind in enumerate(kind_names):
        y = 40 + row * _ROW
        drawn.append(tag("text", _cut(labels[kind]), x=_LEFT - 12, y=y + 16, text_anchor="end"))
        found = [cells[kind, layer] for layer in layers if (kind, layer) in cells]
        for column, layer in enumerate(layers):
            if (kind, layer) in cells:
                tip = tag("title", f"layer {layer}, {labels[kind]}: {100 * cells[kind, layer]:.2f} %")
                style = f"h{_step(cells[kind, layer], top)}"
                box = {"x": _LEFT + column * step, "y": y, "width": max(step - 1.5, 0.8), "height": _ROW - 1.5}
                drawn.append(tag("rect", tip, class_=style, rx=2, **box))
        mean = f"{100 * sum(found) / len(found):.1f} %" if found else ""
        drawn.append(tag("text", mean, x=WIDTH, y=y + 16, text_anchor="end", class_="strong"))
    below = 40 + len(kind_names) * _ROW
    drawn.append(tag("text", "layer", x=_LEFT - 12, y=below + 16, text_anchor="end"))
    return svg(below + 30, title, *drawn, *layer_ticks(layers, _LEFT, step, below + 16))


def _scale(top: float) -> list[Markup]:
    """Return the colour bar at the right of the title."""
    width, x = 15.0, WIDTH - _RIGHT - _STEPS * 15.0 - 52
    boxes = [tag("rect", x=x + i * width, y=4, width=width, height=12, class_=f"h{i}") for i in range(_STEPS)]
    return [
        tag("text", "0", x=x - 8, y=15, text_anchor="end"),
        *boxes,
        tag("text", f"{100 * top:.3g} %", x=x + _STEPS * width + 8, y=15),
    ]


def _step(value: float, top: float) -> int:
    return min(_STEPS - 1, max(0, int(_STEPS * value / top))) if top > 0 else 0


def _cut(label: str, longest: int = 20) -> str:
    return label if len(label) <= longest else "\u2026" + label[1 - longest :]
