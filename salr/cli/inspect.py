"""`salr inspect`: what a .salr file holds, how large it is, and how far it is from its source."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..formats.reader import SalrFile
from . import console


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .salr file.")],
    modules: Annotated[bool, typer.Option("--modules", help="One row a packed module.")] = False,
    as_json: console.Json = False,
) -> None:
    """Show sizes, errors and adapters of FILE; --modules adds a table."""
    file = SalrFile(path)
    if as_json:
        return console.say_json(file_as_json(file))
    source = file.manifest.source
    console.say(f"{path.name}   {source.get('architecture') or 'no model class'}   made by {file.manifest.generator}")
    options = file.manifest.options
    console.say(f"recipe                  {', '.join(f'{k} {v}' for k, v in options.items() if v not in ([], None))}")
    for line in summary_lines(file):
        console.say(line)
    adapters = adapter_lines(file)
    for line in adapters:
        console.say(line)
    console.say(f"assets                  {', '.join(file.assets)}")
    if modules:
        show_modules(file)
    else:
        console.say(f"modules                 {len(file.modules)} (--modules lists them)")
    return None


def summary_lines(file: SalrFile) -> list[str]:
    """Return sizes and errors in a few lines."""
    from ..converter.report import error_report, size_report, worst_modules

    sizes, error, mb = size_report(file), error_report(file.modules), console.megabytes
    parts = {
        "kept values": sizes.values_bytes,
        "bitmap": sizes.bitmap_bytes,
        "row offsets": sizes.row_offsets_bytes,
        "scales": sizes.scales_bytes,
        "residual adapters": sizes.residual_bytes,
        "trained adapters": sizes.adapter_bytes,
    }
    worst = ", ".join(f"{name} {console.percent(share)}" for name, share in worst_modules(file.modules))
    return [
        f"packed weights          {mb(sizes.packed_source_bytes)} -> {mb(sizes.packed_bytes)}   "
        f"{sizes.bits_per_weight:.2f} bits/weight ({sizes.bits_without_adapters:.2f} without adapters)",
        "  " + "   ".join(f"{name} {mb(n_bytes)}" for name, n_bytes in parts.items() if n_bytes),
        f"kept dense              {mb(sizes.kept_bytes)}   {len(file.dense_tensors())} tensors",
        f"header, manifest, gaps  {mb(sizes.overhead_bytes)}   assets {mb(sizes.asset_bytes)}",
        f"total                   {mb(sizes.source_bytes)} -> {mb(sizes.file_bytes)}   "
        f"{sizes.file_bytes / sizes.source_bytes:.2f}x",
        f"error (share of |W|^2)  mask {console.percent(error.mask)} -> with residual {console.percent(error.residual)}"
        f"   bound {console.percent(error.bound)}",
        f"worst modules           {worst}",
    ]


def adapter_lines(file: SalrFile) -> list[str]:
    """Return one line a trained adapter: its name, modules, ranks and scaling."""
    found: dict[str, list[tuple[int, float]]] = {}
    for entry in file.modules.values():
        for adapter in entry.adapters:
            found.setdefault(adapter.name, []).append((adapter.rank, adapter.scaling))
    lines = []
    for name, uses in sorted(found.items()):
        ranks = sorted({rank for rank, _ in uses})
        scalings = sorted({scaling for _, scaling in uses})
        lines.append(
            f"adapter {name:<15} {len(uses)} modules, rank {'-'.join(map(str, (ranks[0], ranks[-1])[: len(ranks)]))}, "
            f"scaling {', '.join(f'{scaling:g}' for scaling in scalings[:4])}"
        )
    return lines


def show_modules(file: SalrFile) -> None:
    """Print a table with one row a packed module."""
    table = Table("module", "shape", "removed", "pattern", "values", "rank", box=None, pad_edge=False)
    for title in ("mask error", "with residual", "bound"):
        table.add_column(title, justify="right")
    for name, entry in file.modules.items():
        table.add_row(
            name,
            "x".join(map(str, entry.shape)),
            console.percent(1 - entry.nnz / entry.n_weights),
            entry.pattern,
            entry.encoding,
            "+".join(str(adapter.rank) for adapter in entry.adapters) or "0",
            *(f"{100 * share:.2f} %" for share in (entry.error.mask, entry.error.residual, entry.error.bound)),
        )
    console.out.print(table)


def file_as_json(file: SalrFile) -> dict[str, Any]:
    """Return everything the text shows, and the modules, as JSON values."""
    from ..converter.report import error_report, size_report

    sizes = size_report(file)
    return {
        "path": str(file.path),
        "generator": file.manifest.generator,
        "source": file.manifest.source,
        "options": file.manifest.options,
        "environment": file.manifest.environment,
        "sizes": {**asdict(sizes), "bits_per_weight": sizes.bits_per_weight, "packed_bytes": sizes.packed_bytes},
        "error": asdict(error_report(file.modules)),
        "modules": {name: asdict(entry) for name, entry in file.modules.items()},
        "assets": file.assets,
        "dense_tensors": file.dense_tensors(),
    }
