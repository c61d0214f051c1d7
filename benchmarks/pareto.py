"""Which recipe is best at which size? Perplexity (or embedding cosine) over bits per packed weight, adapters counted.

    python benchmarks/pareto.py MODEL --data DIR [--device cuda] [--json FILE] [--plot FILE] [--only REGEX]
    python benchmarks/pareto.py MODEL --text FILE [--json FILE] [--plot FILE]      # an encoder: embedding cosine

Ours are judged from the finished .salr file. Beside them: int8, nf4, int4 and int3 by rounding and by GPTQ, and pruning
alone; losing points are shown. A row that is in FILE already is not measured again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from dense_quantization import GRIDS, write_rounded
from minilm import LENGTH, N_SENTENCES, embeddings, sentences
from quality import Bench, bench_parser
from salr.converter.module_options import PRESETS, ModuleOptions
from salr.converter.options import CalibrationOptions, ConvertOptions

PART = "pareto"


def recipes() -> dict[str, dict[str, Any]]:
    """Return what to convert with, by name; all calibrated unless they say otherwise."""
    found: dict[str, dict[str, Any]] = {}

    def add(sparsity: float, values: str, rank: int, group: int = 128, factors: str = "int8", **more: Any) -> None:
        settings = ModuleOptions(sparsity, rank, values, group, factors)
        label = f"{sparsity:.0%} {values} g{group} r{rank}" + (f" {factors} factors" if rank else "")
        extra = "".join(f", {value}" for value in more.values())
        found[f"joint {label}{extra}"] = {"module": settings, **more}

    for sparsity, rank in ((0.0, 0), (0.2, 32), (0.3, 32), (0.3, 64), (0.5, 64)):
        add(sparsity, "int8", rank)
    add(0.5, "int8", 64, factors="source")
    for sparsity, rank, group in (
        (0.0, 0, 64), (0.0, 7, 128), (0.0, 16, 64), (0.0, 32, 128), (0.1, 8, 128), (0.2, 16, 128), (0.3, 16, 128),
        (0.45, 0, 128), (0.5, 0, 128), (0.5, 8, 128), (0.5, 16, 128), (0.5, 64, 128), (0.6, 16, 128),
    ):  # fmt: skip
        add(sparsity, "nf4", rank, group)
    add(0.5, "nf4", 16, pattern="2:4")
    add(0.5, "int8", 16, pattern="2:4")
    for preset, settings in PRESETS.items():
        found[f"preset {preset}"] = {"module": settings}
        found[f"preset {preset}, no text"] = {"module": settings, "calibration": None}
    found["alternating 0% nf4 g128 r7 int8 factors, no text"] = {
        "module": ModuleOptions(0.0, 7, "nf4", 128, "int8"),
        "calibration": None,
    }
    found["paper 50% nf4 g64 r64 (QSALR)"] = {
        "module": ModuleOptions(0.5, 64, "nf4", 64),
        "method": "magnitude",
        "calibration": None,
    }
    for target in (12.0, 8.3, 6.0, 4.8, 4.3, 3.5, 3.0):
        found[f"solver {target:g} bits"] = {"target_bits": target}
    for sparsity in (0.3, 0.5):
        found[f"magnitude {sparsity:.0%} alone"] = {
            "module": ModuleOptions(sparsity, 0),
            "method": "magnitude",
            "calibration": None,
        }
    return found


class ParetoBench(Bench):
    """Judges a language model by perplexity, or an encoder by the cosine of its embeddings."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.is_encoder = args.text is not None
        if self.is_encoder:
            texts = sentences(args.text)
            self.judged = texts[:N_SENTENCES]
            self.calibration_text = self.folder / "calibration.txt"
            self.calibration_text.write_text("\n".join(texts[N_SENTENCES:]), encoding="utf-8")
            self.original = embeddings(args.model, self.judged)

    def calibration(self) -> CalibrationOptions:
        """Return the text that recipes are calibrated on."""
        if self.is_encoder:
            return CalibrationOptions(str(self.calibration_text), samples=self.args.samples, length=LENGTH)
        return self.text()

    def judge(self, path: Path) -> dict[str, float]:
        """Return the quality of a model on disk."""
        if not self.is_encoder:
            return self.perplexities(path)
        cosine = (embeddings(path, self.judged) * self.original).sum(1)
        return {"cosine": float(cosine.mean()), "cosine_1_percentile": float(cosine.quantile(0.01))}

    def recipe(self, name: str, options: dict[str, Any]) -> None:
        """Measure one of ours."""

        def measure() -> dict[str, Any]:
            out, facts = self.convert(self.args.model, **{"calibration": self.calibration(), **options})
            return {**facts, **self.judge(out)}

        self.row(PART, name, measure)

    def neighbour(self, name: str, use_gptq: bool) -> None:
        """Measure a dense grid."""
        grid, options = GRIDS[name], ConvertOptions(calibration=self.calibration(), device=self.args.device)

        def measure() -> dict[str, Any]:
            out = write_rounded(self.args.model, self.folder / "rounded", grid, options, use_gptq=use_gptq)
            return {"bits": grid.bits, **self.judge(out)}

        self.row(PART, f"{'GPTQ' if use_gptq else 'dense'} {name} g{grid.group}", measure)


