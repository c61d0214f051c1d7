"""u = scaling * A x beside x, for products that multiply both by one matrix (semi_structured.py)."""

from __future__ import annotations

import ctypes
import functools

import torch

from .compilation import function
from .device_layout import definitions
from .launching import Launch, stream_of


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
        handle = function("beside.cu", "copy_rows", definitions("dense16", torch.bfloat16), self._a.device.index)
        arguments = [self._from, self._to, self._chunks_of_x, *sizes]
        return Launch(handle, (1, 1, 1), 256, 0, arguments, is_dependent=False)
