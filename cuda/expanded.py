"""Products with many rows of x: the weight is expanded to 16 bits in parts, each multiplied by cuBLAS.

Invariant: no more than a workspace of parts is ever dense; the next part is expanded while the current one is
multiplied (the paper's two stages). B's columns stand beside W's and A x beside x: adapters cost no extra pass over y.
"""

from __future__ import annotations

import ctypes
import functools

import torch

from .compilation import function
from .device_layout import BLOCK_ROWS, SlabWeight, definitions
from .launching import Launch
from .low_rank import LowRank

_PART_BYTES = 64 * 2**20
_N_BUFFERS = 2
_BLOCKS_PER_SM = 3
_RANK_MULTIPLE = 8  # rows of the workspace begin at 16 bytes


class ExpandedProduct:
    """y = x W^T + adapters + bias for x (M, K padded) of any M."""

    def __init__(self, weight: SlabWeight, adapters: LowRank | None, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.lora_A = self.lora_B = None
        if adapters is not None:
            missing = weight.padded_columns - weight.n_columns
            scaled = (adapters.lora_A.float() * adapters.scaling[:, None]).to(weight.dtype)
            ranks = -len(scaled) % _RANK_MULTIPLE
            self.lora_A = torch.nn.functional.pad(scaled, (0, missing, 0, ranks)).contiguous()
            self.lora_B = torch.nn.functional.pad(adapters.lora_B.to(weight.dtype), (0, ranks))
        self._bias = None if bias is None else bias.to(weight.dtype)

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Write the product of x (M, K padded) to ``out`` (M, N) and return it."""
        device, weight = x.device, self.weight
        rank = 0 if self.lora_A is None else self.lora_A.shape[0]
        wide = self._beside_u(x, rank)
        rows = _rows_of_part(wide.shape[1], weight.n_row_blocks)
        buffers = _buffers(device, torch.cuda.current_stream(device).cuda_stream, rows * wide.shape[1], weight.dtype)
        main, side = torch.cuda.current_stream(device), _side_stream(device)
        starts = range(0, weight.n_rows, rows)
        expanded, used = [_event() for _ in starts], [_event() for _ in starts]
        side.wait_stream(main)
        for i, start in enumerate(starts):
            stop = min(start + rows, weight.n_rows)
            dense = buffers[i % _N_BUFFERS][: (stop - start) * wide.shape[1]].view(stop - start, -1)
            with torch.cuda.stream(side):
                if i >= _N_BUFFERS:
                    side.wait_event(used[i - _N_BUFFERS])
                self._expand(dense, start, side.cuda_stream)
                if self.lora_B is not None:
                    dense[:, weight.padded_columns :].copy_(self.lora_B[start:stop])
                expanded[i].record(side)
            main.wait_event(expanded[i])
            part = out[:, start:stop]
            if self._bias is None:
                torch.mm(wide, dense.T, out=part)
            else:
                torch.addmm(self._bias[start:stop], wide, dense.T, out=part)
            used[i].record(main)
        return out

    def _beside_u(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        """Return [x | scaled A x]."""
        if self.lora_A is None:
            return x
        wide = x.new_empty(x.shape[0], x.shape[1] + rank)
        wide[:, : x.shape[1]].copy_(x)
        torch.mm(x, self.lora_A.T, out=wide[:, x.shape[1] :])
        return wide

    def _expand(self, dense: torch.Tensor, first_row: int, stream: int) -> None:
        weight = self.weight
        expand(weight, dense, first_row, stream)


def expand(weight: SlabWeight, dense: torch.Tensor, first_row: int, stream: int) -> None:
    """Write rows from ``first_row``, a multiple of 256, to ``dense`` (rows, pitch) with pitch >= K padded."""
    device = weight.slabs.device.index
    properties = torch.cuda.get_device_properties(device)
    handle = function("expand.cu", "expand", definitions(weight.encoding, weight.dtype), device)
    buffer_bytes = -(-weight.largest_slab_bytes // 128) * 128
    per_sm = max(1, min(_BLOCKS_PER_SM, properties.shared_memory_per_multiprocessor // (3 * buffer_bytes + 4096)))
    arguments = [
        *(ctypes.c_void_p(t.data_ptr()) for t in (weight.slabs, weight.offsets, dense)),
        *map(ctypes.c_int, (weight.n_slabs, first_row // BLOCK_ROWS, *dense.shape[:1], dense.stride(0), buffer_bytes)),
    ]
    n_slabs = -(-dense.shape[0] // BLOCK_ROWS) * weight.n_slabs
    grid = min(n_slabs, per_sm * properties.multi_processor_count), 1, 1
    Launch(handle, grid, 512, 3 * buffer_bytes + 128, arguments, is_dependent=False)(stream)


def _rows_of_part(n_columns: int, n_row_blocks: int) -> int:
    return BLOCK_ROWS * max(1, min(n_row_blocks, _PART_BYTES // (n_columns * 2 * BLOCK_ROWS)))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@functools.cache
def _known_buffers(device: torch.device) -> dict[tuple[int, torch.dtype], list[torch.Tensor]]:
    return {}


def _buffers(device: torch.device, stream: int, n_elements: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the two parts' buffers of a stream, at least as large as asked."""
    known = _known_buffers(device).setdefault((stream, dtype), [])
    if not known or known[0].numel() < n_elements:
        known[:] = [torch.empty(n_elements, dtype=dtype, device=device) for _ in range(_N_BUFFERS)]
    return known
