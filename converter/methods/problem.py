"""What a method is given and what it returns.

Invariant: factors and quantized values in a solution are rounded as they are stored, so that whatever is computed after
them makes up for that rounding too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .prune import Groups, keep_in_groups, keep_roughly
from .quantization import Quantized, Quantizer, nearest
from .weighted import minus_product


class Factors(NamedTuple):
    """Factors as stored: lora_B (N, r), lora_A (r, K), and rank_scales (r,) float32 where they are int8."""

    lora_B: torch.Tensor
    lora_A: torch.Tensor
    rank_scales: torch.Tensor | None = None

    def scaled_b(self) -> torch.Tensor:
        """Return B with the scales of its ranks, so that the product with A is the update."""
        return self.lora_B if self.rank_scales is None else self.lora_B * self.rank_scales

    def to_cpu(self) -> Factors:
        """Return the same in this machine's memory."""
        scales = None if self.rank_scales is None else self.rank_scales.cpu()
        return Factors(self.lora_B.cpu(), self.lora_A.cpu(), scales)

    def subtracted(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W - B A (N, K) in float32."""
        return minus_product(weight, self.scaled_b(), self.lora_A)


@dataclass(frozen=True)
class Problem:
    """One matrix to approximate by kept values plus a low-rank product.

    ``weight`` (N, K) float32 is W0, or what calibration puts in its place. ``n_kept`` of it may stay, chosen within
    ``groups``. ``gram`` (K, K) float32 is sum x x^T over calibration inputs, None without data. ``dtype`` is what
    values are stored in unless ``quantizer`` encodes them, ``factor_dtype`` what factors are (None: the same), int8
    included. ``rounds`` bounds the alternation.
    """

    weight: torch.Tensor
    n_kept: int
    groups: Groups
    rank: int
    rounds: int
    dtype: torch.dtype
    gram: torch.Tensor | None = None
    quantizer: Quantizer | None = None
    factor_dtype: torch.dtype | None = None

    @property
    def keeps_all(self) -> bool:
        """Nothing is pruned."""
        return self.n_kept == self.weight.numel()

    def keep(self, scores: torch.Tensor) -> torch.Tensor:
        """Return the mask (N, K) of the largest ``scores``."""
        return keep_in_groups(scores, self.n_kept, self.groups)

    def keep_entries(self, matrix: torch.Tensor) -> torch.Tensor:
        """Set all but the largest entries of ``matrix`` (N, K) to 0, in place; ties at the boundary all stay."""
        return matrix.mul_(keep_roughly(matrix.abs(), self.n_kept, self.groups))

    def quantized(
        self, values: torch.Tensor, mask: torch.Tensor, importance: torch.Tensor | None = None
    ) -> Quantized | None:
        """Return the kept of ``values`` (N, K) as nearest codes, or None where values are not quantized."""
        return None if self.quantizer is None else nearest(values, mask, self.quantizer, importance)

    def factors(self, lora_b: torch.Tensor, lora_a: torch.Tensor) -> Factors:
        """Round factors as they are stored."""
        return stored_factors(lora_b, lora_a, self.factor_dtype or self.dtype)


@dataclass(frozen=True)
class Solution:
    """Mask (N, K), and factors as stored, None for rank 0.

    ``values`` (N, K) holds the kept weights where the mask is set, in float32 or as codes; None where they are the
    source's own bits.
    """

    mask: torch.Tensor
    factors: Factors | None = None
    values: torch.Tensor | Quantized | None = None


def stored_factors(lora_b: torch.Tensor, lora_a: torch.Tensor, dtype: torch.dtype) -> Factors:
    """Round factors to a dtype; int8 symmetrically, each column of B and row of A by its own largest entry."""
    if dtype != torch.int8:
        return Factors(lora_b.to(dtype), lora_a.to(dtype))
    scale_b, scale_a = lora_b.abs().amax(0) / 127, lora_a.abs().amax(1) / 127
    codes_b = torch.where(scale_b > 0, lora_b / scale_b, 0.0).round().to(torch.int8)
    codes_a = torch.where(scale_a[:, None] > 0, lora_a / scale_a[:, None], 0.0).round().to(torch.int8)
    return Factors(codes_b, codes_a, scale_b * scale_a)
