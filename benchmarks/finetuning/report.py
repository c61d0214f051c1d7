"""The tables of quality, in Markdown.

Invariant: a figure with +- is mean and standard deviation over the seeds at the variant's best rate; every run made
stands in the second table, losing ones included.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from .schedule import Results, best_rate
from .variants import SEEDS, VARIANTS, Variant

COMPARED = (
    (
        "LoSA (ICLR 2025)",
        "not run: it chooses sparsity and ranks while it trains, on models of 7B and more. Published: LLaMA-2-7B "
        "pruned and tuned in 45 minutes on an A100, perplexity 68.73 lower than pruned alone (arXiv 2502.14816)",
    ),
    (
        "SparseLoRA (ICML 2025)",
        "not run: it skips channels of a base that stays dense, with kernels for models of 7B and more. Published: "
        "up to 2.2x less computation and 1.6x faster training at LoRA's accuracy (PMLR 267)",
    ),
    (
        "DeepSparse (sparse fine-tuning, 2023)",
        "not run: it trains all weights with distillation and serves on CPUs. Published: MPT text generation at "
        "75 % sparsity without a drop of accuracy (arXiv 2310.06927, abstract)",
    ),
)
HEAD = ("variant", "trained", "rate", "seeds", "answer NLL before", "after", "x dense", "exact match, %",
        "perplexity before", "after", "x dense", "train s")  # fmt: skip
RUN_HEAD = (
    "variant",
    "rates",
    "seed",
    "held-out NLL",
    "test NLL",
    "perplexity",
    "exact match, %",
    "train s",
    "peak GB",
)


def print_report(results: Results) -> None:
    """Print both tables."""
    protocol = {name: value for name, value in results.of("protocol")[0].items() if name != "kind"}
    print(f"\nprotocol: {protocol}; steps: {sorted({row['steps'] for row in results.of('run')})}")
    for row in results.of("environment"):
        print(", ".join(f"{name} {value}" for name, value in row.items() if name != "kind"))
    print()
    before = {row["base"]: row for row in results.of("before")}
    chosen = {variant: at_best(variant, results) for variant in VARIANTS}
    reference = chosen[VARIANTS[0]]
    rows = [summary(variant, chosen[variant], before.get(variant.base), reference) for variant in VARIANTS]
    rows += [[name, reason] + ["-"] * (len(HEAD) - 2) for name, reason in COMPARED]
    print(table(HEAD, rows))
    print("\nevery run:\n")
    print(table(RUN_HEAD, [run_row(row) for variant in VARIANTS for row in results.runs(variant).values()]))
    bases = [f"{row['base']} {row['bits']} bits, {row['convert_s']} s" for row in results.of("base")]
    print("\nconverted: " + ("; ".join(bases) or "nothing"))


def at_best(variant: Variant, results: Results) -> list[dict[str, Any]]:
    """Return the runs of a variant at its best rate, by seed."""
    runs = results.runs(variant)
    rate = best_rate(variant, runs)
    return [runs[key] for key in ((rate, seed) for seed in SEEDS) if rate is not None and key in runs]


def summary(
    variant: Variant, runs: Sequence[dict[str, Any]], before: dict[str, Any] | None, reference: Sequence[dict[str, Any]]
) -> list[str]:
    """Return a variant's line of the first table."""
    if not runs:
        return [variant.name] + ["not run"] + ["-"] * (len(HEAD) - 2)
    return [
        variant.name, f"{runs[0]['trained'] / 1e6:.2f}M", rates_of(runs[0]),
        str(len(runs)), f"{before['test_nll']:.3f}" if before else "-", spread(runs, "test_nll", 4),
        ratio(runs, reference, "test_nll"), exact_of(runs),
        f"{before['perplexity']:.2f}" if before else "-", spread(runs, "perplexity", 2),
        ratio(runs, reference, "perplexity"), f"{statistics.median(row['train_s'] for row in runs):.0f}",
    ]  # fmt: skip


def exact_of(runs: Sequence[dict[str, Any]]) -> str:
    """Return exact match over the seeds, with the binomial standard error of a single run."""
    measured = [row for row in runs if "exact" in row]
    if not measured:
        return "-"
    error = 100 * statistics.fmean(row["exact_se"] for row in measured)
    return f"{mean_and_deviation([100 * row['exact'] for row in measured], 2)} (SE of one {error:.2f})"


def spread(runs: Sequence[dict[str, Any]], key: str, digits: int) -> str:
    """Return mean and deviation of a figure over the seeds."""
    return mean_and_deviation([row[key] for row in runs], digits)


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    """Return ``mean +- deviation``, the mean alone of a single value."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} +- {statistics.stdev(values):.{digits}f}"


def ratio(runs: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], key: str) -> str:
    """Return the means' ratio to dense + LoRA's."""
    if not reference:
        return "-"
    return f"{statistics.fmean(row[key] for row in runs) / statistics.fmean(row[key] for row in reference):.3f}"


def rates_of(row: dict[str, Any]) -> str:
    """Return a run's rates: of the adapters, and where the residual has others, their range."""
    others = [rate for rate in row["rates"] if rate != row["rate"]]
    if not others:
        return f"{row['rate']:.3g}"
    lowest, highest = min(others), max(others)
    return f"{row['rate']:.3g}, residual {lowest:.3g}" + (f" to {highest:.3g}" if highest > lowest else "")


def run_row(row: dict[str, Any]) -> list[str]:
    """Return a run's line of the second table."""
    exact = f"{100 * row['exact']:.2f} +- {100 * row['exact_se']:.2f}" if "exact" in row else "-"
    return [
        row["variant"], rates_of(row), str(row["seed"]), f"{row['held_out_nll']:.4f}", f"{row['test_nll']:.4f}",
        f"{row['perplexity']:.2f}", exact, f"{row['train_s']:.0f}", str(row["peak_gb"] or "no GPU"),
    ]  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
