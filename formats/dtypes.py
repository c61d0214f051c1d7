"""The safetensors dtypes: their width in bits and the NumPy type that holds their bytes unchanged.

NumPy has no bfloat16 and no 8-bit floats, so those are viewed as unsigned integers of the same width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]
F32Array = NDArray[np.float32]
U8Array = NDArray[np.uint8]
U64Array = NDArray[np.uint64]
BoolArray = NDArray[np.bool_]

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

_STORAGE: dict[str, DTypeLike] = {
    "BOOL": np.bool_, "I8": np.int8, "U16": "<u2", "I16": "<i2", "F16": "<f2", "BF16": "<u2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
}  # fmt: skip

#: encoding of float values in a .salr file -> safetensors dtype
FLOAT_ENCODINGS = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}


def storage_dtype(dtype: str) -> np.dtype[Any]:
    """Return the NumPy dtype whose bytes equal those of safetensors ``dtype`` (uint16 for BF16, uint8 for F8)."""
    return np.dtype(_STORAGE.get(dtype, np.uint8))


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size in bytes of a tensor; sub-byte dtypes are packed without gaps."""
    n_bits = DTYPE_BITS[dtype]
    for extent in shape:
        n_bits *= extent
    return -(-n_bits // 8)


def byte_view(array: Array) -> memoryview:
    """Return an array's bytes in row-major order, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def to_float32(array: Array, dtype: str) -> F32Array:
    """Widen BF16 (viewed as uint16), F16 or F32 to float32, exactly."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(np.float32)


def from_float32(array: F32Array, dtype: str) -> Array:
    """Round float32 to BF16 (returned as uint16), F16 or F32, to nearest even; NaN stays NaN in BF16."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(array), np.uint32(0x7FC0), rounded).astype(np.uint16)
    return array.astype(storage_dtype(dtype))
