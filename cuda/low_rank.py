"""The concatenated adapters in the order of the tensor cores' fragments.

Invariant: the rank is padded to a multiple of 16 with zeros. A is ordered like a dense slab layout (columns of x in
groups of 16 a lane), B in mma.m16n8k16's own order, since u is made in that order by the kernel itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from .device_layout import BLOCK_ROWS, SLAB_COLUMNS, UNITS, padded_columns
from .launching import address

RANKS_OF_TILE = 16
#: of a tile's fragments: lora_A's for a slab's columns, lora_B's for a row block
A_TILE_BYTES, B_TILE_BYTES = 2 * RANKS_OF_TILE * SLAB_COLUMNS, 2 * RANKS_OF_TILE * BLOCK_ROWS
#: the rank that kernels take: 16 tiles
LARGEST_RANK = 256


class LowRank(Protocol):
    """What is needed of adapters (see ``salr.runtime.packed.Adapters``): lora_A (R, K), lora_B (N, R), scaling (R,)."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor


@dataclass(frozen=True)
class Fragments:
    """Adapters as fragments: lora_A [K/64][n_tiles][4 steps][32 lanes][8], lora_B [row blocks][tiles][16 units][32][8].

    ``n_tiles`` are the tiles of 16 ranks; a row block uses ``block_tiles`` of them, from its own ``first_tile`` on
    ((row blocks,) int32).
    """

    n_tiles: int
    block_tiles: int
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor
    first_tile: torch.Tensor


def fragments(adapters: LowRank, dtype: torch.dtype) -> Fragments:
    """Return adapters in fragment order, rounded to ``dtype``."""
    rank, n_columns = adapters.lora_A.shape
    n_rows = adapters.lora_B.shape[0]
    n_tiles, n_blocks = -(-rank // RANKS_OF_TILE), -(-n_rows // BLOCK_ROWS)
    missing = n_tiles * RANKS_OF_TILE - rank
    a = _padded(adapters.lora_A.to(dtype), missing, padded_columns(n_columns) - n_columns)
    b = _padded(adapters.lora_B.to(dtype), n_blocks * BLOCK_ROWS - n_rows, missing)
    scaling = torch.nn.functional.pad(adapters.scaling.float(), (0, missing)).contiguous()
    first_tile = torch.zeros(n_blocks, dtype=torch.int32, device=b.device)
    return Fragments(n_tiles, n_tiles, _a_order(a, n_tiles), _b_order(b, n_blocks, n_tiles), scaling, first_tile)


def addresses(adapters: Fragments | None) -> dict[str, int | None]:
    """Return where adapters lie by the names of kernels' arguments; None each where there are none."""
    names = {"lora_a": "lora_A", "lora_b": "lora_B", "scaling": "scaling", "first_step": "first_tile"}
    return {name: address(getattr(adapters, field) if adapters else None) for name, field in names.items()}


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


@dataclass(frozen=True)
class Matrices:
    """Adapters in a product's dtype: ``scaled_A`` = scaling * lora_A (ranks, K padded), lora_B (N, ranks)."""

    scaled_A: torch.Tensor
    lora_B: torch.Tensor


def matrices(adapters: LowRank, dtype: torch.dtype) -> Matrices:
    """Return adapters of any rank as matrices, the rank padded to a multiple of 16."""
    rank, n_columns = adapters.lora_A.shape
    missing = -rank % RANKS_OF_TILE
    scaled = (adapters.lora_A.float() * adapters.scaling[:, None]).to(dtype)
    a = _padded(scaled, missing, padded_columns(n_columns) - n_columns)
    return Matrices(a, _padded(adapters.lora_B.to(dtype), 0, missing))


def matrices_of(fragments: Fragments, n_rows: int) -> Matrices:
    """Return adapters read back from fragments; a row has zeros for the ranks that its row block does not use."""
    n_tiles, block_tiles, first_tile = fragments.n_tiles, fragments.block_tiles, fragments.first_tile
    slabs = fragments.lora_A.view(-1, n_tiles, 4, 8, 4, 2, 2, 2)
    a = slabs.permute(1, 6, 3, 0, 4, 2, 5, 7).reshape(RANKS_OF_TILE * n_tiles, -1)
    blocks = fragments.lora_B.view(-1, block_tiles, UNITS, 8, 4, 2, 2, 2)
    own = blocks.permute(0, 2, 6, 3, 1, 5, 4, 7).reshape(len(first_tile), BLOCK_ROWS, -1)
    of_tile = torch.arange(own.shape[2], device=own.device)
    at = (RANKS_OF_TILE * first_tile.long()[:, None, None] + of_tile).expand(own.shape)
    b = own.new_zeros(*own.shape[:2], RANKS_OF_TILE * n_tiles).scatter_(2, at, own)
    return Matrices((a.float() * fragments.scaling[:, None]).to(a.dtype), b.flatten(0, 1)[:n_rows])


def second_operand(fragments: Fragments) -> torch.Tensor:
    """Return scaling * lora_A, rounded once, in the order in which expand.cu multiplies lora_B by it.

    [K/64][n_tiles][4 steps][32 lanes][8]: mma.m16n8k16's second operand, columns in the order of lora_A's fragments.
    """
    a = fragments.lora_A.view(-1, fragments.n_tiles, 4, 4, 2, 4, 2, 2, 2)  # slab tile step t e t' pair half e'
    scaling = fragments.scaling.view(fragments.n_tiles, 2, 4, 2).permute(0, 2, 3, 1)
    scaled = (a.float() * scaling[None, :, None, :, :, None, None, :, None]).to(a.dtype)
    return scaled.permute(0, 1, 2, 5, 8, 3, 6, 7, 4).reshape(-1).contiguous()
