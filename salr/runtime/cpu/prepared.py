"""A packed matrix made ready for the kernels: what can be computed once, before the first product.

Invariant: weights stay where they are (in the mapped file); copied are only adapters whose shape or dtype a kernel
cannot read, bitmaps of less than 8 bytes a row, and nothing else of their size. ``fields`` holds addresses of tensors
that ``keep`` holds alive.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..packed import Adapters, PackedWeight
from .decoding import WORD
from .rows import Matrix

RANK_MULTIPLE = 16
_FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Operand:
    """One matrix as a kernel sees it: its form, the fields of its jobs, its size in bytes."""

    matrix: Matrix
    fields: dict[str, int]
    n_rows: int
    n_bytes: int
    keep: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class LowRank:
    """Adapters ready for use: ``lora_A`` as an operand, ``lora_B`` (N, rank) with the rank filled up with zeros."""

    operand: Operand
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor
    rank: int

    @property
    def rank_encoding(self) -> str:
        """Return how lora_B is stored: "bf16" or "fp32"."""
        return _FLOATS[self.lora_B.dtype]


@dataclass(frozen=True)
class Prepared:
    """A layer: y = x W^T + adapters + bias, for x (M, ``n_columns``); ``plans`` keeps unfinished jobs."""

    weight: PackedWeight
    operand: Operand
    low_rank: LowRank | None
    bias: torch.Tensor | None
    n_rows: int
    n_columns: int
    plans: dict[Any, Any] = field(default_factory=dict)

    @property
    def rank_encoding(self) -> str:
        """Return how lora_B is stored, "" without adapters."""
        return "" if self.low_rank is None else self.low_rank.rank_encoding


def prepare(weight: PackedWeight, adapters: Adapters | None = None, bias: torch.Tensor | None = None) -> Prepared:
    """Make a matrix (N, K) with its adapters and bias (N,) ready; all tensors on the CPU."""
    low_rank = None
    if adapters is not None and adapters.scaling.numel():
        low_rank = _low_rank(adapters)
    wide_bias = None if bias is None else bias.detach().float().contiguous()
    return Prepared(weight, _operand(weight), low_rank, wide_bias, weight.n_rows, weight.n_columns)


def _operand(weight: PackedWeight) -> Operand:
    values = weight.values
    fields = {"values": values.data_ptr(), "n_rows": weight.n_rows, "n_columns": weight.n_columns}
    keep, scale_of = [values], ""
    n_bytes = weight.nnz * (1 if weight.encoding in ("int8", "nf4") else values.element_size())
    if weight.bitmap is not None and weight.row_offsets is not None:
        bitmap = _at_least_8_wide(weight.bitmap)
        n_bytes += bitmap.numel()
        keep += [bitmap, weight.row_offsets]
        fields |= {"bitmap": bitmap.data_ptr(), "bitmap_bytes": bitmap.shape[1]}
        fields["row_offsets"] = weight.row_offsets.data_ptr()
    if weight.scales is not None and weight.group_size is not None:
        scale_of, index = _group_index(weight.group_size, weight.scales.shape[1], weight.n_columns)
        scales = weight.scales.contiguous()
        keep += [scales, index]
        fields |= {"scales": scales.data_ptr(), "n_groups": scales.shape[1], "group_index": index.data_ptr()}
    matrix = Matrix(weight.encoding, weight.bitmap is not None, scale_of)
    return Operand(matrix, fields, weight.n_rows, n_bytes, tuple(keep))


def _at_least_8_wide(bitmap: torch.Tensor) -> torch.Tensor:
    """Return a bitmap whose rows a kernel can read 8 bytes at once."""
    missing = 8 - bitmap.shape[1]
    return torch.nn.functional.pad(bitmap, (0, missing)) if missing > 0 else bitmap


def _group_index(group_size: int, n_groups: int, n_columns: int) -> tuple[str, torch.Tensor]:
    """Return what shares a scale (see ``Matrix``), and the group of each word or column, int32."""
    n_words = -(-n_columns // WORD)
    if n_groups == 1 or group_size % WORD == 0:
        together = n_groups == 1 or group_size % (2 * WORD) == 0
        return "two words" if together else "word", (torch.arange(n_words) * WORD // group_size).to(torch.int32)
    columns = torch.arange(n_words * WORD) // group_size
    return "column", columns.clamp(max=n_groups - 1).to(torch.int32)


def _low_rank(adapters: Adapters) -> LowRank:
    rank, n_columns = adapters.lora_A.shape
    lora_A, lora_B = (_in_known_dtype(factor) for factor in (adapters.lora_A, adapters.lora_B))
    values = lora_A.view(-1)
    if n_columns % WORD:  # the last row's last word would be read past its end
        values = torch.cat([values, values.new_zeros(64)])
    packed = PackedWeight(rank, n_columns, rank * n_columns, _FLOATS[lora_A.dtype], "dense", values)
    operand = _operand(packed)
    scaling = adapters.scaling.detach().float().contiguous()
    operand.fields["row_factors"] = scaling.data_ptr()
    full = -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE
    if lora_B.dtype == torch.float16:
        lora_B = lora_B.float()
    if full != rank:
        lora_B = torch.nn.functional.pad(lora_B, (0, full - rank))
    return LowRank(operand, lora_A, lora_B.contiguous(), scaling, full)


def _in_known_dtype(factor: torch.Tensor) -> torch.Tensor:
    factor = factor.detach().contiguous()
    return factor if factor.dtype in _FLOATS else factor.float()
