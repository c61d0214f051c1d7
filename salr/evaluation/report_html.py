"""The page of a .salr file: one self-contained HTML document, made to be shown.

Invariant: it needs no network and no script, and everything that comes from the file or the results is escaped
(see markup.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..converter.report import size_report
from ..formats.output_file import OutputFile
from ..formats.reader import SalrFile
from .charts import Columns, Part, column_plots, decay_panels, size_text, stacked_bars
from .heat_map import cells_of, heat_map
from .markup import Markup, tag
from .report_data import Headline, ModuleRow, headline, kind_labels, kinds, module_rows
from .report_style import style_sheet
from .report_tables import adapters_section, evaluation_section, provenance_section, recipe_section, tiles
from .results import Evaluation
from .spectrum import residual_decay

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report_page(file: SalrFile, evaluation: Evaluation | None = None) -> str:
    """Return the page as HTML text.

    Raises:
        SalrError: a module of the file is damaged.
    """
    numbers, rows = headline(file), module_rows(file)
    name = file.path.name
    body = tag(
        "main",
        tag(
            "header",
            tag("p", "Sparse + low-rank model", class_="eyebrow"),
            tag("h1", name),
            tag("p", _lead(numbers), class_="lead"),
        ),
        tiles(numbers, evaluation),
        bytes_section(file),
        *(sections_of_modules(file, rows) if rows else []),
        adapters_section(file),
        evaluation_section(evaluation, name) if evaluation else None,
        recipe_section(file),
        provenance_section(file),
        tag("footer", f"Made by `salr inspect --html` from {name}; every number is read from the file."),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{name} - SALR"),
        tag("style", Markup(style_sheet())),
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def write_report(file: SalrFile, path: str | Path, evaluation: Evaluation | None = None) -> None:
    """Write the page to ``path``, replacing what is there only when the page is complete.

    Raises:
        OutputError: ``path`` cannot be written.
        SalrError: a module of the file is damaged.
    """
    with OutputFile(path, 0, force=True, fresh=True) as output:
        output.write(0, report_page(file, evaluation).encode())
        output.commit()


def _lead(numbers: Headline) -> str:
    millions = numbers.packed_weights / 1e6
    weights = f"{millions / 1e3:.2f} B" if millions >= 1e3 else f"{millions:.1f} M"
    return f"{numbers.architecture}: {weights} weights in {numbers.n_modules} matrices, packed with {numbers.method}"


def section(title: str, note: str, *content: object) -> Markup:
    """Return a titled part of the page."""
    return tag("section", tag("h2", title), tag("p", note, class_="note"), *content)


def bytes_section(file: SalrFile) -> Markup:
    """Show where the bytes are, before and after, on one scale."""
    sizes = size_report(file)
    trained = Part("trained adapters", "trained", sizes.adapter_bytes)
    kept = Part("kept dense", "kept", sizes.kept_bytes, dark=True)
    before = [Part("dense weights", "dense", sizes.packed_source_bytes), trained, kept]
    after = [
        Part("kept values", "values", sizes.values_bytes),
        Part("bitmap", "bitmap", sizes.bitmap_bytes, dark=True),
        Part("row offsets", "row-offsets", sizes.row_offsets_bytes, dark=True),
        Part("scales", "scales", sizes.scales_bytes),
        Part("residual", "residual", sizes.residual_bytes, dark=True),
        trained,
        kept,
        Part("header, manifest, assets", "overhead", sizes.overhead_bytes + sizes.asset_bytes),
    ]
    after = [part for part in after if part.n_bytes > 0]
    note = "The same tensors before and after packing, on one scale. Kept dense: embeddings, norms and the like."
    bars = stacked_bars([("before", [part for part in before if part.n_bytes]), ("after", after)])
    return section("Where the bytes are", note, bars, _legend(after, sizes.file_bytes))


def _legend(parts: Sequence[Part], total: int) -> Markup:
    return tag(
        "ul",
        *(
            tag(
                "li",
                tag("i", class_=f"p-{part.style}"),
                tag("span", part.label),
                tag("b", size_text(part.n_bytes)),
                tag("em", f"{100 * part.n_bytes / total:.1f} %"),
            )
            for part in parts
        ),
        class_="legend",
    )


def sections_of_modules(file: SalrFile, rows: Sequence[ModuleRow]) -> list[Markup]:
    """Show errors, decay and allocation by layer and kind of layer."""
    labels = kind_labels(kinds(rows))
    found = [error_section(rows, labels)]
    decays = residual_decay(file, rows)
    if decays:
        note = (
            "Singular values of each residual adapter (from the stored factors), as shares of its largest: median over "
            "the layers, band from the 10 % to the 90 % quantile. A flat curve means that more rank would still help."
        )
        found.append(section("What the residual adapters hold", note, decay_panels(decays, labels)))
    found.append(allocation_section(rows))
    return found


def error_section(rows: Sequence[ModuleRow], labels: dict[str, str]) -> Markup:
    """Show the error of each layer and kind, before and after the residual, and the output error where measured."""
    layers = sorted({row.layer for row in rows if row.layer is not None})
    names = [kind for kind in labels if any(row.kind == kind and row.layer is not None for row in rows)]
    mask = cells_of(rows, lambda row: row.entry.error.mask)
    corrected = cells_of(rows, lambda row: row.entry.error.residual)
    output = cells_of(rows, lambda row: row.entry.error.output)
    top = max([*mask.values(), *corrected.values()], default=0.0)
    maps = [
        heat_map("The mask alone", mask, names, labels, layers, top),
        heat_map("With the residual adapter", corrected, names, labels, layers, top),
    ]
    note = (
        "Squared error of each weight matrix as a share of its energy |W|\u00b2. "
        "The maps of mask and residual share one colour scale."
    )
    if output:
        maps.append(
            heat_map("Output on calibration data", output, names, labels, layers, max(output.values(), default=0.0))
        )
        note += " The last map is the squared error of the layer's output on calibration data, on its own scale."
    return section("Error by layer", note, *maps)


def allocation_section(rows: Sequence[ModuleRow]) -> Markup:
    """Show how sparsity, rank and bits are spread over the layers."""
    layers = sorted({row.layer for row in rows if row.layer is not None})
    in_layer = [[row for row in rows if row.layer == layer] for layer in layers]
    weights = sum(row.entry.n_weights for row in rows)

    def spans(values: list[list[float]]) -> list[tuple[float, float, float]]:
        means = [
            sum(v * r.entry.n_weights for v, r in zip(each, some, strict=True)) / sum(r.entry.n_weights for r in some)
            for each, some in zip(values, in_layer, strict=True)
        ]
        return [(min(each), mean, max(each)) for each, mean in zip(values, means, strict=True)]

    removed = 100 * (1 - sum(row.entry.nnz for row in rows) / weights)
    bits = 8 * sum(row.n_bytes for row in rows) / weights
    ranks = sorted({row.rank for row in rows})
    rank_text = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    plots = [
        Columns("removed, %", f"{removed:.1f} %", spans([[100 * r.sparsity for r in some] for some in in_layer])),
        Columns("residual rank", rank_text, spans([[float(r.rank) for r in some] for some in in_layer])),
        Columns("bits per weight", f"{bits:.2f}", spans([[r.bits for r in some] for some in in_layer])),
    ]
    note = (
        "Columns are means over the weights of a layer; the thin line spans its matrices. Bits count every byte, "
        "adapters too."
    )
    return section("How the budget is spread", note, column_plots(plots, layers))
