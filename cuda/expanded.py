"""Products with many rows of x: the weight is expanded to 16 bits in parts, each multiplied by cuBLAS.

Invariant: no more than one workspace is ever dense, a part of the weight at a time. B's columns stand beside W's and A
x beside x: adapters cost no extra pass over y. Expanding the next part on a second stream while cuBLAS multiplies this
one (the paper's two stages) was slower than one after the other: both want the same places on the SMs.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .compilation import function
from .device_layout import BLOCK_ROWS, SlabWeight, definitions, fixed_shared_bytes
from .launching import Launch
from .low_rank import Factors

_PART_BYTES = 256 * 2**20
_BLOCKS_PER_SM = 3
_TILES_BYTES = 16 * 16 * 144


class ExpandedProduct:
    """y = x W^T + adapters + bias for x (M, K padded) of any M."""

    def __init__(self, weight: SlabWeight, factors: Factors | None, bias: torch.Tensor | None) -> None:
        self.weight, self.factors = weight, factors
        self._bias = None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the product of x (M, K padded) to ``out`` (M, N) and return it."""
        weight = self.weight
        wide = self._beside_u(x)
        rows = _rows_of_part(wide.shape[1], weight.n_row_blocks)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        buffer = _buffer(x.device, stream, weight.dtype, rows * wide.shape[1])
        for start in range(0, weight.n_rows, rows):
            stop = min(start + rows, weight.n_rows)
            dense = buffer[: (stop - start) * wide.shape[1]].view(stop - start, -1)
            expand(weight, dense, start, stream)
            if self.factors is not None:
                self.factors.write_B(start, stop, dense[:, weight.padded_columns :])
            if self._bias is None:
                torch.mm(wide, dense.T, out=out[:, start:stop])
            else:
                torch.addmm(self._bias[start:stop], wide, dense.T, out=out[:, start:stop])
        return out

    def _beside_u(self, x: torch.Tensor) -> torch.Tensor:
        """Return [x | scaled A x]."""
        if self.factors is None:
            return x
        scaled_a = self.factors.scaled_A
        wide = x.new_empty(x.shape[0], x.shape[1] + len(scaled_a))
        wide[:, : x.shape[1]].copy_(x)
        torch.mm(x, scaled_a.T, out=wide[:, x.shape[1] :])
        return wide


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
