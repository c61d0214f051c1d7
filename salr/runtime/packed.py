"""One packed matrix as torch tensors: what every backend is given.

Invariant: the tensors are canonical, as the file stores them, and were checked by the reader: popcounts equal the
differences of ``row_offsets``, so that no index of a kernel leaves ``values``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..formats.dtypes import Array
from ..formats.module import ModuleTensors

TORCH_ENCODINGS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class PackedWeight:
    """Kept weights of an (N, K) matrix.

    ``values`` is 1-D and padded: bfloat16, float16 or float32 as ``encoding`` says, uint8 for int8 (two's complement)
    and nf4 (two codes a byte, the even one low). ``bitmap`` (N, ceil(K/8)) uint8 and ``row_offsets`` (N+1,) int64 are
    None where all weights are kept. ``scales`` (N, ceil(K/group_size)) float32 is None unless quantized.
    """

    n_rows: int
    n_columns: int
    nnz: int
    encoding: str
    pattern: str
    values: torch.Tensor
    bitmap: torch.Tensor | None = None
    row_offsets: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    group_size: int | None = None

    @staticmethod
    def from_module(tensors: ModuleTensors) -> PackedWeight:
        """Wrap a checked module without copying it; the tensors are views of the mapped file and read-only.

        Stacked experts come as one matrix of E * N rows, which ``matrix.split`` divides before any backend sees it.
        """
        entry = tensors.entry
        values = _as_torch(tensors.values)
        offsets = tensors.row_offsets
        return PackedWeight(
            n_rows=entry.n_rows,
            n_columns=entry.n_columns,
            nnz=entry.nnz,
            encoding=entry.encoding,
            pattern=entry.pattern,
            values=values.view(TORCH_ENCODINGS.get(entry.encoding, torch.uint8)),
            bitmap=None if tensors.bitmap is None else _as_torch(tensors.bitmap),
            row_offsets=None if offsets is None else _as_torch(offsets.view(np.int64)),
            scales=None if tensors.scales is None else _as_torch(tensors.scales),
            group_size=entry.group_size,
        )

    def to(self, device: torch.device | str) -> PackedWeight:
        """Return the same matrix on another device."""
        moved: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor.to(device)
            for name in ("values", "bitmap", "row_offsets", "scales")
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class Adapters:
    """All adapters of a module, concatenated along the rank: y += lora_B (scaling * (lora_A x)).

    ``lora_A`` (R, K), ``lora_B`` (N, R) in one float dtype, ``scaling`` (R,) float32.
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor

    def to(self, device: torch.device | str) -> Adapters:
        """Return the same adapters on another device."""
        return Adapters(self.lora_A.to(device), self.lora_B.to(device), self.scaling.to(device))


def _as_torch(array: Array) -> torch.Tensor:
    """Share an array's memory with torch, read-only or not; no backend writes to a weight."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the mapped file cannot be written to
        return torch.from_numpy(array)
