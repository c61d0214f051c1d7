"""Decoding without any special instruction: what runs on every processor that numba knows.

Invariant: torch turns the values into float32, numba only puts each where its bit stands, so there is one compiled
function for all encodings. numba compiles it at its first use and keeps it in its cache beside this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ..packed import PackedWeight
from ..reference import unit_values

Array = Any  # numba's arrays have no types of their own


def expand(weight: PackedWeight, first: int, tile: torch.Tensor, n_threads: int) -> None:
    """Decode the rows of ``tile`` (rows, at least K) float32, the first of which is row ``first`` of the matrix."""
    step = -(-tile.shape[0] // n_threads)
    parts = [(first + i, tile[i : i + step]) for i in range(0, tile.shape[0], step)]
    if len(parts) == 1:
        _expand_part(weight, *parts[0])
    else:
        list(_pool(n_threads).map(lambda part: _expand_part(weight, *part), parts))


def _expand_part(weight: PackedWeight, first: int, tile: torch.Tensor) -> None:
    rows = slice(first, first + tile.shape[0])
    out = tile[:, : weight.n_columns]
    tile[:, weight.n_columns :] = 0
    if weight.bitmap is None or weight.row_offsets is None:
        begin = first * weight.n_columns
        out.copy_(_between(weight, begin, begin + out.numel()).view(out.shape))
    else:
        offsets = weight.row_offsets[first : first + tile.shape[0] + 1]
        values = _between(weight, int(offsets[0]), int(offsets[-1]) + 1)  # the padding has room for one more
        _scatter()(weight.bitmap[rows].numpy(), (offsets - offsets[0]).numpy(), values.numpy(), out.numpy())
    if weight.scales is not None and weight.group_size is not None:
        width = min(weight.group_size, weight.n_columns)
        out *= weight.scales[rows].repeat_interleave(width, 1)[:, : weight.n_columns]


def _between(weight: PackedWeight, begin: int, end: int) -> torch.Tensor:
    """Return the kept values ``begin`` to ``end`` as float32, unscaled."""
    if weight.encoding != "nf4":
        return unit_values(replace(weight, values=weight.values[begin:end], nnz=end - begin))
    pairs = weight.values[begin // 2 : -(-end // 2)]
    return unit_values(replace(weight, values=pairs, nnz=end - begin // 2 * 2))[begin % 2 :]


def _put_in_place(bitmap: Array, offsets: Array, values: Array, out: Array) -> None:
    """Put values where the bits of bitmap (rows, ceil(K/8)) stand in out (rows, K), 0 elsewhere; one value is spare."""
    for row in range(out.shape[0]):
        position = offsets[row]
        for column in range(out.shape[1]):
            bit = bitmap[row, column >> 3] >> (column & 7) & 1
            value = values[position]  # loaded in any case: a branch on random bits would cost more than the rest
            out[row, column] = value if bit else np.float32(0)
            position += bit


@functools.cache
def _scatter() -> Callable[[Array, Array, Array, Array], None]:
    import numba

    compiled: Callable[[Array, Array, Array, Array], None] = numba.njit(nogil=True, cache=True)(_put_in_place)
    return compiled


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="salr-plain")
