"""What stands beside an expanded weight: the columns of lora_B beside W's, and u = scaling * A x beside x.

Invariant: lora_B is stored once, in the fused kernel's order, wherever that kernel takes the rank.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import torch

from .compilation import function
from .device_layout import BLOCK_ROWS, definitions
from .launching import Launch
from .low_rank import Fragments, LowRank, scaled_A


class Factors(Protocol):
    """The factors of a product with an expanded weight: ``scaled_A`` = scaling * lora_A (rank, K padded)."""

    scaled_A: torch.Tensor

    def write_B(self, first: int, out: torch.Tensor) -> None:
        """Write rows of lora_B from ``first``, a multiple of 256, to ``out`` (rows, rank), a part of wider rows."""
        ...


class MatrixFactors:
    """Factors as they came, their rank padded to 8: for ranks beyond what the fused kernel takes."""

    def __init__(self, adapters: LowRank, n_columns: int, dtype: torch.dtype) -> None:
        scaled = (adapters.lora_A.float() * adapters.scaling[:, None]).to(dtype)
        missing = -len(scaled) % 8
        pad = torch.nn.functional.pad
        self.scaled_A = pad(scaled, (0, n_columns - scaled.shape[1], 0, missing)).contiguous()
        self._b = pad(adapters.lora_B.to(dtype), (0, missing))

    def write_B(self, first: int, out: torch.Tensor) -> None:
        """Write rows of lora_B to ``out``."""
        out.copy_(self._b[first : first + len(out)])


class FragmentFactors:
    """Factors of fragments; of stacked layers, each row's ranks are its own layer's and 0 in the others'."""

    def __init__(self, fragments: Fragments) -> None:
        self.scaled_A, self._fragments = scaled_A(fragments), fragments

    def write_B(self, first: int, out: torch.Tensor) -> None:
        """Write rows of lora_B to ``out``."""
        fragments, block = self._fragments, first // BLOCK_ROWS
        pointers = (fragments.lora_B, fragments.first_tile, out)
        sizes = (block, fragments.block_tiles, len(out), out.stride(0))
        grid = -(-len(out) // BLOCK_ROWS), fragments.n_tiles, 1
        _launch("write_ranks", out.device, grid, 512, pointers, sizes)


def beside(x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """Return [x | x A^T] (M, K + ranks) for x (M, K) and A (ranks, K); K and ranks are multiples of 8."""
    wide = x.new_empty(x.shape[0], x.shape[1] + len(a))
    chunks = x.shape[1] // 8
    grid = x.shape[0], -(-chunks // 256), 1
    _launch("copy_rows", x.device, grid, 256, (x.contiguous(), wide), (chunks, wide.shape[1]))
    torch.mm(x, a.T, out=wide[:, x.shape[1] :])
    return wide


def _launch(
    name: str,
    device: torch.device,
    grid: tuple[int, int, int],
    n_threads: int,
    pointers: tuple[torch.Tensor, ...],
    sizes: tuple[int, ...],
) -> None:
    """Launch a kernel of beside.cu on the current stream."""
    handle = function("beside.cu", name, definitions("dense16", torch.bfloat16), device.index)
    arguments: list[Any] = [ctypes.c_void_p(tensor.data_ptr()) for tensor in pointers]
    arguments += map(ctypes.c_int, sizes)
    stream = torch.cuda.current_stream(device).cuda_stream
    Launch(handle, grid, n_threads, 0, arguments, is_dependent=False)(stream)
