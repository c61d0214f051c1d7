"""The bitmap codec: a bool mask and its packed bits, and the values that stand where a bit is set.

Invariant: bit ``j`` of byte ``i`` in a row is column ``8 * i + j`` (first column in the lowest bit); bits past the
last column are 0. A row's values follow each other in column order, rows in row order, without gaps.
Leading dimensions (stacked experts) are flattened into rows.
"""

from __future__ import annotations

import numpy as np

from .dtypes import Array, BoolArray, U8Array, U64Array


def bitmap_width(n_columns: int) -> int:
    """Return the bytes that one row of ``n_columns`` bits takes."""
    return -(-n_columns // 8)


def pack_bitmap(mask: BoolArray) -> U8Array:
    """Pack a bool mask (..., K) into a bitmap (..., ceil(K/8)) of uint8."""
    return np.packbits(mask, axis=-1, bitorder="little")


def unpack_bitmap(bitmap: U8Array, n_columns: int) -> BoolArray:
    """Unpack a bitmap (..., ceil(K/8)) into a bool mask (..., K)."""
    return np.unpackbits(bitmap, axis=-1, count=n_columns, bitorder="little").view(np.bool_)


def row_popcounts(bitmap: U8Array) -> U64Array:
    """Return the kept weights of each row, shape (rows,), of a bitmap (..., ceil(K/8))."""
    rows = np.ascontiguousarray(bitmap.reshape(-1, bitmap.shape[-1]))
    words = rows.view(np.uint64) if rows.shape[1] % 8 == 0 and rows.ctypes.data % 8 == 0 else rows
    counts: U64Array = np.bitwise_count(words).sum(axis=1, dtype=np.uint64)
    return counts


def row_offsets(bitmap: U8Array) -> U64Array:
    """Return the index into values of each row's first kept weight, shape (rows + 1,); the last is nnz."""
    counts = row_popcounts(bitmap)
    offsets = np.zeros(counts.size + 1, np.uint64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def spare_bits_are_clear(bitmap: U8Array, n_columns: int) -> bool:
    """Tell whether every bit past column ``n_columns`` is 0."""
    n_used = n_columns % 8
    return n_used == 0 or not np.any(bitmap[..., -1] >> n_used)


def gather_values(dense: Array, mask: BoolArray) -> Array:
    """Return the entries of ``dense`` (..., K) where ``mask`` is set, in bitmap order, shape (nnz,)."""
    return dense[mask]


def scatter_values(values: Array, bitmap: U8Array, n_columns: int) -> Array:
    """Return the dense array (..., K) with ``values`` (nnz,) where the bitmap is set and 0 elsewhere."""
    mask = unpack_bitmap(bitmap, n_columns)
    dense = np.zeros(mask.shape, values.dtype)
    dense[mask] = values
    return dense
