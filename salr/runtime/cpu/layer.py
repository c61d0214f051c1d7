"""The CPU backend: one layer's output, by the code path and the kernel that suit this machine and this x.

Invariant: the result is that of ``reference.linear`` up to rounding: to float32 sums in another order where x is
float32 or float16, to bfloat16 weights too where x is bfloat16 and has more than 8 rows (see ``panels``).
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from ...formats.errors import SalrError
from ..packed import Adapters, PackedWeight
from . import panels, team, tiles
from .few_rows import few_rows, multiplies_pairs
from .paths import CodePath, chosen
from .prepared import Prepared, prepare

MOST_PASSES_ROWS = {"pairs": 12, "float": 16, "rounded": 8}  # more rows of x than these: by panels or tiles


def linear(
    x: torch.Tensor, weight: PackedWeight, adapters: Adapters | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x W^T + adapters + bias (M, N) in x's dtype for x (M, K); for many calls ``prepare`` once, then ``apply``.

    Raises:
        SalrError: x is not (M, K) on the CPU.
    """
    return apply(prepare(weight, adapters, bias), x)


def apply(layer: Prepared, x: torch.Tensor, path: CodePath | None = None) -> torch.Tensor:
    """Return a prepared layer's output (M, N) in x's dtype for x (M, K), on as many threads as torch uses.

    ``path`` is the code path, the one of ``paths.chosen`` unless given. Layers may be used by several threads at once.

    Raises:
        SalrError: x is not (M, K) on the CPU.
    """
    if x.ndim != 2 or x.shape[1] != layer.n_columns or x.device.type != "cpu":
        raise SalrError(f"x is {tuple(x.shape)} on {x.device}", needed=f"(M, {layer.n_columns}) on cpu")
    path = path or chosen()
    if 0 in (x.shape[0], layer.n_rows):
        return x.new_zeros(x.shape[0], layer.n_rows)
    by_passes = path.lanes > 0 and x.shape[0] <= _most_rows_by_passes(path, layer, x)
    if by_passes:
        return few_rows(path, layer, x, torch.get_num_threads())
    if path.has_bf16_products and x.dtype == torch.bfloat16:
        return panels.many_rows(path, layer, x, torch.get_num_threads())
    return tiles.many_rows(path, layer, x, torch.get_num_threads())


def reason_unusable() -> str | None:
    """Return why this backend cannot run here, None if it can."""
    if chosen().lanes == 0 and find_spec("numba") is None:
        return "numba is not installed and the processor has neither AVX2 nor AVX-512; pip install numba"
    return None


def description() -> str:
    """Return which code path this machine gets, and on whose threads: "AVX2, torch's OpenMP threads"."""
    return f"{chosen().title}, {team.title() if chosen().lanes else 'Python threads'}"


def _most_rows_by_passes(path: CodePath, layer: Prepared, x: torch.Tensor) -> int:
    if layer.operand.matrix.encoding == "bf16" and multiplies_pairs(path, layer, x):
        return MOST_PASSES_ROWS["pairs"]
    return MOST_PASSES_ROWS["rounded" if path.has_bf16_products and x.dtype == torch.bfloat16 else "float"]
