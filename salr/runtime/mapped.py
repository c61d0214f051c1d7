"""The tensors of a .salr file as torch tensors that share the file's memory map.

Invariant: nothing is copied but what is misaligned; torch never writes to a loaded weight, and the map is private, so
the file would not change if it did.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..formats.dtypes import storage_dtype
from ..formats.reader import SalrFile
from .errors import LoadError

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip


def mapped_tensor(file: SalrFile, name: str) -> torch.Tensor:
    """Return a tensor of the file in its own dtype and shape, sharing the file's memory.

    Raises:
        LoadError: torch has no such dtype.
    """
    stored = file.tensors[name]
    if stored.dtype not in _DTYPES:
        raise LoadError(f"dtype {stored.dtype} has no torch form", path=file.path, tensor=name)
    raw = np.frombuffer(file.raw(name), np.uint8)
    if raw.ctypes.data % storage_dtype(stored.dtype).itemsize:
        raw = raw.copy()
    if not raw.size:
        return torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
    return torch.from_numpy(raw).view(_DTYPES[stored.dtype]).reshape(stored.shape)


class LazyTensor:
    """Stands for a tensor in a state dict; transformers reads it with ``tensor[...]``, as it does a safetensors slice.

    The lock keeps one decoded weight at a time beside the model.
    """

    def __init__(self, read: Callable[[], torch.Tensor], lock: threading.Lock) -> None:
        self._read, self._lock = read, lock

    def __getitem__(self, index: Any) -> torch.Tensor:
        with self._lock:
            return self._read()[index]

    def is_floating_point(self) -> bool:
        """Tell that this is a weight, which follows the model's dtype."""
        return True


def decoded(file: SalrFile, module: str, lock: threading.Lock) -> LazyTensor:
    """Return a packed module as its dense source tensor, adapters included, decoded in float32 when it is read."""

    def read() -> torch.Tensor:
        entry, weight = file.modules[module], file.dense(module, residual=True, adapters=True)
        if entry.transposed:
            weight = weight.swapaxes(-1, -2)
        return torch.from_numpy(np.ascontiguousarray(weight)).reshape(entry.source_shape)

    return LazyTensor(read, lock)
