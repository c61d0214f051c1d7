"""What a Llama-like model computes between its linear layers, as kernels that keep the dependent-launch chain.

Invariant: each equals transformers' own modules in 16-bit dtypes, rounding where they round; slots and starts are read
on the device, so that a captured launch serves every token. ``salr.runtime.layer_operations`` is their twin in torch.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch

from .compilation import function
from .launching import Launch, address, aligned, fields, stream_of, uncaptured

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_COLUMNS = (64, 128, 256)
_LARGEST_GROUP = 8
_NORM_THREADS = 512
_MOST_CHUNKS = 8
#: small.cuh: threads of a thread block that has a place beside a product
_SMALL_THREADS = 128
#: what is normed beside products, which leave no room for more; from this compute capability on
_FEW_ROWS, _FEW_COLUMNS, _BESIDE_CAPABILITY = 8, 8192, (9, 0)
_MOST_SPLITS = 64
_SLOTS_A_SPLIT = 32
_SHARED_BYTES = 32768


def reason_not_taken(hidden: int, intermediate: int, head_columns: int, group: int, dtype: torch.dtype) -> str | None:
    """Return why a model of these sizes has no kernels here, None where it has; ``group``: query heads a key head."""
    if dtype not in _DTYPES:
        return f"activations in {str(dtype).removeprefix('torch.')} (bfloat16 and float16 have kernels)"
    if hidden % 8 or intermediate % 8 or hidden > 8 * _NORM_THREADS * _MOST_CHUNKS:
        return f"sizes {hidden} and {intermediate} (multiples of 8 have kernels)"
    if head_columns not in _HEAD_COLUMNS:
        return f"heads of {head_columns} columns ({', '.join(map(str, _HEAD_COLUMNS))} have kernels)"
    return f"{group} query heads a key head (at most {_LARGEST_GROUP})" if group > _LARGEST_GROUP else None


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + residual (M, H) and its RMSNorm times ``weight`` (H,); without a residual, x itself and its norm."""
    x, scale = aligned(x), aligned(weight)
    normed, n_columns = torch.empty_like(x), x.shape[-1]
    summed = x if residual is None else torch.empty_like(x)
    tensors = (x, None if residual is None else aligned(residual), scale, summed, normed)
    arguments = [*map(_pointer, tensors), ctypes.c_int(n_columns), ctypes.c_float(epsilon)]
    rows = x.numel() // n_columns
    # The kernel reads weights early, and a copy of them may not be there yet.
    is_dependent = scale.data_ptr() == weight.data_ptr()
    name, definitions, threads, shared_bytes = _norm(rows <= _FEW_ROWS, n_columns, x.device.index)
    _launch(name, x, definitions, (rows, 1, 1), threads, arguments, shared_bytes, is_dependent)
    return summed, normed


