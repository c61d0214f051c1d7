"""Products with many rows of x: weights are decoded into registers and multiplied there, never dense in memory.

Invariant: a product is one launch for u and x's order and one for the product. Where the columns of W are split among
thread blocks, sums are added in a fixed order: the same input gives the same bits; all thread blocks are resident then.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch

from .compilation import function
from .device_layout import (
    BLOCK_ROWS,
    HEADER_BYTES,
    SLAB_COLUMNS,
    UNITS,
    SlabWeight,
    definitions,
    fixed_shared_bytes,
    unit_bounds,
)
from .input_tiles import TilesOfInput
from .launching import Launch, address, fields, stream_of, uncaptured
from .low_rank import Fragments, addresses

#: decoded_linear.cu: THREADS by GROUPS, STEPS * HALF_UNITS * STEP_BYTES, HALF_UNITS * EXCHANGED * 512; MAX_STAGES
_THREADS, _STEPS_BYTES, _EXCHANGED_BYTES = {1: 384, 2: 640}, 2 * 8 * 512, 8 * 4 * 512
_FEWEST_STAGES, _MOST_STAGES = 3, 16
#: NT of the shapes that are launched, 8 * NT rows of x a tile, and their GROUPS
TILES_OF_ROWS = {4: 2, 8: 2, 16: 1, 32: 1}
#: of clusters that split tiles, how many may be left out so that each has a part of one tile only
_LEFT_OUT = 0.3
# Microseconds, measured on an H100.
#: the launch before: once, for a slab, and for a slab of a row of x
_INPUT_US, _INPUT_SLAB_US, _INPUT_ROW_US = 4.0, 0.02, 1e-4
#: by NT: a slab's products, and more for each tile of x that is on its way; what is done once, and for each tile
_SLAB_US, _LATER_US, _MOST_LATER = {4: 0.45, 8: 0.455, 16: 0.655, 32: 0.8}, 0.015, 6
_ONCE_US, _TILE_US = {4: 4.0, 8: 4.0, 16: 5.0, 32: 5.5}, 1.0
#: by NT: tiles that are split, where clusters have a part of one tile, and of two
_SPLIT_US = {4: (5.5, 12.0), 8: (5.5, 12.0), 16: (6.0, 11.0), 32: (10.0, 20.0)}


@dataclass(frozen=True)
class Shape:
    """How a product is cut: tiles of 8 * NT rows of x, of which ``n_whole`` are not split among clusters."""

    NT: int
    n_tiles: int
    n_whole: int

    @property
    def rows(self) -> int:
        """Rows of x in a tile."""
        return 8 * self.NT


@functools.cache
def shape_for(batch: int, n_row_blocks: int, n_slabs: int, clusters: int) -> Shape:
    """Return how to cut a product, by an estimate of its time."""
    candidates = []
    for nt in TILES_OF_ROWS:
        n_tiles = -(-batch // (8 * nt)) * n_row_blocks
        candidates += [Shape(nt, n_tiles, n_tiles), Shape(nt, n_tiles, n_tiles // clusters * clusters)]
    return min(candidates, key=lambda shape: _estimate(shape, batch, n_row_blocks, n_slabs, clusters))


def estimated_us(batch: int, n_row_blocks: int, n_slabs: int, clusters: int) -> float:
    """Return about how long a product takes."""
    shape = shape_for(batch, n_row_blocks, n_slabs, clusters)
    return _estimate(shape, batch, n_row_blocks, n_slabs, clusters)


def _estimate(shape: Shape, batch: int, n_row_blocks: int, n_slabs: int, clusters: int) -> float:
    later = min(shape.n_tiles // n_row_blocks, _MOST_LATER) * _LATER_US if shape.NT == 32 else 0.0
    tile_us = n_slabs * (_SLAB_US[shape.NT] + later)
    us = _INPUT_US + n_slabs * (_INPUT_SLAB_US + batch * _INPUT_ROW_US) + _ONCE_US[shape.NT]
    us += -(-shape.n_whole // clusters) * (tile_us + _TILE_US)
    split = shape.n_tiles - shape.n_whole
    if split == 0:
        return us
    sharers = split_among(split, n_slabs, clusters)
    return us + split / sharers * tile_us + _SPLIT_US[shape.NT][sharers % split != 0]


def split_among(n_tiles: int, n_slabs: int, clusters: int) -> int:
    """Return how many clusters the slabs of split tiles are divided among, pairs of slabs at the finest."""
    each = min(clusters // n_tiles, n_slabs // 2)
    if n_tiles * each >= (1 - _LEFT_OUT) * clusters:
        return n_tiles * each
    return min(clusters, n_tiles * n_slabs // 2)


def clusters_of(device: torch.device) -> int:
    """Return how many pairs of thread blocks run on a device at the same time."""
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.multi_processor_count) // 2


class _Arguments(ctypes.Structure):
    _fields_ = fields(
        "slabs halves lora_b first_step x u bias y partial counters",
        "n_rows batch slabs_per_block block_steps u_steps n_row_blocks n_m_tiles n_whole split_clusters x_at "
        "stage_bytes stages",
    )


class DecodedProduct:
    """y = x W^T + u B^T + bias, u = (x A^T) scaling, for x (M, x_columns) of any M.

    Args:
        weight: the slabs, on a GPU of compute capability 9.0.
        adapters: in fragment order, or None.
        bias: (N,) float32, or None.
    """

    def __init__(self, weight: SlabWeight, adapters: Fragments | None, bias: torch.Tensor | None) -> None:
        self.weight, self._adapters, self._bias = weight, adapters, bias
        device = weight.slabs.device
        properties: Any = torch.cuda.get_device_properties(device)
        self.clusters = clusters_of(device)
        self._shared_bytes = properties.shared_memory_per_block_optin - fixed_shared_bytes(weight.encoding)
        self._halves = halves(weight)
        begins = self._halves.to(torch.int64)
        largest = 16 * int((begins[1:] - begins[:-1]).max()) + HEADER_BYTES
        self._x_at = -(-max(largest, _STEPS_BYTES if adapters else 0) // 128) * 128
        self._input = TilesOfInput(weight, adapters)
        self._launches: dict[int, tuple[_Arguments, Launch, int]] = {}

    def __call__(self, x: torch.Tensor, shape: Shape | None = None) -> torch.Tensor:
        """Return the product (M, N) of x (M, x_columns), contiguous, in its dtype.

        ``shape``: of ``shape_for``'s kinds, for as many tiles as x has; chosen by an estimate unless given.
        """
        batch, weight, stream = x.shape[0], self.weight, stream_of(x)
        shape = shape or shape_for(batch, weight.n_row_blocks, weight.n_slabs, self.clusters)
        arguments, launch, resident = self._launch(shape.NT)
        out = x.new_empty(batch, weight.n_rows)
        n_m_tiles = shape.n_tiles // weight.n_row_blocks
        tiles = x.new_empty(n_m_tiles * shape.rows, weight.padded_columns)
        tiles_of_u = x.new_empty(n_m_tiles * shape.rows, self._input.ranks)
        split = shape.n_tiles - shape.n_whole
        sharers = split_among(split, weight.n_slabs, resident) if split else 0
        partial = torch.empty(2 * sharers * BLOCK_ROWS * shape.rows, dtype=torch.float32, device=x.device)
        counters = torch.empty(split * UNITS, dtype=torch.int32, device=x.device)
        self._input(x, shape.rows, tiles, tiles_of_u, stream, counters)
        arguments.x, arguments.u, arguments.y = tiles.data_ptr(), tiles_of_u.data_ptr(), out.data_ptr()
        arguments.partial, arguments.counters = partial.data_ptr(), counters.data_ptr()
        arguments.batch, arguments.n_m_tiles = batch, n_m_tiles
        arguments.n_whole, arguments.split_clusters = shape.n_whole, sharers
        launch.over(2 * max(sharers, min(self.clusters, shape.n_whole)))(stream)
        return out

    def _launch(self, nt: int) -> tuple[_Arguments, Launch, int]:
        """Return the launch for tiles of 8 * ``nt`` rows, its arguments, and how many clusters are resident."""
        found = self._launches.get(nt)
        if found is None:
            with uncaptured(self.weight.slabs.device):
                found = self._launches[nt] = self._made(nt)
        return found

    def _made(self, nt: int) -> tuple[_Arguments, Launch, int]:
        weight, adapters, groups = self.weight, self._adapters, TILES_OF_ROWS[nt]
        stage_bytes = self._x_at + SLAB_COLUMNS * 2 * 8 * nt
        exchanged = (groups - 1) * _EXCHANGED_BYTES
        room = self._shared_bytes - exchanged
        stages = min(_MOST_STAGES, room // stage_bytes)
        if stages < _FEWEST_STAGES:
            raise ValueError(f"{_FEWEST_STAGES} stages of {stage_bytes} bytes, {room} of shared memory")
        of_adapters = addresses(adapters)
        arguments = _Arguments(
            slabs=address(weight.slabs), halves=address(self._halves), lora_b=of_adapters["lora_b"],
            first_step=of_adapters["first_step"], bias=address(self._bias),
            n_rows=weight.n_rows, slabs_per_block=weight.n_slabs, block_steps=adapters.block_tiles if adapters else 0,
            u_steps=adapters.n_tiles if adapters else 0, n_row_blocks=weight.n_row_blocks, x_at=self._x_at,
            stage_bytes=stage_bytes, stages=stages,
        )  # fmt: skip
        chosen = definitions(weight.encoding, weight.dtype, NT=nt, GROUPS=groups)
        kernel = function("decoded_linear.cu", "decoded_linear", chosen, weight.slabs.device.index)
        shared_bytes = stages * stage_bytes + exchanged
        launch = Launch(kernel, (1, 1, 1), _THREADS[groups], shared_bytes, [arguments])
        return arguments, launch, min(self.clusters, launch.clusters_at_once(2))


def halves(weight: SlabWeight) -> torch.Tensor:
    """Return where each slab's units 0 and 8 begin, and the end, (2 * slabs + 1,) int32 in units of 16 bytes."""
    begins = unit_bounds(weight)[:, : UNITS : UNITS // 2].flatten()
    return torch.cat([begins, weight.offsets[-1:] + HEADER_BYTES // 16])
