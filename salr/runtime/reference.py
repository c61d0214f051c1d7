"""The reference backend: decode the weight in torch, then a float32 product. Every other backend is held against it."""

from __future__ import annotations

import torch

from ..formats.values import NF4_CODE_BOOK
from .packed import Adapters, PackedWeight


def linear(
    x: torch.Tensor, weight: PackedWeight, adapters: Adapters | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x W^T + adapters + bias (M, N) in x's dtype for x (M, K), computed in float32."""
    wide = x.float()
    y = wide @ dense(weight).T
    if adapters is not None:
        y += ((wide @ adapters.lora_A.float().T) * adapters.scaling) @ adapters.lora_B.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def dense(weight: PackedWeight) -> torch.Tensor:
    """Return the kept weights in place, zeros elsewhere, (N, K) float32."""
    shape = weight.n_rows, weight.n_columns
    mask = None if weight.bitmap is None else unpack_bits(weight.bitmap, weight.n_columns)
    unit = unit_values(weight)
    unit = unit.view(shape) if mask is None else torch.zeros(shape, device=unit.device).masked_scatter_(mask, unit)
    if weight.scales is None or weight.group_size is None:
        return unit
    return unit * weight.scales.repeat_interleave(min(weight.group_size, shape[1]), 1)[:, : shape[1]]


def unpack_bits(bitmap: torch.Tensor, n_columns: int) -> torch.Tensor:
    """Return the mask (N, K) of a bitmap (N, ceil(K/8)): the first column is the lowest bit."""
    bits = bitmap[..., None] >> torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return (bits & 1).bool().flatten(-2)[:, :n_columns]


def unit_values(weight: PackedWeight) -> torch.Tensor:
    """Return the kept values (nnz,) float32, before scales."""
    if weight.encoding == "int8":
        return weight.values[: weight.nnz].view(torch.int8).float()
    if weight.encoding == "nf4":
        pairs = weight.values[: -(-weight.nnz // 2)]
        codes = torch.stack([pairs & 15, pairs >> 4], 1).flatten()[: weight.nnz]
        return torch.from_numpy(NF4_CODE_BOOK).to(codes.device)[codes.long()]
    return weight.values[: weight.nnz].float()
