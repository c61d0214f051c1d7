"""Singular values of the residual adapters, from the factors as stored.

Invariant: the dense product is never formed: B = Q_b R_b and A^T = Q_a R_a give the singular values of R_b S R_a^T,
an r x r matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..formats.dtypes import F32Array
from ..formats.manifest import RESIDUAL
from ..formats.reader import SalrFile
from .report_data import ModuleRow, kinds

_MOST_MODULES = 48
_MOST_EXPERTS = 2


@dataclass(frozen=True)
class Decay:
    """Singular values of one kind of layer over its modules, as shares of each module's largest.

    ``low``, ``median`` and ``high`` (r,) are the 10 %, 50 % and 90 % quantiles; ``half_energy`` is the median number
    of leading values that hold half of the sum of squares.
    """

    kind: str
    n_modules: int
    low: tuple[float, ...]
    median: tuple[float, ...]
    high: tuple[float, ...]
    half_energy: int


def residual_decay(file: SalrFile, rows: Sequence[ModuleRow]) -> list[Decay]:
    """Return the decay of each kind that has residuals; of many modules of a kind, evenly chosen ones are looked at."""
    found = []
    for kind in kinds(rows):
        chosen = [row.name for row in rows if row.kind == kind and row.rank]
        step = -(-len(chosen) // _MOST_MODULES) or 1
        values = [v for name in chosen[::step] for v in _values_of(file, name) if v[0] > 0]
        if values:
            found.append(_decay(kind, values))
    return found


def _values_of(file: SalrFile, module: str) -> list[F32Array]:
    """Return the singular values (r,), falling, of a module's residual; of stacked experts, those of the first ones."""
    stack = file.adapters(module, [RESIDUAL])
    lora_a, lora_b = (f.reshape(-1, *f.shape[-2:])[:_MOST_EXPERTS] for f in (stack.lora_A, stack.lora_B))
    return [singular_values(a, b * stack.scaling) for a, b in zip(lora_a, lora_b, strict=True)]


def singular_values(lora_a: F32Array, lora_b: F32Array) -> F32Array:
    """Return the singular values (r,), falling, of lora_b (N, r) times lora_a (r, K)."""
    upper_b, upper_a = (np.asarray(np.linalg.qr(factor, mode="r")) for factor in (lora_b, lora_a.T))
    values: F32Array = np.linalg.svd(upper_b @ upper_a.T, compute_uv=False)
    return values


def _decay(kind: str, values: list[F32Array]) -> Decay:
    longest = max(v.size for v in values)
    shares = np.full((len(values), longest), np.nan)
    for row, v in zip(shares, values, strict=True):
        row[: v.size] = v / v[0]
    low, median, high = (tuple(map(float, q)) for q in np.nanquantile(shares, (0.1, 0.5, 0.9), axis=0))
    halves = [int(np.searchsorted(np.cumsum(v**2), (v**2).sum() / 2)) + 1 for v in values]
    return Decay(kind, len(values), low, median, high, int(np.median(halves)))