FAMILIES: tuple[tuple[str, Callable[[str], bool], str], ...] = (
    ("solver (--target-bits)", lambda name: name.startswith("solver"), "black"),
    ("sparse + low-rank, nf4 values", lambda name: name.startswith("joint") and "nf4" in name, "tab:blue"),
    ("sparse + low-rank, int8 values", lambda name: name.startswith("joint") and "int8 g" in name, "tab:green"),
    ("presets", lambda name: name.startswith("preset") and "no text" not in name, "tab:purple"),
    ("presets, no text", lambda name: name.endswith("no text"), "tab:pink"),
    ("dense, rounded", lambda name: name.startswith("dense "), "tab:red"),
    ("dense, GPTQ", lambda name: name.startswith("GPTQ"), "tab:orange"),
    ("the paper, and pruning alone", lambda name: name.startswith(("paper", "magnitude")), "tab:grey"),
)


def draw(bench: ParetoBench, path: Path) -> None:
    """Draw all rows, one colour a family; points beyond the frame stand at its edge with their figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    key, edge = ("cosine", 0.9) if bench.is_encoder else ("wikitext2", 50.0)
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    n_beyond = 0
    for family, belongs, colour in FAMILIES:
        rows = sorted((row for row in bench.rows if belongs(row["name"])), key=lambda row: row["bits"])
        inside = [max(row[key], edge) if bench.is_encoder else min(row[key], edge) for row in rows]
        line = "-" if family.startswith("solver") else ""
        axes.plot([row["bits"] for row in rows], inside, "o", linestyle=line, color=colour, label=family, markersize=5)
        for row, height in zip(rows, inside, strict=True):
            if height == edge:
                place, n_beyond = (4, (1 if bench.is_encoder else -1) * (6 + 9 * n_beyond) - 4), n_beyond + 1
                note = f"{row[key]:.3g} {row['name']}"
                axes.annotate(note, (row["bits"], height), place, textcoords="offset points", fontsize=7)
    if not bench.is_encoder:
        axes.set(yscale="log", ylim=(20.5, edge))
        axes.set_yticks([21, 22, 24, 26, 30, 35, 40, 50], [21, 22, 24, 26, 30, 35, 40, 50])
        axes.minorticks_off()
    axes.set(
        xlabel="bits per packed weight, adapters counted", ylabel="WikiText-2 perplexity" if key != "cosine" else key
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run from the command line."""
    parser = bench_parser(__doc__)
    judge = parser.add_mutually_exclusive_group(required=True)
    judge.add_argument("--data", type=Path, help="a language model: WikiText-2 and GSM8K, as for quality.py")
    judge.add_argument("--text", type=Path, help="an encoder: a text whose paragraphs are the sentences")
    bench = ParetoBench(parser.parse_args())
    torch.manual_seed(0)
    bench.row(PART, "original", lambda: {"bits": 16.0, **bench.judge(bench.args.model)})
    for name in GRIDS:
        for use_gptq in (False, True):
            bench.neighbour(name, use_gptq)
    for name, options in recipes().items():
        bench.recipe(name, options)
    if bench.args.plot:
        draw(bench, bench.args.plot)


if __name__ == "__main__":
    main()
