"""The fused product for up to 64 rows of x: one launch for weight, adapters and bias.

Invariant: the same input gives the same bits, whatever else runs. Each stream has its own counters and workspace, for
graphs that were captured on one; launches of two streams must still not run at the same time (linear.py).
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .compilation import Function, function
from .device_layout import SlabWeight, definitions, fixed_shared_bytes
from .launching import Launch, address, fields, stream_of, uncaptured
from .low_rank import A_TILE_BYTES, B_TILE_BYTES, Fragments, addresses
from .schedule import Work, schedule, sharers
from .sums import EMPTY, workspace

LARGEST_BATCH = 64
_ROWS_OF_LAUNCH = (LARGEST_BATCH, 32, 16, 8)
_PARTS_OF_A = {1: 16, 2: 16, 4: 8, 8: 8}  # by NT: more are sooner done, and take longer to add
_A_COST, _B_COST = 1.2, 1.2  # of their bytes against those of W, in time
_FEW_ROWS = 1
_MOST_STAGES = 16
_RING_BYTES = 80 << 10  # more is slower: what an SM is late with waits behind what others have asked for in advance


@dataclass(frozen=True)
class Tile:
    """A compiled shape of the kernel: up to 8 * NT rows of x, WARPS consumer warps, SUB slabs a stage.

    GATHERERS: warps that gather u, as many as registers allow; with none, consumers do.
    """

    NT: int
    WARPS: int
    SUB: int
    GATHERERS: int

    @property
    def n_threads(self) -> int:
        """Threads of a block: consumers, a warp that copies, warps that gather u."""
        return (self.WARPS + 1 + self.GATHERERS) * 32

    @property
    def definitions(self) -> tuple[tuple[str, int], ...]:
        """What the kernel is compiled with."""
        return tuple(asdict(self).items())

    def rows(self, batch: int) -> int:
        """Return how many rows of x a stage gets room for: few, where that leaves room for one more stage."""
        return _FEW_ROWS if batch <= _FEW_ROWS else 8 * self.NT

    def x_bytes(self, rows: int) -> int:
        """Return the shared memory of x in a stage."""
        return rows * (self.SUB * 128 + 16)


TILES = (Tile(1, 8, 2, 7), Tile(2, 8, 2, 7), Tile(4, 8, 2, 7), Tile(8, 8, 2, 3))
#: 17 to 32 rows of 16-bit weights: more warps; and where a thread block has fewest rounds, those who multiply have
#: nothing else to do when u comes
SHORT_TILE, SHORTEST_TILE = Tile(4, 16, 2, 3), Tile(4, 16, 2, 0)
_WIDE_CAPABILITY, _FEWEST_ROUNDS = (9, 0), 8


def rounds_of_block(weight: SlabWeight) -> float:
    """Return how many rounds of two slabs each thread block multiplies where there is one on each SM."""
    n_sms = torch.cuda.get_device_properties(weight.slabs.device).multi_processor_count
    return weight.n_row_blocks * weight.n_slabs / 2 / n_sms


def tile_for(batch: int, encoding: str, capability: tuple[int, int], rounds: float) -> Tile:
    """Return the tile for a number of rows of x; ``rounds`` are those of each thread block."""
    tile = next(tile for tile in TILES if batch <= 8 * tile.NT)
    if tile.NT != SHORT_TILE.NT or capability != _WIDE_CAPABILITY or not encoding.endswith("16"):
        return tile
    return SHORTEST_TILE if rounds < _FEWEST_ROUNDS else SHORT_TILE


class _Arguments(ctypes.Structure):
    _fields_ = fields(
        "slabs slab_offsets lora_a lora_b scaling schedule sharers first_step bias x y partial u_partial counters",
        "n_rows n_columns batch wide slabs_per_block rank_tiles block_steps a_parts weight_bytes stage_bytes stages "
        "y_pitch",
    )


@dataclass(frozen=True)
class _Ring:
    """Shared memory: stages of weights, then x, in a ring, then u; no stages where they do not fit."""

    stages: int
    stage_bytes: int
    weight_bytes: int
    u_bytes: int

    @property
    def shared_bytes(self) -> int:
        """All of it."""
        return self.stages * self.stage_bytes + self.u_bytes


@dataclass(frozen=True)
class _Plan:
    """What one tile shape needs beside the layout: the kernel, its ring, its schedule (kept alive here)."""

    function: Function
    n_blocks: int
    ring: _Ring
    a_parts: int
    schedule: torch.Tensor
    sharers: torch.Tensor
    partial_floats: int
    u_partial_floats: int


class FusedProduct:
    """y = x W^T + adapters + bias for x (M, x_columns), one launch for 64 rows.

    Args:
        weight: the slabs.
        adapters: in fragment order, or None.
        bias: (N,) float32, or None.
    """

    def __init__(self, weight: SlabWeight, adapters: Fragments | None, bias: torch.Tensor | None) -> None:
        self.weight, self.adapters, self.bias = weight, adapters, bias
        self.device = weight.slabs.device
        self._capability = torch.cuda.get_device_capability(self.device)
        self._properties: Any = torch.cuda.get_device_properties(self.device)
        self.rounds = rounds_of_block(weight)
        self._block_steps, self._rank_tiles = (adapters.block_tiles, adapters.n_tiles) if adapters else (0, 0)
        self._first_step = (
            adapters.first_tile if adapters else torch.zeros(weight.n_row_blocks, dtype=torch.int32, device=self.device)
        )
        self._plans: dict[tuple[Tile, int], _Plan] = {}
        self._launches: dict[tuple[Tile, int, int], tuple[_Arguments, Launch, tuple[torch.Tensor, ...]]] = {}

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Write the product of x (M, x_columns) to ``out`` (M, N), in x's dtype or float32, and return it.

        ``out``: a new one in x's dtype unless given. More than ``most_rows`` are multiplied so many at a time.

        Raises:
            ValueError: shared memory has no room for any rows.
        """
        if not self.most_rows:
            room = self._properties.shared_memory_per_block_optin
            raise ValueError(f"{room} bytes of shared memory are too few for these ranks")
        out = x.new_empty(x.shape[0], self.weight.n_rows) if out is None else out
        for start in range(0, x.shape[0], self.most_rows):
            part = slice(start, start + self.most_rows)
            self._multiply(x[part], out[part])
        return out

    def _multiply(self, x: torch.Tensor, out: torch.Tensor) -> None:
        batch = x.shape[0]
        tile = self._tile(batch)
        stream = stream_of(x)
        key = tile, tile.rows(batch), stream
        found = self._launches.get(key)
        if found is None:
            with uncaptured(self.device):
                found = self._launches[key] = self._launch(*key)
        arguments, launch, _ = found
        arguments.x, arguments.y, arguments.batch = x.data_ptr(), out.data_ptr(), batch
        arguments.y_pitch, arguments.wide = out.stride(0), int(out.dtype == torch.float32)
        launch(stream)

    def _launch(self, tile: Tile, x_rows: int, stream: int) -> tuple[_Arguments, Launch, tuple[torch.Tensor, ...]]:
        plan = self._plans.get((tile, x_rows))
        if plan is None:
            plan = self._plans[tile, x_rows] = self._plan(tile, x_rows)
        partial = workspace(self.device, stream, "partial", plan.partial_floats)
        u_partial = torch.full((plan.u_partial_floats,), EMPTY, dtype=torch.int32, device=self.device)
        counters = torch.zeros(plan.n_blocks, dtype=torch.int32, device=self.device)
        weight, adapters = self.weight, self.adapters
        arguments = _Arguments(
            **(addresses(adapters) | {"first_step": address(self._first_step)}),
            slabs=address(weight.slabs), slab_offsets=address(weight.offsets), schedule=address(plan.schedule),
            sharers=address(plan.sharers), bias=address(self.bias), partial=address(partial),
            u_partial=address(u_partial), counters=address(counters),
            n_rows=weight.n_rows, n_columns=weight.x_columns, slabs_per_block=weight.n_slabs,
            rank_tiles=self._rank_tiles,
            block_steps=self._block_steps, a_parts=plan.a_parts, weight_bytes=plan.ring.weight_bytes,
            stage_bytes=plan.ring.stage_bytes, stages=plan.ring.stages,
        )  # fmt: skip
        launch = Launch(
            plan.function, (plan.n_blocks, 1, 1), tile.n_threads, plan.ring.shared_bytes, [arguments],
        )  # fmt: skip
        return arguments, launch, (counters, u_partial, partial)

    @functools.cached_property
    def most_rows(self) -> int:
        """The rows of x that one launch multiplies: 64, fewer or none where shared memory or ranks leave no room."""
        fitting = (rows for rows in _ROWS_OF_LAUNCH if self._ring(self._tile(rows), rows).stages)
        return next(fitting, 0)

    def _tile(self, batch: int) -> Tile:
        return tile_for(batch, self.weight.encoding, self._capability, self.rounds)

    def _ring(self, tile: Tile, x_rows: int) -> _Ring:
        weight = self.weight
        of_a = tile.SUB * self._rank_tiles * A_TILE_BYTES
        of_b = min(self._block_steps, 2 * tile.SUB) * B_TILE_BYTES
        weight_bytes = -(-max(tile.SUB * weight.largest_slab_bytes, of_a, of_b) // 128) * 128
        stage_bytes = -(-(weight_bytes + tile.x_bytes(x_rows)) // 128) * 128
        u_bytes = 512 * self._block_steps * tile.NT
        room = self._properties.shared_memory_per_block_optin
        free_bytes = room - fixed_shared_bytes(weight.encoding) - u_bytes
        stages = min(free_bytes // stage_bytes, max(2, _RING_BYTES // stage_bytes), _MOST_STAGES)
        return _Ring(max(0, stages), stage_bytes, weight_bytes, u_bytes)

    def _work(self, tile: Tile) -> Work:
        weight, chunk = self.weight, 2 * tile.SUB
        return Work(
            n_a=weight.n_slabs // tile.SUB if self._rank_tiles else 0,
            a_bytes=tile.SUB * self._rank_tiles * A_TILE_BYTES * _A_COST,
            n_row_blocks=weight.n_row_blocks,
            rounds_w=weight.n_slabs // tile.SUB,
            w_bytes=weight.slabs.numel() / weight.n_row_blocks / weight.n_slabs * tile.SUB,
            rounds_b=-(-self._block_steps // chunk),
            b_bytes=min(self._block_steps, chunk) * B_TILE_BYTES * _B_COST,
        )

    def _plan(self, tile: Tile, x_rows: int) -> _Plan:
        weight, work = self.weight, self._work(tile)
        n_blocks = min(self._properties.multi_processor_count, work.n_row_blocks * work.rounds_w)
        a_parts = min(work.n_a, _PARTS_OF_A[tile.NT], n_blocks)
        chosen = schedule(work, n_blocks, a_parts)
        options = definitions(weight.encoding, weight.dtype, **dict(tile.definitions))
        return _Plan(
            function=function("fused_linear.cu", "fused_linear", options, self.device.index),
            n_blocks=n_blocks,
            ring=self._ring(tile, x_rows),
            a_parts=a_parts,
            schedule=torch.from_numpy(chosen).to(self.device),
            sharers=torch.from_numpy(sharers(chosen, work)).to(self.device),
            partial_floats=n_blocks * 2 * 256 * 8 * tile.NT,
            u_partial_floats=max(4, 2 * a_parts * self._rank_tiles * tile.NT * 128),
        )
