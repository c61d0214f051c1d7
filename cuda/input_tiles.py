"""x and u = (x A^T) * scaling for products with many rows: one launch before theirs.

Invariant: sums are added in a fixed order: the same input gives the same bits.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch

from .compilation import function
from .device_layout import RESERVED_BYTES, SlabWeight
from .launching import Launch, address, fields, uncaptured
from .low_rank import A_TILE_BYTES, RANKS_OF_TILE, Fragments, addresses

#: tiles_of_x.cu: ROWS, SUMS * 16 bytes for a tile of ranks; K_WARPS * MOST_STAGES
_ROWS_OF_WARP, _SUM_BYTES = 16, 2 * 32 * 16
_ALL_STAGES = 32
#: up to so many rows: PARTS, ROW_WARPS, K_WARPS, RANK_TILES, measured on an H100. Few rows are read side by side, and
#: by two thread blocks for half of 64 ranks each, so that as many SMs read A; but only as many clusters as are
#: resident: of 8, 4 and 2 thread blocks it holds 14, 30 and 66
_SHAPES = (
    (96, (8, 1, 16, 2)), (128, (8, 1, 16, 4)), (256, (8, 2, 8, 4)), (512, (4, 2, 8, 4)), (1024, (2, 1, 16, 4)),
    (2048, (2, 2, 8, 4)), (sys.maxsize, (1, 2, 8, 4)),
)  # fmt: skip


class _Arguments(ctypes.Structure):
    _fields_ = fields(
        "x lora_a scaling x_out u_out counters",
        "batch n_columns tile_rows n_slabs rank_tiles n_counters stages stage_bytes",
    )


class TilesOfInput:
    """The launch that gives x and u in the order of asynchronous products, by tiles of rows.

    Args:
        weight: what x is multiplied by.
        adapters: in fragment order, or None.
    """

    def __init__(self, weight: SlabWeight, adapters: Fragments | None) -> None:
        self.ranks = adapters.n_tiles * RANKS_OF_TILE if adapters else 0
        self._weight, self._of_adapters = weight, addresses(adapters)
        self._launches: dict[tuple[int, ...], tuple[_Arguments, Launch]] = {}

    def __call__(
        self,
        x: torch.Tensor,
        tile_rows: int,
        x_out: torch.Tensor,
        u_out: torch.Tensor,
        stream: int,
        counters: torch.Tensor | None = None,
    ) -> None:
        """Write x (M, x_columns) and its u to ``x_out`` and ``u_out``, whose tiles have ``tile_rows`` rows.

        ``counters``: int32, set to 0 for the launch that follows.
        """
        arguments, launch = self._prepared(x)
        arguments.x_out, arguments.u_out, arguments.tile_rows = x_out.data_ptr(), u_out.data_ptr(), tile_rows
        arguments.counters, arguments.n_counters = address(counters), 0 if counters is None else counters.numel()
        launch(stream)

    def _prepared(self, x: torch.Tensor) -> tuple[_Arguments, Launch]:
        """Return a launch for x with its arguments but for what it writes to."""
        batch = x.shape[0]
        shape = next(shape for most, shape in _SHAPES if batch <= most)
        found = self._launches.get(shape)
        if found is None:
            with uncaptured(x.device):
                found = self._launches[shape] = self._made(*shape)
        arguments, launch = found
        arguments.x, arguments.batch = x.data_ptr(), batch
        n_groups, shares = -(-batch // (_ROWS_OF_WARP * shape[1])), 2 if shape[-1] * RANKS_OF_TILE < self.ranks else 1
        return arguments, launch.over(shape[0], n_groups, shares)

    def _made(self, parts: int, row_warps: int, k_warps: int, rank_tiles: int) -> tuple[_Arguments, Launch]:
        """Return a launch and its arguments."""
        weight, warps, stage_bytes = self._weight, row_warps * k_warps, rank_tiles * A_TILE_BYTES
        most = -(-weight.n_slabs // (parts * k_warps))
        chosen = (
            ("HALF", int(weight.dtype == torch.float16)), ("PARTS", parts), ("ROW_WARPS", row_warps),
            ("K_WARPS", k_warps), ("RANK_TILES", rank_tiles),
        )  # fmt: skip
        handle = function("tiles_of_x.cu", "tiles_of_x", chosen, weight.slabs.device.index)
        properties: Any = torch.cuda.get_device_properties(weight.slabs.device)
        sum_bytes = warps * rank_tiles * _SUM_BYTES if self.ranks else 0
        room = properties.shared_memory_per_block_optin - RESERVED_BYTES - sum_bytes
        stages = min(most, _ALL_STAGES // k_warps, room // (k_warps * stage_bytes)) if self.ranks else 0
        arguments = _Arguments(
            lora_a=self._of_adapters["lora_a"], scaling=self._of_adapters["scaling"], n_columns=weight.x_columns,
            n_slabs=weight.n_slabs, rank_tiles=self.ranks // RANKS_OF_TILE, stages=stages, stage_bytes=stage_bytes,
        )  # fmt: skip
        shared_bytes = k_warps * stages * stage_bytes + sum_bytes
        return arguments, Launch(handle, (1, 1, 1), 32 * warps, shared_bytes, [arguments])
