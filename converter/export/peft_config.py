"""adapter_config.json of a PEFT LoRA whose modules may differ in rank and scaling.

Invariant: PEFT reads back each module's rank, and its scaling as alpha / rank (or alpha / sqrt(rank), as it was
trained): the very float64 where one exists that divides to it, which holds for whatever PEFT itself could train, and
otherwise within one unit in the last place.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PeftModule:
    """Rank and scaling of one module, and the alpha it was trained with, None where there was none."""

    rank: int
    scaling: float
    alpha: float | None = None


def adapter_config(
    modules: Mapping[str, PeftModule], *, base: str, is_causal_lm: bool, fan_in_fan_out: bool
) -> dict[str, Any]:
    """Return the configuration of an adapter on ``modules``, which are named as in the transformers model.

    Args:
        base: where the base model is.
        is_causal_lm: whether PEFT may wrap it as a language model.
        fan_in_fan_out: whether the layers are Conv1D, whose weight is (K, N).
    """
    use_rslora = _is_rslora(modules)
    alphas = {name: module.alpha if use_rslora else lora_alpha(module) for name, module in modules.items()}
    rank, _ = Counter(module.rank for module in modules.values()).most_common(1)[0]
    alpha, _ = Counter(alphas.values()).most_common(1)[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal_lm else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {_pattern(name): module.rank for name, module in modules.items() if module.rank != rank},
        "alpha_pattern": {_pattern(name): _plain(own) for name, own in alphas.items() if own != alpha},
        "use_rslora": use_rslora,
        "target_modules": sorted(modules),
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def lora_alpha(module: PeftModule) -> float:
    """Return an alpha that gives the scaling when it is divided by the rank, the trained one where it does."""
    near = module.scaling * module.rank
    candidates = [near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf)]
    candidates = candidates if module.alpha is None else [module.alpha, *candidates]
    return next((alpha for alpha in candidates if alpha / module.rank == module.scaling), near)


def _is_rslora(modules: Mapping[str, PeftModule]) -> bool:
    """Tell whether all scalings are alpha / sqrt(rank) and not all are alpha / rank."""
    known = [module for module in modules.values() if module.alpha is not None]
    roots = [m.alpha / math.sqrt(m.rank) == m.scaling for m in known if m.alpha is not None]
    plain = [m.alpha / m.rank == m.scaling for m in known if m.alpha is not None]
    return len(known) == len(modules) and all(roots) and not all(plain)


def _pattern(name: str) -> str:
    """Return the regular expression that PEFT matches with this module alone."""
    return f"^{re.escape(name)}"


def _plain(alpha: float | None) -> float | int | None:
    """Return a whole number as an int, as PEFT's own configurations have it."""
    return int(alpha) if alpha is not None and float(alpha).is_integer() else alpha
