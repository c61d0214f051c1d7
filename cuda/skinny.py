"""The product for at most 16 rows of x: one launch, in which each thread block has all of x and whole rows of W.

Invariant: the same input gives the same bits, whatever else runs; each stream has counters and a workspace of its own.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .compilation import function
from .device_layout import UNITS, SlabWeight, definitions, fixed_shared_bytes, unit_bounds
from .launching import Launch, address, fields, stream_of, uncaptured
from .low_rank import Fragments, addresses
from .sums import EMPTY, workspace

#: the first with copies of whole blocks of memory
LEAST_CAPABILITY = (9, 0)
_PAIR, _PAIR_ROWS, _FINISHERS, _SUMS_OF_PAIRS = 2, 32, 4, 4  # as in skinny.cuh: TEAMS * TILES
_MOST_DEPTH, _MOST_CHUNKS, _LEAST_CHUNK_SHIFT = 8, 16, 3
_BARRIER_BYTES = 1 << 10
_RING_BYTES = 80 << 10  # more is not faster
_PARTS_OF_A = 8
_LATE, _FEWER = 0.1, 16  # this part of the thread blocks starts late, and gets so many items fewer


def items_of(weight: SlabWeight) -> tuple[torch.Tensor, int]:
    """Return where pairs of units lie, (row pairs, slabs, 2) int32, and the bytes of the largest.

    A pair's first byte in units of 16; the size of its first unit, and of both shifted by 16 bits, in those units.
    """
    n_blocks, n_slabs = weight.n_row_blocks, weight.n_slabs
    bounds = unit_bounds(weight)
    first, second, end = bounds[:, :-1:2], bounds[:, 1::2], bounds[:, 2::2]
    items = torch.stack([first, (second - first) | (end - first) << 16], -1)
    items = items.view(n_blocks, n_slabs, UNITS // _PAIR, 2).transpose(1, 2)
    n_rows = -(-weight.n_rows // _PAIR_ROWS)
    return items.reshape(-1, n_slabs, 2)[:n_rows].contiguous(), 16 * int((end - first).max())


def shares(n_items: int, n_blocks: int) -> dict[str, int]:
    """Return how items are divided: ``share`` each, one more for the first ``more``, less from ``first_late`` on.

    The last thread blocks start last: on the SMs that the launch before left last.
    """
    first_late = n_blocks - int(_LATE * n_blocks)
    fewer = int(min(_FEWER, n_items / n_blocks / 4))
    share, more = divmod(n_items + (n_blocks - first_late) * fewer, n_blocks)
    return {"share": share, "more": more, "first_late": first_late, "fewer": fewer}


class _Arguments(ctypes.Structure):
    _fields_ = fields(
        "slabs items lora_a lora_b scaling first_step bias x y partial u_partial counters",
        "n_rows n_columns batch wide n_slabs rank_tiles block_steps a_parts item_bytes depth y_pitch x_shift "
        "share more first_late fewer",
    )


@dataclass(frozen=True)
class Tile:
    """A compiled shape of the kernel: up to 8 * NT rows of x, WARPS warps that multiply."""

    NT: int
    WARPS: int

    @property
    def sums_bytes(self) -> int:
        """Shared memory of a thread block's sums of row pairs, and of its parts of u."""
        return (self.WARPS * _SUMS_OF_PAIRS + _FINISHERS * self.NT) * 512


NARROW, WIDE = TILES = (Tile(1, 16), Tile(2, 12))


