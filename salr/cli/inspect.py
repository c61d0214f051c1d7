"""`salr inspect`: what .salr files hold, how large they are, and how far they are from their sources."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..formats.errors import OptionError
from ..formats.reader import SalrFile
from . import console
from .eval import check_report
from .table import show_table

if TYPE_CHECKING:
    from ..converter.report import ErrorReport
    from ..evaluation.report_data import Headline


def inspect(
    paths: Annotated[list[Path], typer.Argument(metavar="FILE", help=".salr files; several: side by side.")],
    modules: Annotated[bool, typer.Option("--modules", help="One row a packed module.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="PAGE.html", help="Write a page with plots.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE.json", help="Results of eval --save, for the page.")
    ] = None,
    as_json: console.Json = False,
) -> None:
    """Show sizes, errors and adapters of FILE; several files side by side; --html makes a page to show."""
    if len(paths) > 1 and (modules or html is not None):
        raise OptionError(f"{len(paths)} files", needed="one file with --modules or --html")
    if evaluation is not None and html is None:
        raise OptionError("--eval without --html", needed="--html PAGE.html beside it")
    if html is not None and as_json:
        raise OptionError("--html and --json", needed="one of them")
    if html is not None:
        return write_page(paths[0], html, evaluation)
    if len(paths) > 1:
        return compare(paths, as_json)
    file = SalrFile(paths[0])
    return console.say_json(file_as_json(file)) if as_json else show_file(file, modules)


def option_text(key: str, value: Any) -> str:
    """Return a recorded option in a few words."""
    if key == "set":
        return f"({len(value)} overrides)"
    if key == "calibration" and isinstance(value, dict):
        return f"{value.get('samples')} x {value.get('length')} tokens of {value.get('kind')}"
    return str(value)


def show_file(file: SalrFile, modules: bool) -> None:
    """Print what one file holds."""
    source, options = file.manifest.source, file.manifest.options
    console.say(
        f"{file.path.name}   {source.get('architecture') or 'no model class'}   made by {file.manifest.generator}"
    )
    shard = file.manifest.shard
    if shard is not None:
        console.say(f"shard                   {shard[0]} of {shard[1]}: the others are not looked at")
    recipe = ", ".join(f"{key} {option_text(key, value)}" for key, value in options.items() if value not in ([], None))
    console.say(f"recipe                  {recipe}")
    for line in (*summary_lines(file), *adapter_lines(file)):
        console.say(line)
    console.say(f"assets                  {', '.join(file.assets)}")
    if modules:
        show_modules(file)
    else:
        console.say(f"modules                 {len(file.modules)} (--modules lists them)")


def write_page(path: Path, html: Path, evaluation: Path | None) -> None:
    """Write the page of one file."""
    from ..evaluation.report_html import write_report
    from ..evaluation.results import results_of

    check_report(html, ".html")
    file = SalrFile(path)
    write_report(file, html, results_of(file, evaluation) if evaluation is not None else None)
    console.say(f"wrote {html}")


def compare(paths: list[Path], as_json: bool) -> None:
    """Print the headline numbers of several files side by side."""
    from ..evaluation.report_data import headline

    found = [headline(SalrFile(path)) for path in paths]
    if as_json:
        return console.say_json({"files": [asdict(numbers) for numbers in found]})
    names = [path.name for path in paths]
    titles = names if len(set(names)) == len(names) else [str(path) for path in paths]
    lines = [comparison_lines(numbers) for numbers in found]
    return show_table(["", *titles], [[name, *(each[name] for each in lines)] for name in lines[0]])


def comparison_lines(numbers: Headline) -> dict[str, str]:
    """Return one column of the comparison: line -> cell."""
    mb, low, high = console.megabytes, *numbers.ranks
    return {
        "architecture": numbers.architecture,
        "method": numbers.method,
        "source": mb(numbers.source_bytes),
        "file": mb(numbers.file_bytes),
        "ratio": f"{numbers.ratio:.2f}x",
        "packed weights": f"{console.count(numbers.packed_weights)} in {numbers.n_modules}",
        "packed bytes": mb(numbers.packed_bytes),
        "bits/weight": f"{numbers.bits_per_weight:.2f}",
        "without adapters": f"{numbers.bits_without_adapters:.2f}",
        "removed": console.percent(numbers.sparsity),
        "residual rank": str(low) if low == high else f"{low} to {high}",
        "residual adapters": mb(numbers.residual_bytes),
        "trained adapters": mb(numbers.adapter_bytes),
        "kept dense": mb(numbers.kept_bytes),
        "error, mask": f"{100 * numbers.error_mask:.2f} %",
        "error, with residual": f"{100 * numbers.error_residual:.2f} %",
        "bound": "" if numbers.error_bound is None else f"{100 * numbers.error_bound:.2f} %",
        "output error, median": "" if numbers.error_output is None else f"{100 * numbers.error_output:.2f} %",
    }


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
        f"error (share of |W|^2)  {_errors(error)}",
        f"worst modules           {worst}",
    ]


def _errors(error: ErrorReport) -> str:
    """Return the errors in words."""
    mask, remaining = console.percent(error.mask), console.percent(error.residual)
    older = f"   ({error.before})" if error.before else ""
    if error.bound is None:
        return f"mask {mask} -> with residual and rounded values {remaining}{older}"
    return f"mask {mask} -> with residual {remaining}   bound {console.percent(error.bound)}{older}"


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
    from ..converter.report import bound_of

    table = Table("module", "shape", "removed", "pattern", "values", "rank", box=None, pad_edge=False)
    for title in ("mask error", "with residual", "bound"):
        table.add_column(title, justify="right")
    for name, entry in file.modules.items():
        shares = entry.error.mask, entry.error.residual, bound_of(entry)
        table.add_row(
            name,
            "x".join(map(str, entry.shape)),
            console.percent(1 - entry.nnz / entry.n_weights),
            entry.pattern,
            entry.encoding,
            "+".join(str(adapter.rank) for adapter in entry.adapters) or "0",
            *("" if share is None else f"{100 * share:.2f} %" for share in shares),
        )
    console.out.print(table)


def file_as_json(file: SalrFile) -> dict[str, Any]:
    """Return everything the text shows, and the modules, as JSON values."""
    from ..converter.report import bound_of, error_report, size_report

    sizes = size_report(file)
    modules = {name: asdict(entry) for name, entry in file.modules.items()}
    for name, entry in file.modules.items():
        modules[name]["error"]["bound"] = bound_of(entry)
    return {
        "path": str(file.path),
        "generator": file.manifest.generator,
        "source": file.manifest.source,
        "options": file.manifest.options,
        "environment": file.manifest.environment,
        "sizes": {**asdict(sizes), "bits_per_weight": sizes.bits_per_weight, "packed_bytes": sizes.packed_bytes},
        "error": asdict(error_report(file.modules)),
        "modules": modules,
        "assets": file.assets,
        "dense_tensors": file.dense_tensors(),
    }
