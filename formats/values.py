"""Encodings of kept values: bf16, fp16 and fp32 as they are, int8 and nf4 with a scale a group of columns.

Invariant: an encoded ``values`` tensor is the kept weights in bitmap order, then at least 64 zero bytes, its size a
multiple of 64 bytes. The scale of weight (n, k) is ``scales[n, k // group_size]``, whatever the mask.
int8 is symmetric two's complement. nf4 is QLoRA's code book (Dettmers et al. 2023, appendix E): element i sits in
byte i // 2, the even one in the low nibble.
"""

from __future__ import annotations

import numpy as np

from .dtypes import FLOAT_ENCODINGS, Array, F32Array, U8Array, storage_dtype, tensor_bytes, to_float32

PADDING_BYTES = 64
QUANTIZED_BITS = {"int8": 8, "nf4": 4}
ENCODINGS = (*FLOAT_ENCODINGS, *QUANTIZED_BITS)

NF4_CODE_BOOK: F32Array = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def values_dtype(encoding: str) -> str:
    """Return the safetensors dtype of a ``values`` tensor."""
    return FLOAT_ENCODINGS.get(encoding, "U8")


def encoded_bytes(encoding: str, nnz: int) -> int:
    """Return the bytes of ``nnz`` encoded values without padding."""
    if encoding in QUANTIZED_BITS:
        return -(-nnz * QUANTIZED_BITS[encoding] // 8)
    return tensor_bytes(FLOAT_ENCODINGS[encoding], (nnz,))


def stored_elements(encoding: str, nnz: int) -> int:
    """Return the elements of a ``values`` tensor, padding included: 64 zero bytes or more, up to a multiple of 64."""
    n_bytes = -(-(encoded_bytes(encoding, nnz) + PADDING_BYTES) // 64) * 64
    return n_bytes // storage_dtype(values_dtype(encoding)).itemsize


def pad_values(values: Array, encoding: str, nnz: int) -> Array:
    """Append the zero padding to encoded ``values``."""
    padded = np.zeros(stored_elements(encoding, nnz), values.dtype)
    padded[: values.size] = values
    return padded


def encode_quantized(values: F32Array, scales: F32Array, encoding: str) -> U8Array:
    """Quantize float32 ``values`` (nnz,) with one scale a value to the nearest code; scale 0 gives the code of 0."""
    with np.errstate(over="ignore"):  # an infinite ratio takes the outermost code, as any that is too large
        unit = np.divide(values, scales, out=np.zeros_like(values), where=scales != 0)
    if encoding == "int8":
        return np.clip(np.rint(unit), -127, 127).astype(np.int8).view(np.uint8)
    middles = (NF4_CODE_BOOK[1:] + NF4_CODE_BOOK[:-1]) / 2
    codes = np.searchsorted(middles, unit).astype(np.uint8)
    codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
    return codes[0::2] | (codes[1::2] << np.uint8(4))


def decode_values(stored: Array, encoding: str, nnz: int, scales: F32Array | None = None) -> F32Array:
    """Decode a ``values`` tensor to float32 (nnz,); ``scales`` (nnz,) is one scale a value for int8 and nf4."""
    if encoding in FLOAT_ENCODINGS:
        return to_float32(stored[:nnz], FLOAT_ENCODINGS[encoding])
    if encoding == "int8":
        unit = stored[:nnz].view(np.int8).astype(np.float32)
    else:
        pairs = stored[: -(-nnz // 2)]
        codes = np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=1).reshape(-1)[:nnz]
        unit = NF4_CODE_BOOK[codes]
    return unit if scales is None else unit * scales
