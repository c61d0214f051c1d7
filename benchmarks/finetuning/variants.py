"""The variants compared: which base, how many trained parameters, and what happens to the residual."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salr.converter.module_options import ModuleOptions
from salr.converter.options import CalibrationOptions, ConvertOptions

import salr

RATES = (2e-3, 4e-3, 1e-3)
SGD_RATES = (0.3, 1.0, 0.1)
SEEDS = (0, 1, 2)
RESIDUAL_RANK = 64
FROZEN, SHARED, OWN = "frozen", "shared", "own"


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    ``base`` is a key of BASES, or ``dense``. ``residual``: None where the base has none, or how it is trained: frozen,
    at the adapters' rate (shared), or at what `salr.param_groups` chooses for it (own).
    """

    name: str
    base: str
    rank: int = 16
    residual: str | None = None
    optimizer: str = "adamw"

    @property
    def rates(self) -> tuple[float, ...]:
        """The bracket of adapters' learning rates, the likeliest first."""
        return RATES if self.optimizer == "adamw" else SGD_RATES

    @property
    def model_key(self) -> tuple[str, int, bool]:
        """What has to be alike for two runs to share a model in memory."""
        return self.base, self.rank, self.residual in (SHARED, OWN)


def _salr(base: str, mask: str, residual: str, name: str) -> Variant:
    return Variant(f"SALR, {mask}, residual {name}", base, residual=residual)


#: by importance: a time limit cuts from the end
VARIANTS = (
    Variant("dense + LoRA, rank 16", "dense"),
    _salr("calibrated", "calibrated", OWN, "at a tenth of the rate"),
    _salr("calibrated", "calibrated", SHARED, "at the same rate"),
    _salr("calibrated", "calibrated", FROZEN, "frozen"),
    Variant("nf4 + LoRA, rank 16 (QLoRA)", "nf4"),
    Variant("magnitude-pruned + LoRA, rank 16", "pruned"),
    _salr("free", "data-free", OWN, "at a tenth of the rate"),
    _salr("free", "data-free", FROZEN, "frozen"),
    _salr("free", "data-free", SHARED, "at the same rate"),
    _salr("paper", "the paper's mask", OWN, "at a tenth of the rate"),
    _salr("paper", "the paper's mask", FROZEN, "frozen"),
    _salr("paper", "the paper's mask", SHARED, "at the same rate"),
    Variant("dense + LoRA, rank 80", "dense", rank=80),
    Variant("magnitude-pruned + LoRA, rank 80", "pruned", rank=80),
    Variant("SALR, calibrated, residual at Theorem 4's rate, SGD", "calibrated", residual=OWN, optimizer="sgd"),
    Variant("SALR, calibrated, residual at the same rate, SGD", "calibrated", residual=SHARED, optimizer="sgd"),
)
BASES = ("calibrated", "nf4", "pruned", "free", "paper")


def conversion(base: str, data: Path, device: str, rounds: int | None, samples: int) -> ConvertOptions:
    """Return the options that make a base; ``rounds`` and ``samples`` are lowered for a quick look only."""
    half = ModuleOptions(0.5, RESIDUAL_RANK)
    text = CalibrationOptions(str(data / "wt2_valid.txt"), samples=samples)
    chosen: dict[str, dict[str, Any]] = {
        "calibrated": {"module": half, "calibration": text},
        "nf4": {"module": ModuleOptions(0.0, 0, "nf4", 64), "method": "magnitude"},
        "pruned": {"module": ModuleOptions(0.5, 0), "method": "magnitude"},
        "free": {"module": half},
        "paper": {"module": half, "method": "magnitude"},
    }
    more = {} if rounds is None else {"rounds": rounds}
    return ConvertOptions(**chosen[base], **more, device=device, force=True)


def convert(base: str, model: Path, out: Path, options: ConvertOptions) -> dict[str, Any]:
    """Make one base, and return its seconds and bits a packed weight."""
    report = salr.convert(model, out, options)
    bits = 8 * report.sizes.packed_bytes / report.sizes.packed_weights
    return {"kind": "base", "base": base, "convert_s": round(report.seconds, 1), "bits": round(bits, 3)}
