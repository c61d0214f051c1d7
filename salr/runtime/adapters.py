"""Switching and scaling the trained adapters of a loaded model.

Invariant: the residual belongs to the weight and is never switched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..formats.errors import AdapterError
from .experts import packed_modules


def set_adapters(model: Any, scales: Mapping[str, float]) -> None:
    """Make exactly these trained adapters active: name -> factor on the scaling it was trained with; {} for none.

    Raises:
        AdapterError: the model has no adapter of that name, or a factor is no finite number.
        TypeError: ``scales`` is no mapping.
    """
    if not isinstance(scales, Mapping):
        raise TypeError(f"scales {scales!r}; needed a mapping from names to factors, as {{'name': 1.0}}")
    known = adapter_names(model)
    for name, factor in scales.items():
        if not math.isfinite(factor):
            raise AdapterError(f"adapter {name!r} with factor {factor}", needed="a finite number")
        if name not in known:
            raise AdapterError(f"adapter {name!r}", needed="one of " + (", ".join(known) or "none: the model has none"))
    for _, module in packed_modules(model):
        module.set_adapters(scales)


def adapter_names(model: torch.nn.Module) -> list[str]:
    """Return the trained adapters of a loaded model."""
    return sorted({name for _, module in packed_modules(model) for name in module.adapter_names})
