"""What stands beside an expanded weight: the columns of lora_B beside W's, and u = scaling * A x beside x.

Invariant: lora_B is stored once, in the fused kernel's order, wherever that kernel takes the rank.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch

from .compilation import ASYNC_CAPABILITY, function
from .device_layout import BLOCK_ROWS, SlabWeight, definitions
from .input_tiles import TilesOfInput
from .launching import Launch, stream_of
from .low_rank import RANKS_OF_TILE, Fragments, LowRank, scaled_A


class Factors(Protocol):
    """The factors of a product with an expanded weight: ``scaled_A`` = scaling * lora_A (rank, K padded)."""

    scaled_A: torch.Tensor

    def write_B(self, first: int, wide: torch.Tensor) -> None:
        """Write rows of lora_B from ``first``, a multiple of 256, to the last columns of ``wide`` (rows, columns)."""
        ...

    def beside(self, weight: SlabWeight) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what gives [x | 0 | u] (M, K padded + ranks) for x (M, x_columns) of a weight."""
        ...


class MatrixFactors:
    """Factors as they came, their rank padded to 8: for ranks beyond what the fused kernel takes."""

    def __init__(self, adapters: LowRank, n_columns: int, dtype: torch.dtype) -> None:
        scaled = (adapters.lora_A.float() * adapters.scaling[:, None]).to(dtype)
        missing = -len(scaled) % 8
        pad = torch.nn.functional.pad
        self.scaled_A = pad(scaled, (0, n_columns - scaled.shape[1], 0, missing)).contiguous()
        self._b = pad(adapters.lora_B.to(dtype), (0, missing))

    def write_B(self, first: int, wide: torch.Tensor) -> None:
        """Write rows of lora_B to the last columns of ``wide``."""
        rows = self._b[first : first + len(wide)]
        wide[:, -rows.shape[1] :].copy_(rows)

    def beside(self, weight: SlabWeight) -> Beside:
        """Return what copies x and multiplies it by A."""
        return Beside(self.scaled_A)


class FragmentFactors:
    """Factors of fragments; of stacked layers, each row's ranks are its own layer's and 0 in the others'."""

    def __init__(self, fragments: Fragments) -> None:
        self.scaled_A, self._fragments = scaled_A(fragments), fragments
        self._out, self._first, self._rows, self._pitch = ctypes.c_void_p(), *(ctypes.c_int() for _ in range(3))

    def write_B(self, first: int, wide: torch.Tensor) -> None:
        """Write rows of lora_B to the last columns of ``wide``."""
        (rows, columns), tiles = wide.shape, self._fragments.n_tiles
        self._out.value = wide.data_ptr() + (columns - RANKS_OF_TILE * tiles) * wide.element_size()
        self._first.value, self._rows.value, self._pitch.value = first // BLOCK_ROWS, rows, columns
        self._launch.over(-(-rows // BLOCK_ROWS), tiles)(stream_of(wide))

    def beside(self, weight: SlabWeight) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what copies x and multiplies it by A: in one launch where there is one."""
        if torch.cuda.get_device_capability(weight.slabs.device) != ASYNC_CAPABILITY:
            return Beside(self.scaled_A)
        return TilesOfInput(weight, self._fragments).beside

    @functools.cached_property
    def _launch(self) -> Launch:
        of_row_blocks = (ctypes.c_void_p(t.data_ptr()) for t in (self._fragments.lora_B, self._fragments.first_tile))
        tiles = ctypes.c_int(self._fragments.block_tiles)
        arguments = [*of_row_blocks, self._out, self._first, tiles, self._rows, self._pitch]
        return _launch("write_ranks", self._fragments.lora_B.device, 512, arguments)


class Beside:
    """[x | 0 | x A^T] (M, K padded + ranks) for x (M, K) and A (ranks, K padded); all are multiples of 8."""

    def __init__(self, a: torch.Tensor) -> None:
        self._a, (ranks, self._columns) = a.T, a.shape
        self._wide_columns, self._chunks = self._columns + ranks, self._columns // 8
        self._from, self._to, self._chunks_of_x = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (M, K), contiguous, beside its product."""
        wide = x.new_empty(x.shape[0], self._wide_columns)
        self._from.value, self._to.value, self._chunks_of_x.value = x.data_ptr(), wide.data_ptr(), x.shape[1] // 8
        self._launch.over(x.shape[0], -(-self._chunks // 256))(stream_of(x))
        torch.mm(x, self._a[: x.shape[1]], out=wide[:, self._columns :])
        return wide

    @functools.cached_property
    def _launch(self) -> Launch:
        sizes = map(ctypes.c_int, (self._chunks, self._wide_columns))
        return _launch("copy_rows", self._a.device, 256, [self._from, self._to, self._chunks_of_x, *sizes])


def _launch(name: str, device: torch.device, n_threads: int, arguments: list[Any]) -> Launch:
    """Return a kernel of beside.cu with its arguments; how many thread blocks is said at each launch."""
    handle = function("beside.cu", name, definitions("dense16", torch.bfloat16), device.index)
    return Launch(handle, (1, 1, 1), n_threads, 0, arguments, is_dependent=False)
