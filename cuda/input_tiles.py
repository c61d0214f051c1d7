"""x and u = (x A^T) * scaling for asynchronous products: one launch before theirs.

Invariant: sums are added in a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

import ctypes

import torch

from .compilation import function
from .device_layout import SlabWeight
from .launching import Launch, fields
from .low_rank import RANKS_OF_TILE, Fragments, addresses

#: tiles_of_x.cu: PARTS, AT_ONCE * 32 lanes * 16 bytes
_PARTS, _SUM_BYTES = 8, 4 * 32 * 16
#: of few rows a thread block takes 16, by more warps where there are more slabs than warps
_TILES, _TILES_OF_FEW = 4, 2
_WARPS, _MORE_WARPS = 8, 16


class _Arguments(ctypes.Structure):
    _fields_ = fields("x lora_a scaling x_out u_out", "batch n_columns tile_rows n_slabs rank_tiles")


class TilesOfInput:
    """The launch that gives x and u in the order of asynchronous products, by tiles of rows.

    Args:
        weight: what x is multiplied by.
        adapters: in fragment order, or None.
        is_few: whether there is one tile of at most 64 rows; then u comes as fragments of two 16-bit floats a number,
            else rounded once, in x's order.
    """

    def __init__(self, weight: SlabWeight, adapters: Fragments | None, is_few: bool = False) -> None:
        n_tiles = adapters.n_tiles if adapters else 0
        self.ranks = n_tiles * RANKS_OF_TILE
        of_adapters = addresses(adapters)
        self._arguments = _Arguments(
            lora_a=of_adapters["lora_a"], scaling=of_adapters["scaling"],
            n_columns=weight.x_columns, n_slabs=weight.n_slabs, rank_tiles=n_tiles,
        )  # fmt: skip
        tiles = _TILES_OF_FEW if is_few else _TILES
        warps = _MORE_WARPS if is_few and weight.n_slabs > _PARTS * _WARPS else _WARPS
        half = int(weight.dtype == torch.float16)
        chosen = (("HALF", half), ("N_TILES", tiles), ("WARPS", warps), ("FEW_ROWS", int(is_few)))
        handle = function("tiles_of_x.cu", "tiles_of_x", chosen, weight.slabs.device.index)
        shared_bytes = warps * tiles * _SUM_BYTES if adapters else 0
        self._rows_of_block = 8 * tiles
        self._launch = Launch(handle, (1, 1, 1), 32 * warps, shared_bytes, [self._arguments])

    def __call__(self, x: torch.Tensor, tile_rows: int, x_out: torch.Tensor, u_out: torch.Tensor, stream: int) -> None:
        """Write x (M, x_columns) and its u to ``x_out`` and ``u_out``, whose tiles have ``tile_rows`` rows."""
        arguments = self._arguments
        arguments.x, arguments.x_out, arguments.u_out = x.data_ptr(), x_out.data_ptr(), u_out.data_ptr()
        arguments.batch, arguments.tile_rows = x.shape[0], tile_rows
        self._launch.over(_PARTS, -(-x.shape[0] // self._rows_of_block))(stream)
