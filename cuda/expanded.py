"""Products with many rows of x: the weight is expanded to 16 bits in parts, each multiplied by cuBLAS.

Invariant: a product needs one dense workspace, a part of the weight at a time. It holds W + scaling B A, rounded once
to 16 bits, as a dense model does whose adapters were merged: nothing is left to be done beside cuBLAS's own product.
Only adapters of more ranks than kernels take are multiplied apart.

Launches and the workspace belong to one thread at a time. A buffer that a graph captured lives as long as the product.

Expanding the next part on a second stream while cuBLAS multiplies this one (the paper's two stages) was slower than one
after the other: both want the same places on the SMs.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import torch

from .compilation import function
from .device_layout import BLOCK_ROWS, SlabWeight, definitions, fixed_shared_bytes
from .launching import ONE_AT_A_TIME, Launch, address, aligned, fields, is_capturing, stream_of, uncaptured
from .low_rank import A_TILE_BYTES, B_TILE_BYTES, Fragments, Matrices, addresses, second_operand

_PART_BYTES = 512 * 2**20
#: slabs that each multiprocessor has, from which on one thread block expands them, measured on an H100
_LONG_RUN = 16
#: expand.cu: slabs in shared memory, the next ones on their way
_MOST_BUFFERS = 4


class ExpandedProduct:
    """y = x (W + scaling B A)^T + bias for x (M, K) of any M, and the gradient of x.

    Args:
        weight: the slabs.
        adapters: in fragment order, or as matrices where they have more ranks than kernels take; None without.
        bias: (N,), or None.
    """

    def __init__(self, weight: SlabWeight, adapters: Fragments | Matrices | None, bias: torch.Tensor | None) -> None:
        self.weight, self.adapters = weight, adapters
        self._bias = None if bias is None else bias.to(weight.dtype)
        self._captured: list[torch.Tensor] = []

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (M, N) of x (M, x_columns), aligned, a part of the weight at a time."""
        if not x.shape[0]:
            return x.new_empty(0, self.weight.n_rows)
        with ONE_AT_A_TIME:
            return self._by_parts(x)

    def _by_parts(self, x: torch.Tensor) -> torch.Tensor:
        n_rows, n_columns = self.weight.n_rows, self.weight.padded_columns
        rows = min(n_rows, _rows_of_part(n_columns, self.weight.n_row_blocks))
        buffer = _buffer(x.device, stream_of(x), self.weight.dtype, rows * n_columns)
        if is_capturing(x.device):
            self._captured.append(buffer)
        dense = buffer[: rows * n_columns].view(rows, n_columns)
        if rows == n_rows:
            return self._multiply(x, self._expand(dense, 0))
        out = x.new_empty(x.shape[0], n_rows)
        for start in range(0, n_rows, rows):
            part = slice(start, min(start + rows, n_rows))
            self._multiply(x, self._expand(dense[: part.stop - start], start), start, out[:, part])
        return out

    def decode(self) -> torch.Tensor:
        """Return W + scaling B A (N, K padded), or W where adapters are multiplied apart."""
        weight = self.weight
        with ONE_AT_A_TIME:
            return self._expand(weight.slabs.new_empty(weight.n_rows, weight.padded_columns, dtype=weight.dtype), 0)

    def multiply(self, x: torch.Tensor, decoded: torch.Tensor | None) -> torch.Tensor:
        """Return the product (M, N) for x (M, K), with a weight that was decoded or by parts."""
        x = self.weight.padded(x)
        return self(aligned(x)) if decoded is None else self._multiply(x, decoded)

    def input_gradient(self, gradient: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x (M, K) for that of y (M, N)."""
        wide, n_columns = gradient @ decoded, self.weight.n_columns
        if isinstance(self.adapters, Matrices):
            wide.addmm_(gradient @ self.adapters.lora_B, self.adapters.scaled_A)
        return wide if wide.shape[1] == n_columns else wide[:, :n_columns]

    @functools.cached_property
    def _expansion(self) -> Expansion:
        with uncaptured(self.weight.slabs.device):
            return Expansion(self.weight, self.adapters if isinstance(self.adapters, Fragments) else None)

    def _expand(self, dense: torch.Tensor, start: int) -> torch.Tensor:
        """Write rows of the expanded weight from ``start``, a multiple of 256, to ``dense`` and return it."""
        self._expansion(dense, start)
        return dense

    def _multiply(
        self, x: torch.Tensor, dense: torch.Tensor, start: int = 0, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return columns of y for rows of the expanded weight that begin at ``start``."""
        weight = dense.T if x.shape[1] == dense.shape[1] else dense[:, : x.shape[1]].T
        part, bias = slice(start, start + len(dense)), self._bias
        if bias is None:
            y = torch.mm(x, weight, out=out)
        else:
            y = torch.addmm(bias if out is None else bias[part], x, weight, out=out)
        if isinstance(self.adapters, Matrices):
            y.addmm_(x @ self.adapters.scaled_A[:, : x.shape[1]].T, self.adapters.lora_B[part].T)
        return y


class _Arguments(ctypes.Structure):
    _fields_ = fields(
        "slabs slab_offsets lora_a lora_b first_step dense",
        "n_slabs first_block n_rows pitch buffers buffer_bytes a_at rank_tiles block_tiles",
    )


class Expansion:
    """The launch that writes rows of a weight, its adapters merged, dense, in 16 bits."""

    def __init__(self, weight: SlabWeight, adapters: Fragments | None = None) -> None:
        self._n_slabs, device = weight.n_slabs, weight.slabs.device.index
        a = None if adapters is None else second_operand(adapters)
        self._read = weight, adapters, a  # by the launch: kept as long as it is
        tiles = adapters.block_tiles if adapters else 0
        a_at = -(-weight.largest_slab_bytes // 128) * 128
        buffer_bytes = a_at + tiles * A_TILE_BYTES
        properties: Any = torch.cuda.get_device_properties(device)
        shape = _shape_for(weight, buffer_bytes, tiles * B_TILE_BYTES, properties)
        self._most_blocks = shape.blocks_per_sm * properties.multi_processor_count
        known = addresses(adapters) | {"lora_a": address(a)}
        self._arguments = _Arguments(
            slabs=address(weight.slabs), slab_offsets=address(weight.offsets), n_slabs=weight.n_slabs,
            buffers=shape.buffers, buffer_bytes=buffer_bytes, a_at=a_at,
            rank_tiles=adapters.n_tiles if adapters else 0, block_tiles=tiles,
            **{name: known[name] for name in ("lora_a", "lora_b", "first_step")},
        )  # fmt: skip
        chosen = {"BLOCKS_PER_SM": shape.blocks_per_sm, "B_IN_SHARED": int(shape.b_in_shared)}
        handle = function("expand.cu", "expand", definitions(weight.encoding, weight.dtype, **chosen), device)
        shared_bytes = shape.buffers * buffer_bytes + shape.b_in_shared * tiles * B_TILE_BYTES
        self._launch = Launch(handle, (1, 1, 1), 512, shared_bytes, [self._arguments])

    def __call__(self, dense: torch.Tensor, first_row: int) -> None:
        """Write rows from ``first_row``, a multiple of 256, to ``dense`` (rows, pitch) with pitch >= K padded."""
        arguments, rows = self._arguments, dense.shape[0]
        arguments.dense, arguments.first_block = dense.data_ptr(), first_row // BLOCK_ROWS
        arguments.n_rows, arguments.pitch = rows, dense.stride(0)
        n_slabs = -(-rows // BLOCK_ROWS) * self._n_slabs
        self._launch.over(min(n_slabs, self._most_blocks))(stream_of(dense))


class _Shape(NamedTuple):
    blocks_per_sm: int
    b_in_shared: bool
    buffers: int


def _shape_for(weight: SlabWeight, buffer_bytes: int, b_bytes: int, properties: Any) -> _Shape:
    """Return how many thread blocks share a multiprocessor, with two buffers each and, if that fits, B.

    Two are faster where each has few slabs, or no B A to add; one where both would ask shared memory for too much.
    """
    fixed, n_slabs = fixed_shared_bytes(weight.encoding), weight.n_row_blocks * weight.n_slabs
    is_short = not b_bytes or n_slabs < _LONG_RUN * properties.multi_processor_count
    shapes = []
    for b_in_shared in (True, False):
        for blocks in (2, 1) if is_short else (1, 2):
            room = properties.shared_memory_per_multiprocessor // blocks
            room = min(room, properties.shared_memory_per_block_optin) - fixed - b_in_shared * b_bytes
            shapes.append(_Shape(blocks, b_in_shared, min(room // buffer_bytes, _MOST_BUFFERS)))
    return next((shape for shape in shapes if shape.buffers > 1), _Shape(1, False, 1))


def _rows_of_part(n_columns: int, n_row_blocks: int) -> int:
    n_parts = -(-n_row_blocks * BLOCK_ROWS * n_columns * 2 // _PART_BYTES)
    return BLOCK_ROWS * -(-n_row_blocks // min(n_parts, n_row_blocks))


@functools.cache
def _known_buffers(device: torch.device) -> dict[tuple[int, torch.dtype], torch.Tensor]:
    return {}


def _buffer(device: torch.device, stream: int, dtype: torch.dtype, n_elements: int) -> torch.Tensor:
    """Return a stream's workspace, at least as large as asked."""
    known = _known_buffers(device)
    found = known.get((stream, dtype))
    if found is None or found.numel() < n_elements:
        found = known[stream, dtype] = torch.empty(n_elements, dtype=dtype, device=device)
    return found
