"""The parts of the page that are words and numbers: headline tiles, adapters, evaluation, recipe, provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from ..formats.reader import SalrFile
from .charts import size_text
from .markup import Markup, tag, together
from .report_data import AdapterRow, Headline, adapter_rows
from .results import EvalResult, Evaluation


def tiles(numbers: Headline, evaluation: Evaluation | None) -> Markup:
    """Return the headline numbers."""
    found = [_size_tile(numbers), _bits_tile(numbers), _error_tile(numbers)]
    result = own_result(evaluation, PurePath(numbers.path).name)
    found.append(_perplexity_tile(result, evaluation) if result and evaluation else _removed_tile(numbers))
    return tag("dl", *found, class_="tiles")


def _tile(title: str, big: str, unit: str, small: str, before: str | None = None) -> Markup:
    value = tag(
        "div",
        tag("span", f"{before} \u2192 ", class_="from") if before else None,
        big,
        tag("span", unit, class_="unit") if unit else None,
        class_="big",
    )
    return tag("div", tag("dt", title), tag("dd", value, tag("small", small)), class_="tile")


def _size_tile(numbers: Headline) -> Markup:
    before, after = size_text(numbers.source_bytes), size_text(numbers.file_bytes)
    number, unit = after.split(" ")
    old, old_unit = before.split(" ")
    shown = old if unit == old_unit else before
    packed = f"{size_text(numbers.packed_source_bytes)} to {size_text(numbers.packed_bytes)}"
    small = f"{numbers.ratio:.2f}x the size; the packed matrices alone go from {packed}"
    return _tile("File size", _short(number), unit, small, _short(shown))


def _short(number: str) -> str:
    """Drop the decimal of numbers from 100 on."""
    return number.split(".")[0] if number.replace(".", "").isdigit() and float(number) >= 100 else number


def _bits_tile(numbers: Headline) -> Markup:
    small = f"every byte of the packed matrices counted; {numbers.bits_without_adapters:.2f} without adapters"
    before = f"{numbers.source_bits_per_weight:.0f}" if numbers.packed_weights else None
    return _tile("Bits per packed weight", f"{numbers.bits_per_weight:.2f}", "", small, before)


def _error_tile(numbers: Headline) -> Markup:
    small = "squared error as a share of |W|\u00b2: mask alone, then with the residual"
    if numbers.error_bound is None:
        small += " and rounded values"
    else:
        small += f" (bound {100 * numbers.error_bound:.1f} %)"
    if numbers.error_output is not None:
        small += f"; median output error {100 * numbers.error_output:.1f} %"
    small += f"; {numbers.error_before}" if numbers.error_before else ""
    error = f"{100 * numbers.error_residual:.1f}"
    return _tile("Weight error", error, "%", small, f"{100 * numbers.error_mask:.1f}")


def _removed_tile(numbers: Headline) -> Markup:
    low, high = numbers.ranks
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    small = f"of {numbers.packed_weights / 1e6:.1f} M packed weights; residual adapters of {rank}"
    return _tile("Weights removed", f"{100 * numbers.sparsity:.1f}", "%", small)


def _perplexity_tile(result: EvalResult, evaluation: Evaluation) -> Markup:
    reference = next((other for other in evaluation.results if other.is_reference), None)
    text = str(evaluation.protocol.get("text") or "the text")
    small = f"on {text}, {result.n_scored:,} predictions"
    if reference is None or result.agreement is None or result.ratio is None:
        return _tile("Perplexity", f"{result.perplexity:.2f}", "", small)
    small += f"; {result.ratio:.2f}x the reference, same next token in {100 * result.agreement:.1f} %"
    return _tile("Perplexity", f"{result.perplexity:.1f}", "", small, f"{reference.perplexity:.1f}")


def own_result(evaluation: Evaluation | None, name: str) -> EvalResult | None:
    """Return the result of the file of this name, if it was evaluated."""
    results = evaluation.results if evaluation else ()
    return next((r for r in results if PurePath(r.model).name == name and not r.is_reference), None)


def _section(title: str, note: str | None, *content: object) -> Markup:
    return tag("section", tag("h2", title), tag("p", note, class_="note") if note else None, *content)


def _table(titles: Sequence[tuple[str, str | None]], rows: Sequence[Markup]) -> Markup:
    """Return a table; each title comes with the class of its column."""
    head = tag("tr", *(tag("th", title, class_=style) for title, style in titles))
    return tag("div", tag("table", tag("thead", head), tag("tbody", *rows)), class_="scroll")


def _pairs(rows: Sequence[tuple[str, object]]) -> Markup:
    """Return a table of names and values."""
    lines = [tag("tr", tag("td", name), tag("td", value)) for name, value in rows]
    return tag("div", tag("table", tag("tbody", *lines), class_="pairs"), class_="scroll")


def adapters_section(file: SalrFile) -> Markup:
    """Show each adapter, the residual first."""
    rows = adapter_rows(file)
    note = (
        "Low-rank pairs beside the sparse weights. Trained ones are stored bit for bit; scaling is applied at run time."
    )
    if not rows:
        return _section("Adapters", "This file holds no adapters.")
    titles = [("name", None), ("kind", None), ("modules", "n"), ("rank", "n"), ("scaling", "n"), ("stored as", None)]
    return _section(
        "Adapters", note, _table([*titles, ("size", "n"), ("origin", None)], [_adapter(row) for row in rows])
    )


def _adapter(row: AdapterRow) -> Markup:
    low, high = row.ranks
    scalings = ", ".join(f"{scaling:g}" for scaling in row.scalings[:3]) + (" ..." if len(row.scalings) > 3 else "")
    return tag(
        "tr",
        tag("td", row.name),
        tag("td", "trained" if row.trained else "residual"),
        tag("td", f"{row.n_modules:,}", class_="n"),
        tag("td", str(low) if low == high else f"{low}-{high}", class_="n"),
        tag("td", scalings, class_="n"),
        tag("td", ", ".join(row.dtypes)),
        tag("td", size_text(row.n_bytes), class_="n"),
        tag("td", row.origin),
    )


def evaluation_section(evaluation: Evaluation, name: str) -> Markup:
    """Show perplexity, and agreement and KL where there is a reference."""
    protocol, results = evaluation.protocol, evaluation.results
    compared = any(result.is_reference for result in results)
    top = max((result.perplexity for result in results), default=1.0)
    titles = [("model", None), ("bits / weight", "n"), ("size", "n"), ("perplexity", "n"), ("", None)]
    titles += [("ratio", "n"), ("agreement", "n"), ("KL, nats", "n")] if compared else []
    first = results[0] if results else None
    count = f"{first.n_windows:,} windows, {first.n_scored:,} predictions; " if first else ""
    note = (
        f"{protocol.get('text')}: the whole text in windows of {protocol.get('window')} tokens, stride "
        f"{protocol.get('stride')}, {count}{protocol.get('precision')} on {protocol.get('device')}."
    )
    if compared:
        note += " Agreement: positions with the reference's first choice. KL: of the model from the reference, a token."
    own = own_result(evaluation, name)
    return _section("Evaluation", note, _table(titles, [_result(r, top, compared, r is own) for r in results]))


def _result(result: EvalResult, top: float, compared: bool, own: bool) -> Markup:
    mark = "reference" if result.is_reference else "this file" if own else None
    meter = tag("div", style=f"width:{max(1.0, 100 * result.perplexity / top):.1f}%")
    cells = [
        tag("td", PurePath(result.model).name or result.model, tag("span", mark, class_="tag") if mark else None),
        tag("td", f"{result.bits_per_weight:.2f}", class_="n"),
        tag("td", size_text(result.n_bytes), class_="n"),
        tag("td", f"{result.perplexity:.2f}", class_="n"),
        tag("td", meter, class_="meter"),
    ]
    if compared:
        cells += [
            tag("td", "" if result.ratio is None else f"{result.ratio:.3f}x", class_="n"),
            tag("td", "" if result.agreement is None else f"{100 * result.agreement:.1f} %", class_="n"),
            tag("td", "" if result.kl is None else f"{result.kl:.4f}", class_="n"),
        ]
    return tag("tr", *cells, class_="this" if own else None)


def recipe_section(file: SalrFile) -> Markup:
    """Show the options that the file was made with."""
    options = {k: v for k, v in file.manifest.options.items() if v not in ([], None, "", {})}
    rows = [(key, _value(value)) for key, value in sorted(options.items())]
    fates = Counter(line.fate for line in file.manifest.ledger)
    ledger = ", ".join(f"{count:,} {fate}" for fate, count in fates.most_common())
    note = f"The options of the conversion. Every input tensor is accounted for: {ledger or 'no ledger'}."
    return _section("Recipe", note, _pairs(rows) if rows else None)


def provenance_section(file: SalrFile) -> Markup:
    """Show what the file was made from, by what, and what it carries."""
    manifest = file.manifest
    made = [("generator", manifest.generator), *sorted(manifest.environment.items())]
    source = [(key, value) for key, value in sorted(manifest.source.items()) if key != "files"]
    files = [entry for entry in _list(manifest.source.get("files")) if isinstance(entry, dict)]
    assets = tag("p", tag("b", "Carried along: "), ", ".join(file.assets) or "nothing", class_="note")
    made_by = _pairs([(str(key), _value(value)) for key, value in (*made, *source)])
    columns = [tag("div", tag("h3", "Made by"), made_by)]
    if files:
        made_from = _pairs([(_value(f.get("name")), tag("code", _value(f.get("sha256")))) for f in files])
        columns.append(tag("div", tag("h3", "Made from (SHA-256)"), made_from))
    return _section("Provenance", None, assets, tag("div", *columns, class_="columns"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _value(value: Any) -> Markup:
    """Return a JSON value in words; an override (pattern, settings) stands on its own line."""
    if isinstance(value, list) and value and all(isinstance(item, list) for item in value):
        return together([tag("div", *(tag("span", _words(part), " ") for part in item)) for item in value])
    return together([_words(value)])


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(item)}" for key, item in sorted(value.items()))
    return f"{value:g}" if isinstance(value, float) else str(value)
