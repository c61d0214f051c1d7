"""The tensors of one packed module, checked, and what can be computed from them in NumPy.

Invariant: a ``ModuleTensors`` is consistent: popcounts equal the row_offsets' differences, the last one is nnz, and no
bit stands past the last column, so a kernel that indexes by popcount stays inside ``values``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .bitmap import gather_values, pack_bitmap, row_offsets, scatter_values, unpack_bitmap
from .dtypes import Array, BoolArray, F32Array, U8Array, U64Array, to_float32
from .manifest import ModuleEntry
from .values import QUANTIZED_BITS, decode_values, encoded_bytes, pad_values


class LowRankPair(NamedTuple):
    """One adapter: lora_A ([E,] r, K) and lora_B ([E,] N, r) as stored, their dtype, and scaling a rank (r,)."""

    name: str
    dtype: str
    lora_A: Array
    lora_B: Array
    scaling: F32Array


class AdapterStack(NamedTuple):
    """All adapters of a module concatenated along the rank, in float32: y += lora_B (scaling * (lora_A x)).

    ``lora_A`` ([E,] R, K), ``lora_B`` ([E,] N, R), ``scaling`` (R,), ``ranks`` maps a name to its slice of R.
    """

    lora_A: F32Array
    lora_B: F32Array
    scaling: F32Array
    ranks: dict[str, slice]

    def product(self) -> F32Array:
        """Return the dense update ([E,] N, K)."""
        product: F32Array = np.matmul(self.lora_B * self.scaling, self.lora_A)
        return product


@dataclass(frozen=True)
class ModuleTensors:
    """Canonical tensors of a module.

    ``bitmap`` ([E,] N, ceil(K/8)) uint8 and ``row_offsets`` (rows + 1,) uint64 are None for pattern ``dense``;
    ``values`` is padded; ``scales`` ([E,] N, groups) float32 is None unless quantized.
    """

    entry: ModuleEntry
    values: Array
    bitmap: U8Array | None = None
    row_offsets: U64Array | None = None
    scales: F32Array | None = None

    def mask(self) -> BoolArray:
        """Return the mask ([E,] N, K): True where a weight is kept."""
        if self.bitmap is None:
            return np.ones(self.entry.shape, np.bool_)
        return unpack_bitmap(self.bitmap, self.entry.n_columns)

    def stored(self) -> Array:
        """Return the values without their padding; for nf4, two to a byte."""
        return self.values[: encoded_bytes(self.entry.encoding, self.entry.nnz) // self.values.itemsize]

    def dense(self) -> F32Array:
        """Return the kept weights in place, zeros elsewhere, ([E,] N, K) float32, without adapters."""
        entry = self.entry
        value_scales = None
        if entry.encoding in QUANTIZED_BITS:
            value_scales = self._scale_of_each_weight()[self.mask()]
        values = decode_values(self.values, entry.encoding, entry.nnz, value_scales)
        if self.bitmap is None:
            return values.reshape(entry.shape)
        return scatter_values(values, self.bitmap, entry.n_columns)

    def _scale_of_each_weight(self) -> F32Array:
        assert self.scales is not None and self.entry.group_size is not None
        n_columns = self.entry.n_columns
        return np.repeat(self.scales, min(self.entry.group_size, n_columns), axis=-1)[..., :n_columns]

    def part(self, rows: slice, columns: slice) -> ModuleTensors:
        """Return the canonical tensors of a part (rows and columns of each expert), for tensor parallelism.

        ``rows`` and ``columns`` must be what ``validation.check_part`` allows.
        """
        mask = self.mask()
        part = mask[..., rows, columns]
        shape = part.shape
        kept = self._codes_in_place()[..., rows, columns]
        codes = gather_values(kept, part)
        nnz = int(codes.size)
        if self.entry.encoding == "nf4":
            codes = np.append(codes, np.zeros(codes.size % 2, np.uint8))
            codes = codes[0::2] | (codes[1::2] << np.uint8(4))
        bitmap = None if self.bitmap is None else pack_bitmap(part)
        cuts_fours = self.entry.pattern == "2:4" and columns.indices(self.entry.n_columns)[0] % 4
        pattern = "unstructured" if cuts_fours else self.entry.pattern
        entry = replace(self.entry, shape=tuple(int(n) for n in shape), nnz=nnz, pattern=pattern)
        return ModuleTensors(
            entry,
            pad_values(codes, entry.encoding, nnz),
            bitmap,
            None if bitmap is None else row_offsets(bitmap),
            None if self.scales is None else self._scales_of(rows, columns),
        )

    def _codes_in_place(self) -> Array:
        entry = self.entry
        codes = self.stored()
        if entry.encoding == "nf4":
            codes = np.stack([codes & np.uint8(15), codes >> np.uint8(4)], axis=1).reshape(-1)[: entry.nnz]
        if self.bitmap is None:
            return codes.reshape(entry.shape)
        return scatter_values(codes, self.bitmap, entry.n_columns)

    def _scales_of(self, rows: slice, columns: slice) -> F32Array:
        assert self.scales is not None and self.entry.group_size is not None
        start, stop, _ = columns.indices(self.entry.n_columns)
        size = self.entry.group_size
        return np.ascontiguousarray(self.scales[..., rows, start // size : -(-stop // size)])


def stack_adapters(pairs: list[LowRankPair], shape: tuple[int, ...]) -> AdapterStack:
    """Concatenate ``pairs`` of a module of ``shape`` along the rank, widened to float32; no pair gives rank 0."""
    *experts, n_rows, n_columns = shape
    stacked_a = [np.zeros((*experts, 0, n_columns), np.float32)]
    stacked_b = [np.zeros((*experts, n_rows, 0), np.float32)]
    scaling, ranks, start = [np.zeros(0, np.float32)], {}, 0
    for pair in pairs:
        stacked_a.append(to_float32(pair.lora_A, pair.dtype))
        stacked_b.append(to_float32(pair.lora_B, pair.dtype))
        scaling.append(pair.scaling)
        ranks[pair.name] = slice(start, start + pair.scaling.size)
        start += pair.scaling.size
    return AdapterStack(
        np.concatenate(stacked_a, axis=-2), np.concatenate(stacked_b, axis=-1), np.concatenate(scaling), ranks
    )
