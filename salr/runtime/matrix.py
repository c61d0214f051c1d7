"""One (N, K) matrix as a backend takes it: where it comes from in a packed module, and its product made ready.

Invariant: a product is made ready once for a device and backend, and again where the bias it holds has changed; parts
of a stacked weight are views of it where they begin at a whole byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch

from ..formats.values import PADDING_BYTES
from .backends import Product, backend_for
from .packed import TORCH_ENCODINGS, Adapters, PackedWeight


@dataclass(frozen=True)
class Matrix:
    """One (N, K) matrix with the active adapters, as a backend takes it."""

    weight: PackedWeight
    adapters: Adapters | None
    _products: dict[tuple[torch.device, torch.dtype | None, str | None], _Ready] = field(
        default_factory=dict, compare=False
    )

    def product(
        self, device: torch.device, dtype: torch.dtype, bias: torch.Tensor | None, backend: str | None
    ) -> Product:
        """Return the product for x on a device in a dtype.

        It is made ready at the first call, and again where the bias has changed.
        """
        chosen = backend_for(device.type, backend)
        key = device, None if chosen.takes is None else dtype, backend
        version = None if bias is None else bias._version
        found = self._products.get(key)
        if found is None or found.bias is not bias or found.version != version:
            product = chosen.product(self.weight, self.adapters, bias, device, dtype)
            found = self._products[key] = _Ready(product, bias, version)
        return found.product


class _Ready(NamedTuple):
    """A product that was made ready, and the bias it was made with."""

    product: Product
    bias: torch.Tensor | None
    version: int | None


def concatenated(factors: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Concatenate along the rank in the widest dtype; int8 factors become bfloat16, which holds them exactly."""
    floats = [f.to(torch.bfloat16) if f.dtype == torch.int8 else f for f in factors]
    if len(floats) == 1:
        return floats[0]
    dtype = floats[0].dtype
    for factor in floats:
        dtype = torch.promote_types(dtype, factor.dtype)
    return torch.cat([factor.to(dtype) for factor in floats], dim)


def expert_adapters(adapters: Adapters | None, expert: int) -> Adapters | None:
    """Return one expert's part of adapters with a leading E."""
    if adapters is None:
        return None
    return Adapters(adapters.lora_A[expert], adapters.lora_B[expert], adapters.scaling)


def split(weight: PackedWeight, shape: tuple[int, ...]) -> list[PackedWeight]:
    """Return the experts of a stacked weight (E, N, K), as views where an expert begins at a whole byte.

    A view's values go on into the next expert's instead of zero padding: a kernel may read them, never use them.
    """
    n_experts, n_rows, n_columns = shape
    if weight.row_offsets is None:
        borders = [e * n_rows * n_columns for e in range(n_experts + 1)]
    else:
        borders = [int(border) for border in weight.row_offsets[::n_rows].tolist()]
    parts = []
    for e, (start, stop) in enumerate(pairwise(borders)):
        rows = slice(e * n_rows, (e + 1) * n_rows + 1)
        parts.append(
            PackedWeight(
                n_rows=n_rows,
                n_columns=n_columns,
                nnz=stop - start,
                encoding=weight.encoding,
                pattern=weight.pattern,
                values=_values_from(weight, start, stop),
                bitmap=None if weight.bitmap is None else weight.bitmap[e],
                row_offsets=None if weight.row_offsets is None else weight.row_offsets[rows] - start,
                scales=None if weight.scales is None else weight.scales[e],
                group_size=weight.group_size,
            )
        )
    return parts


def _values_from(weight: PackedWeight, start: int, stop: int) -> torch.Tensor:
    """Return the stored values start..stop with at least 64 bytes behind them; nf4 from a high nibble is shifted."""
    values = weight.values
    if weight.encoding != "nf4":
        padding = PADDING_BYTES // values.element_size() if weight.encoding in TORCH_ENCODINGS else PADDING_BYTES
        return values[start : stop + padding]
    piece = values[start // 2 : -(-stop // 2) + PADDING_BYTES]
    if start % 2 == 0:
        return piece
    following = torch.cat([piece[1:], piece.new_zeros(1)])
    return (piece >> 4) | (following << 4)
