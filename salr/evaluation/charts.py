"""The plots of the page, as inline SVG: where the bytes are, columns by layer, decay of singular values.

Invariant: coordinates are in a view box 1100 wide, colours are classes of report_style, text never leaves its plot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Markup, tag, together
from .spectrum import Decay

WIDTH = 1100.0
_BAR_HEIGHT = 46.0
_LETTER = 7.4
_PANELS_A_ROW = 4


@dataclass(frozen=True)
class Part:
    """One part of a stacked bar: ``style`` is a class p-<style>; ``dark`` asks for dark text upon it."""

    label: str
    style: str
    n_bytes: int
    dark: bool = False


def size_text(n_bytes: float) -> str:
    """Return a size in kB, MB or GB (powers of ten)."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if n_bytes >= size:
            return f"{n_bytes / size:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{n_bytes / 1e3:.1f} kB"


def svg(height: float, label: str, *children: object) -> Markup:
    """Return a drawing in its frame."""
    box = f"0 0 {WIDTH:g} {height:g}"
    return tag("div", tag("svg", *children, viewBox=box, role="img", aria_label=label), class_="plot")


def stacked_bars(bars: Sequence[tuple[str, Sequence[Part]]]) -> Markup:
    """Return one bar above the other on a common scale of bytes; a part's name stands in it where it fits."""
    largest = max(sum(part.n_bytes for part in parts) for _, parts in bars) or 1
    drawn: list[Markup] = []
    for row, (title, parts) in enumerate(bars):
        y, total = row * 94.0 + 22, sum(part.n_bytes for part in parts)
        drawn.append(tag("text", title, x=0, y=y - 9, class_="strong"))
        drawn.append(tag("text", size_text(total), x=WIDTH * total / largest, y=y - 9, text_anchor="end"))
        x = 0.0
        for part in parts:
            width = WIDTH * part.n_bytes / largest
            drawn.append(_segment(part, x, y, width))
            x += width
    return svg(94.0 * len(bars) - 24, "bytes of the file by what they hold", *drawn)


def _segment(part: Part, x: float, y: float, width: float) -> Markup:
    tip = tag("title", f"{part.label}: {size_text(part.n_bytes)}")
    gap = 1.5 if width > 4 else 0.0
    shape = tag("rect", tip, x=x, y=y, width=max(width - gap, 0.3), height=_BAR_HEIGHT, rx=3, class_=f"p-{part.style}")
    if width < _LETTER * len(part.label) + 22:
        return shape
    text = "inside dark" if part.dark else "inside"
    return together([shape, tag("text", part.label, x=x + 11, y=y + _BAR_HEIGHT / 2 + 4.5, class_=text)])


@dataclass(frozen=True)
class Columns:
    """One plot of columns by layer; a span is (lowest, mean, highest) over the layer's modules, in layer order."""

    title: str
    value: str
    spans: Sequence[tuple[float, float, float]]


def column_plots(plots: Sequence[Columns], layers: Sequence[int]) -> Markup:
    """Return plots side by side, a column a layer: its height is the mean, a thin line spans lowest to highest."""
    step = (WIDTH + 40) / len(plots)
    drawn = [
        tag("g", *_columns(plot, layers, step - 40), transform=f"translate({i * step:.1f} 0)")
        for i, plot in enumerate(plots)
    ]
    return svg(180.0, "allocation by layer", *drawn)


def _columns(plot: Columns, layers: Sequence[int], width: float) -> list[Markup]:
    left, base = 42.0, 150.0
    top = max((high for _, _, high in plot.spans), default=0.0) or 1.0
    scale, step = (base - 38) / top, (width - left) / max(len(layers), 1)
    drawn = [tag("text", plot.title, x=0, y=14, class_="strong")]
    drawn.append(tag("text", plot.value, x=width, y=14, text_anchor="end"))
    for share in (0.0, 0.5, 1.0):
        drawn += _grid_line(base - share * top * scale, left, width, f"{share * top:.3g}")
    for index, (layer, (low, mean, high)) in enumerate(zip(layers, plot.spans, strict=True)):
        x, tip = left + index * step, tag("title", f"layer {layer}: {mean:.3g} ({low:.3g} to {high:.3g})")
        bar = {"x": x + step * 0.14, "y": base - mean * scale, "width": step * 0.72, "height": mean * scale}
        drawn.append(tag("rect", tip, class_="column", **bar))
        if high - low > 0.01 * top:
            ends = {"y1": base - low * scale, "y2": base - high * scale}
            drawn.append(tag("line", x1=x + step / 2, x2=x + step / 2, class_="whisker", **ends))
    return [*drawn, *layer_ticks(layers, left, step, base + 18)]


def _grid_line(y: float, left: float, right: float, label: str) -> list[Markup]:
    line = tag("line", x1=left, x2=right, y1=y, y2=y, class_="axis")
    return [line, tag("text", label, x=left - 8, y=y + 4.5, text_anchor="end")]


def layer_ticks(layers: Sequence[int], left: float, step: float, y: float) -> list[Markup]:
    """Return the numbers under some of the layers: as many as fit."""
    every = next(n for n in (1, 2, 5, 10, 20, 50, 10**9) if n * step >= 24)
    return [
        tag("text", str(layer), x=left + (index + 0.5) * step, y=y, text_anchor="middle")
        for index, layer in enumerate(layers)
        if index % every == 0
    ]


def decay_panels(decays: Sequence[Decay], labels: dict[str, str]) -> Markup:
    """Return a panel a kind: the median singular value by rank, with the band from the 10 % to the 90 % quantile."""
    height, step = 214.0, (WIDTH + 34) / _PANELS_A_ROW
    panels = [
        tag(
            "g",
            *_panel(decay, labels[decay.kind], step - 34),
            transform=f"translate({i % _PANELS_A_ROW * step:.1f} {i // _PANELS_A_ROW * height:.1f})",
        )
        for i, decay in enumerate(decays)
    ]
    return svg(height * -(-len(decays) // _PANELS_A_ROW) - 24, "decay of the residuals' singular values", *panels)


def _panel(decay: Decay, label: str, width: float) -> list[Markup]:
    left, top, base = 34.0, 44.0, 168.0
    rank = len(decay.median)
    step = (width - left) / max(rank - 1, 1)

    def points(values: Sequence[float], reverse: bool = False) -> str:
        order = reversed(range(rank)) if reverse else range(rank)
        return " ".join(f"{left + i * step:.1f},{base - values[i] * (base - top):.1f}" for i in order)

    drawn = [
        tag("text", label, x=0, y=14, class_="strong"),
        tag("text", f"half of the energy in the first {decay.half_energy}", x=0, y=31),
    ]
    for share in (0.0, 0.5, 1.0):
        drawn += _grid_line(base - share * (base - top), left, width, f"{share:g}")
    drawn.append(tag("polygon", points=f"{points(decay.high)} {points(decay.low, reverse=True)}", class_="band"))
    drawn.append(tag("polyline", points=points(decay.median), class_="median"))
    drawn.append(tag("text", "1", x=left, y=base + 18, text_anchor="middle"))
    drawn.append(tag("text", f"rank {rank}", x=width, y=base + 18, text_anchor="end"))
    return drawn
