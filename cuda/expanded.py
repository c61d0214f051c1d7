"""Products with many rows of x: the weight is expanded to 16 bits in parts, each multiplied by cuBLAS.

Invariant: a product needs one dense workspace, a part of the weight at a time. B's columns stand beside W's, and u =
A x beside x, or y is read and written once more where that is less than copying x.

Launches and the workspace belong to one thread at a time. A buffer that a graph captured lives as long as the product.

Expanding the next part on a second stream while cuBLAS multiplies this one (the paper's two stages) was slower than one
after the other: both want the same places on the SMs.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from .beside import Factors
from .compilation import function
from .device_layout import BLOCK_ROWS, SlabWeight, definitions, fixed_shared_bytes
from .launching import ONE_AT_A_TIME, Launch, aligned, is_capturing, stream_of

_PART_BYTES = 256 * 2**20
_BLOCKS_PER_SM = 3
_MOST_BUFFERS = 3  # slabs in shared memory: the next ones on their way
_TILES_BYTES = 16 * 16 * 144


class ExpandedProduct:
    """y = x W^T + adapters + bias for x (M, K) of any M, and the gradient of x.

    A part of the weight is dense as [W | B], its rows' columns padded.
    """

    def __init__(self, weight: SlabWeight, factors: Factors | None, bias: torch.Tensor | None) -> None:
        self.weight, self.factors = weight, factors
        self._bias = None if bias is None else bias.to(weight.dtype)
        self._n_columns = weight.padded_columns + (0 if factors is None else len(factors.scaled_A))
        #: whether x is copied beside u: it is not where y is smaller than x
        self._copies_x = factors is not None and weight.n_rows >= weight.padded_columns
        self._captured: list[torch.Tensor] = []
        self._whole: tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]] | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (M, N) of x (M, x_columns), aligned, a part of the weight at a time."""
        if not x.shape[0]:
            return x.new_empty(0, self.weight.n_rows)
        with ONE_AT_A_TIME:
            return self._by_parts(x)

    def _by_parts(self, x: torch.Tensor) -> torch.Tensor:
        n_rows, rows = self.weight.n_rows, _rows_of_part(self._n_columns, self.weight.n_row_blocks)
        buffer = _buffer(x.device, stream_of(x), self.weight.dtype, rows * self._n_columns)
        if is_capturing(x.device):
            self._captured.append(buffer)
        if rows >= n_rows:
            return self._multiply(self._sides(x), self._whole_in(buffer), self._bias)
        sides, out = self._sides(x), x.new_empty(x.shape[0], n_rows)
        for start in range(0, n_rows, rows):
            part = slice(start, min(start + rows, n_rows))
            dense = self._expand(_matrix_in(buffer, part.stop - start, self._n_columns), start)
            bias = None if self._bias is None else self._bias[part]
            self._multiply(sides, self._factors_of(dense), bias, out[:, part])
        return out

    def decode(self) -> torch.Tensor:
        """Return [W | B] (N, K padded + R)."""
        weight = self.weight
        with ONE_AT_A_TIME:
            return self._expand(weight.slabs.new_empty(weight.n_rows, self._n_columns, dtype=weight.dtype), 0)

    def multiply(self, x: torch.Tensor, decoded: torch.Tensor | None) -> torch.Tensor:
        """Return the product (M, N) for x (M, K), with a weight that was decoded or by parts."""
        x = aligned(self.weight.padded(x))
        if decoded is None or not x.shape[0]:
            return self(x)
        with ONE_AT_A_TIME:
            return self._multiply(self._sides(x), self._factors_of(decoded), self._bias)

    def input_gradient(self, gradient: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x (M, K) for that of y (M, N)."""
        wide, columns, n_columns = gradient @ decoded, self.weight.padded_columns, self.weight.n_columns
        if self.factors is not None:
            of_x, of_u = wide.split_with_sizes((columns, wide.shape[1] - columns), 1)
            wide = torch.addmm(of_x, of_u, self.factors.scaled_A)
        return wide if wide.shape[1] == n_columns else wide[:, :n_columns]

    @functools.cached_property
    def _expansion(self) -> Expansion:
        return Expansion(self.weight)

    @functools.cached_property
    def _beside(self) -> Callable[[torch.Tensor], torch.Tensor]:
        assert self.factors is not None
        return self.factors.beside(self.weight)

    def _whole_in(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Expand the whole weight into a workspace and return what x is multiplied by; views are made once."""
        if self._whole is None or self._whole[0] is not buffer:
            dense = _matrix_in(buffer, self.weight.n_rows, self._n_columns)
            self._whole = buffer, dense, self._factors_of(dense)
        self._expand(self._whole[1], 0)
        return self._whole[2]

    def _expand(self, dense: torch.Tensor, start: int) -> torch.Tensor:
        """Write [W | B] from row ``start``, a multiple of 256, to ``dense`` and return it."""
        self._expansion(dense, start)
        if self.factors is not None:
            self.factors.write_B(start, dense)
        return dense

    def _factors_of(self, dense: torch.Tensor) -> list[torch.Tensor]:
        """Return what ``_sides`` are multiplied by, of rows of [W | B]: all of them, or W and B."""
        if self._copies_x:
            return [dense.T]
        of_x = dense[:, : self.weight.x_columns].T
        return [of_x] if self.factors is None else [of_x, dense[:, self.weight.padded_columns :].T]

    def _sides(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return [x | u] whole, or x and u where y is smaller than x."""
        if self.factors is None:
            return [x]
        return [self._beside(x)] if self._copies_x else [x, x @ self.factors.scaled_A[:, : x.shape[1]].T]

    def _multiply(
        self,
        sides: list[torch.Tensor],
        weights: list[torch.Tensor],
        bias: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the sum of products and bias."""
        y = (
            torch.mm(sides[0], weights[0], out=out)
            if bias is None
            else torch.addmm(bias, sides[0], weights[0], out=out)
        )
        return y if len(sides) == 1 else y.addmm_(sides[1], weights[1])


class Expansion:
    """The launch that writes rows of a weight, dense, in 16 bits."""

    def __init__(self, weight: SlabWeight) -> None:
        self._n_slabs, device = weight.n_slabs, weight.slabs.device.index
        properties: Any = torch.cuda.get_device_properties(device)
        buffer_bytes = -(-weight.largest_slab_bytes // 128) * 128
        fixed = fixed_shared_bytes(weight.encoding)
        room = (properties.shared_memory_per_block_optin - fixed - _TILES_BYTES) // buffer_bytes
        buffers = max(1, min(room, _MOST_BUFFERS))
        shared_bytes = buffers * buffer_bytes + _TILES_BYTES
        all_bytes = shared_bytes + fixed
        per_sm = max(1, min(_BLOCKS_PER_SM, properties.shared_memory_per_multiprocessor // all_bytes))
        self._most_blocks = per_sm * properties.multi_processor_count
        self._to, self._first, self._rows, self._pitch = ctypes.c_void_p(), *(ctypes.c_int() for _ in range(3))
        arguments = [
            *(ctypes.c_void_p(t.data_ptr()) for t in (weight.slabs, weight.offsets)), self._to,
            ctypes.c_int(weight.n_slabs), self._first, self._rows, self._pitch, ctypes.c_int(buffer_bytes),
        ]  # fmt: skip
        options = definitions(weight.encoding, weight.dtype, BUFFERS=buffers)
        handle = function("expand.cu", "expand", options, device)
        self._launch = Launch(handle, (1, 1, 1), 512, shared_bytes, arguments, is_dependent=False)

    def __call__(self, dense: torch.Tensor, first_row: int) -> None:
        """Write rows from ``first_row``, a multiple of 256, to ``dense`` (rows, pitch) with pitch >= K padded."""
        rows = dense.shape[0]
        self._to.value, self._first.value = dense.data_ptr(), first_row // BLOCK_ROWS
        self._rows.value, self._pitch.value = rows, dense.stride(0)
        n_slabs = -(-rows // BLOCK_ROWS) * self._n_slabs
        self._launch.over(min(n_slabs, self._most_blocks))(stream_of(dense))


def _rows_of_part(n_columns: int, n_row_blocks: int) -> int:
    return BLOCK_ROWS * max(1, min(n_row_blocks, _PART_BYTES // (n_columns * 2 * BLOCK_ROWS)))


def _matrix_in(buffer: torch.Tensor, n_rows: int, n_columns: int) -> torch.Tensor:
    return buffer[: n_rows * n_columns].view(n_rows, n_columns)


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