class SkinnyProduct:
    """y = x W^T + adapters + bias for x (M <= most_rows, x_columns), one launch.

    Args:
        weight: the slabs.
        adapters: in fragment order, or None.
        bias: (N,) float32, or None.
    """

    def __init__(self, weight: SlabWeight, adapters: Fragments | None, bias: torch.Tensor | None) -> None:
        self.weight, self.adapters, self.bias = weight, adapters, bias
        self.device = weight.slabs.device
        self._properties: Any = torch.cuda.get_device_properties(self.device)
        self._launches: dict[tuple[int, int], tuple[_Arguments, Launch, tuple[torch.Tensor, ...]]] = {}

    @functools.cached_property
    def _items(self) -> tuple[torch.Tensor, int]:
        with uncaptured(self.device):
            return items_of(self.weight)

    @functools.cached_property
    def most_rows(self) -> int:
        """The rows of x that fit into a thread block's shared memory beside two items of each warp; at most 16."""
        return max(self.rows_of(tile) for tile in TILES)

    def rows_of(self, tile: Tile) -> int:
        """Return the rows of x that a shape of the kernel takes."""
        return min(8 * tile.NT, (self._free_bytes(tile) - 2 * self._slot_bytes(tile)) // self._x_bytes)

    @property
    def _x_bytes(self) -> int:
        return 2 * self.weight.padded_columns + 16

    def _slot_bytes(self, tile: Tile) -> int:
        return tile.WARPS * self._items[1]

    def _fixed_bytes(self, tile: Tile) -> int:
        """Return what sums and u take."""
        return tile.sums_bytes + 512 * tile.NT * (self.adapters.n_tiles if self.adapters else 0)

    def _free_bytes(self, tile: Tile) -> int:
        """Return what is left for items and x."""
        taken = fixed_shared_bytes(self.weight.encoding) + _BARRIER_BYTES + self._fixed_bytes(tile)
        return int(self._properties.shared_memory_per_block_optin) - taken

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Write the product of x (M, x_columns) to ``out`` (M, N), in x's dtype or float32, and return it.

        ``out``: a new one in x's dtype unless given.

        Raises:
            ValueError: M is 0 or more than ``most_rows``.
        """
        if not 0 < x.shape[0] <= self.most_rows:
            raise ValueError(f"{x.shape[0]} rows of x, of 1 to {self.most_rows}")
        key = stream_of(x), x.shape[0]
        found = self._launches.get(key)
        if found is None:
            with uncaptured(self.device):
                found = self._launches[key] = self._launch(*key)
        arguments, launch, _ = found
        out = x.new_empty(x.shape[0], self.weight.n_rows) if out is None else out
        arguments.x, arguments.y = x.data_ptr(), out.data_ptr()
        arguments.y_pitch, arguments.wide = out.stride(0), int(out.dtype == torch.float32)
        launch(key[0])
        return out

    def _launch(self, stream: int, batch: int) -> tuple[_Arguments, Launch, tuple[torch.Tensor, ...]]:
        weight, adapters = self.weight, self.adapters
        tile = next(tile for tile in TILES if batch <= self.rows_of(tile))
        items, item_bytes = self._items
        n_items = items.shape[0] * items.shape[1]
        n_blocks = min(self._properties.multi_processor_count, n_items)
        n_tiles = adapters.n_tiles if adapters else 0
        slot_bytes = self._slot_bytes(tile)
        room = min(self._free_bytes(tile) - batch * self._x_bytes, max(2 * slot_bytes, _RING_BYTES))
        depth = min(room // slot_bytes, _MOST_DEPTH)
        counters = torch.zeros(n_blocks, dtype=torch.int32, device=self.device)  # first: asked for before the wait
        partial = workspace(self.device, stream, "row pairs", n_blocks * _PAIR * tile.NT * 128)
        n_parts = max(4, 2 * _PARTS_OF_A * n_tiles * tile.NT * 128)
        u_partial = torch.full((n_parts,), EMPTY, dtype=torch.int32, device=self.device)
        arguments = _Arguments(
            slabs=address(weight.slabs), items=address(items), bias=address(self.bias), partial=address(partial),
            u_partial=address(u_partial), counters=address(counters), n_rows=weight.n_rows,
            n_columns=weight.x_columns, batch=batch, n_slabs=weight.n_slabs, rank_tiles=n_tiles,
            block_steps=adapters.block_tiles if adapters else 0, a_parts=_PARTS_OF_A, item_bytes=item_bytes,
            depth=depth, x_shift=_chunk_shift(weight.n_slabs), **addresses(adapters), **shares(n_items, n_blocks),
        )  # fmt: skip
        options = definitions(weight.encoding, weight.dtype, **asdict(tile))
        handle = function("skinny_linear.cu", "skinny_linear", options, self.device.index)
        shared_bytes = depth * slot_bytes + batch * self._x_bytes + self._fixed_bytes(tile)
        launch = Launch(handle, (n_blocks, 1, 1), (tile.WARPS + _FINISHERS) * 32, shared_bytes, [arguments])
        return arguments, launch, (partial, u_partial, counters)


def _chunk_shift(n_slabs: int) -> int:
    """Return log2 of the slabs in a chunk of x, so that there are few chunks."""
    return max(_LEAST_CHUNK_SHIFT, (-(-n_slabs // _MOST_CHUNKS) - 1).bit_length())