@functools.cache
def _norm(is_few: bool, n_columns: int, device: int) -> tuple[str, dict[str, int], int, int]:
    """Return the kernel for a norm of few rows or many, its definitions, its threads and its shared memory."""
    is_small = is_few and n_columns <= _FEW_COLUMNS
    if is_small and torch.cuda.get_device_capability(device) >= _BESIDE_CAPABILITY:
        return "add_norm_beside", {}, _SMALL_THREADS, 3 * 2 * n_columns
    chosen = {"THREADS": _NORM_THREADS, "CHUNKS": -(-n_columns // (8 * _NORM_THREADS))}
    return "add_norm", chosen, _NORM_THREADS, 0


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """Return SiLU(gate) * up (M, I) of a stacked product (M, gate | up)."""
    gate_up = aligned(gate_up)
    rows, n_columns = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, n_columns)
    arguments = [_pointer(gate_up), _pointer(y), ctypes.c_int(n_columns)]
    _launch("gated", gate_up, {}, (rows, -(-n_columns // (8 * _SMALL_THREADS)), 1), _SMALL_THREADS, arguments)
    return y


class _Rotary(ctypes.Structure):
    _fields_ = fields(
        "qkv cosines sines q_weight k_weight slots starts q k v",
        "n_heads n_kv_heads rows_per_sequence capacity n_positions",
        "epsilon",
    )


def rotary(
    qkv: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor, float] | None = None,
) -> torch.Tensor:
    """Return q (M, heads, D), rotated, and write k and v of each row into the cache.

    Args:
        qkv: (M, (heads + 2 kv_heads) D); M / S rows of each of S sequences, in order.
        cosines: (positions, D / 2), with ``sines`` in qkv's dtype.
        k: with ``v`` the cache, (S, kv_heads, capacity, D), contiguous.
        slots: (S,) int32: where in the cache each sequence's first row goes.
        starts: (S,) int32: the slot of each sequence's position 0.
        norms: weights (D,) of q's and k's RMSNorm and its epsilon, for models that have one a head.
    """
    qkv = aligned(qkv)
    sequences, n_kv_heads, capacity, columns = k.shape
    n_heads = qkv.shape[1] // columns - 2 * n_kv_heads
    q = qkv.new_empty(qkv.shape[0], n_heads, columns)
    q_weight, k_weight, epsilon = norms or (None, None, 0.0)
    pointers = (address(t) for t in (qkv, cosines, sines, q_weight, k_weight, slots, starts, q, k, v))
    arguments = _Rotary(*pointers, n_heads, n_kv_heads, qkv.shape[0] // sequences, capacity, cosines.shape[0], epsilon)
    grid = (qkv.shape[0], -(-(n_heads + 2 * n_kv_heads) // 4), 1)
    _launch("rotary", qkv, {"HEAD_COLUMNS": columns}, grid, 128, [arguments])
    return q


class _Attend(ctypes.Structure):
    _fields_ = fields("q k v slots starts y partial sums counters", "n_kv_heads capacity window", "scale")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    starts: torch.Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Return the attention (S, heads D) of one new token a sequence, q (S, heads, D), over its slots in the cache.

    Args:
        k: with ``v`` the cache, (S, kv_heads, capacity, D), contiguous.
        slots: (S,) int32: the new token's own slot, already written.
        starts: (S,) int32: the first slot in use.
        window: slots attended at most, the new one included; None for all.
        scale: of q k; None for 1 / sqrt(D).
    """
    q = aligned(q)
    sequences, n_kv_heads, capacity, columns = k.shape
    group = q.shape[1] // n_kv_heads
    warps = max(w for w in (8, 4, 2) if w * group * columns * 4 <= _SHARED_BYTES)
    splits = _splits(q.device.index, sequences * n_kv_heads, capacity)
    stream = stream_of(q)
    partial, sums, counters = _workspace(q.device, stream, sequences * n_kv_heads, splits, group * columns, group)
    y = q.new_empty(sequences, q.shape[1] * columns)
    pointers = (address(t) for t in (q, k, v, slots, starts, y, partial, sums, counters))
    factor = (1 / math.sqrt(columns) if scale is None else scale) * math.log2(math.e)
    arguments = _Attend(*pointers, n_kv_heads, capacity, window or 0, factor)
    chosen = {"HEAD_COLUMNS": columns, "GROUP": group, "WARPS": warps}
    shared_bytes = warps * group * columns * 4
    _launch("attend", q, chosen, (splits, n_kv_heads, sequences), warps * 32, [arguments], shared_bytes)
    return y


@functools.cache
def _splits(device: int, n_heads: int, capacity: int) -> int:
    """Return into how many parts a sequence's slots are divided, so that every multiprocessor has work."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(-(-processors // n_heads), -(-capacity // _SLOTS_A_SPLIT), _MOST_SPLITS))


@functools.cache
def _workspace(
    device: torch.device, stream: int, n_heads: int, splits: int, floats: int, group: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a stream's buffers for one shape: partial results, their maxima and sums, counters that are 0."""
    with uncaptured(device):
        partial = torch.empty(n_heads * splits * floats, dtype=torch.float32, device=device)
        sums = torch.empty(n_heads * splits * group * 2, dtype=torch.float32, device=device)
        return partial, sums, torch.zeros(n_heads, dtype=torch.int32, device=device)


def _pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(address(tensor))


def _launch(
    name: str,
    x: torch.Tensor,
    definitions: dict[str, int],
    grid: tuple[int, int, int],
    n_threads: int,
    arguments: list[Any],
    shared_bytes: int = 0,
    is_dependent: bool = True,
) -> None:
    """Launch a kernel for x's dtype on x's device and torch's current stream; the kernel is named as its file."""
    if not x.numel():
        return
    chosen = tuple({"HALF": int(x.dtype == torch.float16), **definitions}.items())
    handle = function(f"{name}.cu", name, chosen, x.device.index)
    Launch(handle, grid, n_threads, shared_bytes, arguments, is_dependent)(stream_of(x))
