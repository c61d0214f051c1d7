"""What a method is given and what it returns.

Invariant: factors in a solution are rounded to the dtype they are stored in, so that kept values computed after them
make up for that rounding too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..prune import Groups, keep_in_groups, keep_roughly


@dataclass(frozen=True)
class Problem:
    """One matrix to approximate by kept values plus a low-rank product.

    ``weight`` (N, K) float32 is W0, or what calibration puts in its place. ``n_kept`` of it may stay, chosen within
    ``groups``. ``gram`` (K, K) float32 is sum x x^T over calibration inputs, None without data. ``dtype`` is what
    values and factors are stored in. ``rounds`` bounds the alternation.
    """

    weight: torch.Tensor
    n_kept: int
    groups: Groups
    rank: int
    rounds: int
    dtype: torch.dtype
    gram: torch.Tensor | None = None

    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mask (N, K) of the largest ``scores``."""
        return keep_in_groups(scores, self.n_kept, self.groups)

    def keep_entries(self, matrix: torch.Tensor) -> torch.Tensor:
        """Set all but the largest entries of ``matrix`` (N, K) to 0, in place; ties at the boundary all stay."""
        return matrix.mul_(keep_roughly(matrix.abs(), self.n_kept, self.groups))


@dataclass(frozen=True)
class Solution:
    """Mask (N, K); factors lora_B (N, r) and lora_A (r, K) as stored, None for rank 0.

    ``values`` (N, K) float32 holds the kept weights where the mask is set; None where they are the source's own bits.
    """

    mask: torch.Tensor
    lora_B: torch.Tensor | None
    lora_A: torch.Tensor | None
    values: torch.Tensor | None = None


def stored_factors(lora_b: torch.Tensor, lora_a: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Round factors to the dtype of the file."""
    return lora_b.to(dtype), lora_a.to(dtype)
