"""Packing a dense matrix in torch, on the device where it lies: canonical tensors as a .salr file would hold them.

Invariant: ``reference.dense`` of what is packed is the kept weights, rounded to the encoding.
"""

from __future__ import annotations

import torch

from ..formats.values import NF4_CODE_BOOK, PADDING_BYTES
from .packed import TORCH_ENCODINGS, PackedWeight

_GROUP_SIZE = 128


@torch.no_grad()
def pack(
    weight: torch.Tensor, kept: torch.Tensor, encoding: str = "bf16", group_size: int = _GROUP_SIZE
) -> PackedWeight:
    """Return the weights (N, K) that the mask ``kept`` (N, K) names.

    Args:
        encoding: bf16, fp16, fp32, int8 or nf4.
        group_size: columns that share a scale, of int8 and nf4.
    """
    n_rows, n_columns = weight.shape
    counts = kept.sum(1)
    row_offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=weight.device)
    torch.cumsum(counts, 0, out=row_offsets[1:])
    facts = (n_rows, n_columns, int(row_offsets[-1]), encoding, "unstructured")
    if encoding in TORCH_ENCODINGS:
        values = weight[kept].to(TORCH_ENCODINGS[encoding])
        return PackedWeight(*facts, _padded(values), pack_bits(kept), row_offsets)
    units, scales = _scaled(weight * kept, group_size, 127 if encoding == "int8" else 1)
    chosen = units[kept]
    if encoding == "int8":
        codes = chosen.round().clamp(-127, 127).to(torch.int8).view(torch.uint8)
    else:
        codes = _pairs(_nearest(chosen))
    return PackedWeight(*facts, _padded(codes), pack_bits(kept), row_offsets, scales, group_size)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Return the bitmap (N, ceil(K/8)) uint8 of a mask (N, K): the first column is the lowest bit."""
    bits = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8)).view(mask.shape[0], -1, 8)
    bitmap = bits[..., 0].clone()
    for j in range(1, 8):
        bitmap |= bits[..., j] << j
    return bitmap


def _padded(values: torch.Tensor) -> torch.Tensor:
    """Return values with at least 64 zero bytes behind them, up to a multiple of 64."""
    n_bytes = values.numel() * values.element_size()
    total = -(-(n_bytes + PADDING_BYTES) // 64) * 64
    return torch.nn.functional.pad(values, (0, (total - n_bytes) // values.element_size()))


def _scaled(weight: torch.Tensor, group_size: int, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights divided by their group's scale, and scales (N, groups) float32 that float16 holds."""
    n_columns = weight.shape[1]
    groups = torch.nn.functional.pad(weight.float(), (0, -n_columns % group_size)).view(weight.shape[0], -1, group_size)
    scales = (groups.abs().amax(-1) / largest).half().float()
    units = groups / scales.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return units.flatten(1)[:, :n_columns], scales


def _nearest(units: torch.Tensor) -> torch.Tensor:
    """Return the code of NF4 nearest to each number."""
    codes = torch.from_numpy(NF4_CODE_BOOK).to(units.device)
    return torch.bucketize(units, (codes[1:] + codes[:-1]) / 2).to(torch.uint8)


def _pairs(codes: torch.Tensor) -> torch.Tensor:
    """Return two codes a byte, the even one low."""
    pairs = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)
