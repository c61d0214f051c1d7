"""The concatenated adapters in the order of the tensor cores' fragments.

Invariant: the rank is padded to a multiple of 16 with zeros. A is ordered like a dense slab layout (columns of x in
groups of 16 a lane), B in mma.m16n8k16's own order, since u is made in that order by the kernel itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .device_layout import BLOCK_ROWS, SLAB_COLUMNS, UNITS, padded_columns

#: the rank that the fused kernel takes: 16 tiles of 16
LARGEST_RANK = 256


class LowRank(Protocol):
    """What is needed of adapters (see ``salr.runtime.packed.Adapters``): lora_A (R, K), lora_B (N, R), scaling (R,)."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor


@dataclass(frozen=True)
class Fragments:
    """Adapters as fragments: lora_A [K/64][n_tiles][4 steps][32 lanes][8], lora_B [row blocks][tiles][16 units][32][8].

    ``n_tiles`` are the tiles of 16 ranks, ``block_tiles`` those that a row block uses.
    """

    n_tiles: int
    block_tiles: int
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor


def fragments(adapters: LowRank, dtype: torch.dtype) -> Fragments:
    """Return adapters in fragment order, rounded to ``dtype``."""
    rank, n_columns = adapters.lora_A.shape
    n_rows = adapters.lora_B.shape[0]
    n_tiles, n_blocks = -(-rank // 16), -(-n_rows // BLOCK_ROWS)
    missing = n_tiles * 16 - rank
    a = _padded(adapters.lora_A.to(dtype), missing, padded_columns(n_columns) - n_columns)
    b = _padded(adapters.lora_B.to(dtype), n_blocks * BLOCK_ROWS - n_rows, missing)
    scaling = torch.nn.functional.pad(adapters.scaling.float(), (0, missing)).contiguous()
    return Fragments(n_tiles, n_tiles, _a_order(a, n_tiles), _b_order(b, n_blocks, n_tiles), scaling)


def _padded(matrix: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return torch.nn.functional.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def _a_order(a: torch.Tensor, n_tiles: int) -> torch.Tensor:
    """Rows (tile, half, g), columns (slab, t, step, pair, element) -> slab, tile, step, g, t, pair, half, element."""
    n_slabs = a.shape[1] // SLAB_COLUMNS
    order = a.view(n_tiles, 2, 8, n_slabs, 4, 4, 2, 2).permute(3, 0, 5, 2, 4, 6, 1, 7)
    return order.reshape(-1).contiguous()


def _b_order(b: torch.Tensor, n_blocks: int, n_tiles: int) -> torch.Tensor:
    """Rows (block, unit, half, g), columns (tile, k, t, element) -> block, tile, unit, g, t, k, half, element."""
    order = b.view(n_blocks, UNITS, 2, 8, n_tiles, 2, 4, 2).permute(0, 4, 1, 3, 6, 5, 2, 7)
    return order.reshape(-1).contiguous()


class Factors(Protocol):
    """The factors of a product with an expanded weight: ``scaled_A`` = scaling * lora_A (rank, K padded)."""

    scaled_A: torch.Tensor

    def write_B(self, first: int, last: int, out: torch.Tensor) -> None:
        """Write rows of lora_B to ``out`` (last - first, rank); ``first`` is a multiple of 256."""
        ...


class MatrixFactors:
    """Factors as they came, their rank padded to 8: for ranks beyond what the fused kernel takes."""

    def __init__(self, adapters: LowRank, n_columns: int, dtype: torch.dtype) -> None:
        scaled = (adapters.lora_A.float() * adapters.scaling[:, None]).to(dtype)
        missing = -len(scaled) % 8
        self.scaled_A = _padded(scaled, missing, n_columns - scaled.shape[1]).contiguous()
        self._b = torch.nn.functional.pad(adapters.lora_B.to(dtype), (0, missing))

    def write_B(self, first: int, last: int, out: torch.Tensor) -> None:
        """Write rows of lora_B to ``out`` (last - first, rank)."""
        out.copy_(self._b[first:last])


class FragmentFactors:
    """Factors of fragments, of one of several stacked layers its own; B is read back, so that it is stored once."""

    def __init__(self, fragments: Fragments, first_tile: int = 0, first_block: int = 0) -> None:
        n_tiles = fragments.block_tiles
        tiles = slice(first_tile, first_tile + n_tiles)
        slabs = fragments.lora_A.view(-1, fragments.n_tiles, 4, 8, 4, 2, 2, 2)[:, tiles]
        a = slabs.permute(1, 6, 3, 0, 4, 2, 5, 7).reshape(16 * n_tiles, -1)
        self.scaled_A = (a.float() * fragments.scaling.view(-1, 16)[tiles].reshape(-1, 1)).to(a.dtype)
        blocks = fragments.lora_B.view(-1, n_tiles, UNITS, 8, 4, 2, 2, 2)[first_block:]
        self._b = blocks.permute(0, 2, 6, 3, 1, 5, 4, 7)  # block, unit, half, g, tile, k, t, element

    def write_B(self, first: int, last: int, out: torch.Tensor) -> None:
        """Write rows of lora_B to ``out`` (last - first, rank)."""
        whole, rest = divmod(last - first, BLOCK_ROWS)
        blocks = self._b[first // BLOCK_ROWS :]
        if whole:
            out[: whole * BLOCK_ROWS].view(blocks[:whole].shape).copy_(blocks[:whole])
        if rest:
            out[-rest:].copy_(blocks[whole].reshape(BLOCK_ROWS, -1)[:rest])
