"""Products with many rows of x: the weight is expanded to 16 bits in parts, each multiplied by cuBLAS.

Invariant: a product needs one dense workspace, a part of the weight at a time. B's columns stand beside W's, and u =
A x beside x, or y is read and written once more where that is less than copying x.

Expanding the next part on a second stream while cuBLAS multiplies this one (the paper's two stages) was slower than one
after the other: both want the same places on the SMs.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .beside import Factors, beside
from .compilation import function
from .device_layout import BLOCK_ROWS, SlabWeight, definitions, fixed_shared_bytes
from .launching import Launch

_PART_BYTES = 256 * 2**20
_BLOCKS_PER_SM = 3
_TILES_BYTES = 16 * 16 * 144


class ExpandedProduct:
    """y = x W^T + adapters + bias for x (M, K padded) of any M, and the gradient of x.

    A part of the weight is dense as [W | B], its rows' columns padded.
    """

    def __init__(self, weight: SlabWeight, factors: Factors | None, bias: torch.Tensor | None) -> None:
        self.weight, self.factors = weight, factors
        self._bias = None if bias is None else bias.to(weight.dtype)
        self._n_columns = weight.padded_columns + (0 if factors is None else len(factors.scaled_A))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (M, N) of x (M, K padded), a part of the weight at a time."""
        sides, n_rows = self._sides(x), self.weight.n_rows
        out = x.new_empty(x.shape[0], n_rows)
        rows = _rows_of_part(self._n_columns, self.weight.n_row_blocks)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        buffer = _buffer(x.device, stream, self.weight.dtype, rows * self._n_columns)
        for start in range(0, n_rows, rows):
            stop = min(start + rows, n_rows)
            dense = buffer[: (stop - start) * self._n_columns].view(stop - start, -1)
            self._expand(dense, start)
            self._multiply(sides, dense, start, out[:, start:stop])
        return out

    @property
    def decoded_like(self) -> torch.Tensor:
        """One zero in the shape of [W | B] (N, K padded + R)."""
        zero = torch.zeros((), dtype=self.weight.dtype, device=self.weight.slabs.device)
        return zero.expand(self.weight.n_rows, self._n_columns)

    def decode(self) -> torch.Tensor:
        """Return [W | B] (N, K padded + R)."""
        dense = torch.empty_like(self.decoded_like, memory_format=torch.contiguous_format)
        self._expand(dense, 0)
        return dense

    def multiply(self, x: torch.Tensor, decoded: torch.Tensor | None) -> torch.Tensor:
        """Return the product (M, N) for x (M, K), with a weight that was decoded or by parts."""
        x = self.weight.padded(x)
        if decoded is None:
            return self(x)
        out = x.new_empty(x.shape[0], self.weight.n_rows)
        self._multiply(self._sides(x), decoded, 0, out)
        return out

    def input_gradient(self, gradient: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Return the gradient of x (M, K) for that of y (M, N)."""
        wide, columns = gradient @ decoded, self.weight.padded_columns
        if self.factors is None:
            return wide[:, : self.weight.n_columns]
        result = torch.addmm(wide[:, :columns], wide[:, columns:], self.factors.scaled_A)
        return result[:, : self.weight.n_columns]

    def _expand(self, dense: torch.Tensor, start: int) -> None:
        """Write [W | B] from row ``start``, a multiple of 256, to ``dense``."""
        expand(self.weight, dense, start, torch.cuda.current_stream(dense.device).cuda_stream)
        if self.factors is not None:
            self.factors.write_B(start, dense[:, self.weight.padded_columns :])

    def _sides(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return what is multiplied by [W | B]: [x | u] whole, or x and u where y is smaller than x."""
        if self.factors is None:
            return [x]
        if self.weight.n_rows >= x.shape[1]:
            return [beside(x, self.factors.scaled_A)]
        return [x, x @ self.factors.scaled_A.T]

    def _multiply(self, sides: list[torch.Tensor], dense: torch.Tensor, start: int, out: torch.Tensor) -> None:
        """Write the product with rows of [W | B] from ``start`` to ``out``."""
        columns = slice(start, start + len(dense))
        first, *rest = sides
        weight = dense[:, : first.shape[1]].T
        if self._bias is None:
            torch.mm(first, weight, out=out)
        else:
            torch.addmm(self._bias[columns], first, weight, out=out)
        for side in rest:
            out.addmm_(side, dense[:, first.shape[1] :].T)


def expand(weight: SlabWeight, dense: torch.Tensor, first_row: int, stream: int) -> None:
    """Write rows from ``first_row``, a multiple of 256, to ``dense`` (rows, pitch) with pitch >= K padded."""
    device = weight.slabs.device.index
    properties = torch.cuda.get_device_properties(device)
    handle = function("expand.cu", "expand", definitions(weight.encoding, weight.dtype), device)
    buffer_bytes = -(-weight.largest_slab_bytes // 128) * 128
    shared_bytes = 3 * buffer_bytes + _TILES_BYTES
    all_bytes = shared_bytes + fixed_shared_bytes(weight.encoding)
    per_sm = max(1, min(_BLOCKS_PER_SM, properties.shared_memory_per_multiprocessor // all_bytes))
    arguments = [
        *(ctypes.c_void_p(t.data_ptr()) for t in (weight.slabs, weight.offsets, dense)),
        *map(ctypes.c_int, (weight.n_slabs, first_row // BLOCK_ROWS, *dense.shape[:1], dense.stride(0), buffer_bytes)),
    ]
    n_slabs = -(-dense.shape[0] // BLOCK_ROWS) * weight.n_slabs
    grid = min(n_slabs, per_sm * properties.multi_processor_count), 1, 1
    Launch(handle, grid, 512, shared_bytes, arguments, is_dependent=False)(stream)


def _rows_of_part(n_columns: int, n_row_blocks: int) -> int:
    return BLOCK_ROWS * max(1, min(n_row_blocks, _PART_BYTES // (n_columns * 2 * BLOCK_ROWS)))


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
