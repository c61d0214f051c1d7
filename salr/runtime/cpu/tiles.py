"""Products with many rows of x: some rows of the matrix are decoded into a workspace, then torch multiplies.

Invariant: the workspace holds weights rounded to the type that torch multiplies in: bfloat16 where x is bfloat16 and
the processor multiplies such pairs (then bf16 weights are exact and int8, nf4, fp16 and fp32 ones are rounded as a
dense bfloat16 model's would be), float32 everywhere else. lora_B stands beside the weights, scaling * (lora_A x)
beside x, so that one product serves both. A thread's workspace is reused by all its layers.
"""

from __future__ import annotations

import functools
import threading

import torch

from . import plain, team
from .decoding import WORD
from .job import address, new_job
from .kernels import Matrix, expand_text
from .machine import address_of
from .paths import CodePath
from .prepared import Prepared

WORKSPACE_BYTES = 9 << 19  # a thread; 1 and 9 MiB are slower: x is rearranged for each tile, tiles leave the cache
MOST_WORKSPACES = 4
ROW_MULTIPLE = 64  # torch's products work in units of so many
PART_ROWS = 16
TURNED_MOST_ROWS = 128  # up to as many rows of x, weights x^T is faster than x weights^T: less is rearranged
ALIASING = 256  # rows of a multiple of so many elements fall into few cache sets, which costs up to 60 %
_own = threading.local()


def many_rows(path: CodePath, layer: Prepared, x: torch.Tensor, n_threads: int) -> torch.Tensor:
    """Return the layer's output (M, N) in x's dtype for x (M, K)."""
    in_bf16 = path.has_bf16_products and x.dtype == torch.bfloat16
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    inputs = _with_inner_products(layer, x.detach().to(dtype))
    turned = in_bf16 and x.shape[0] <= TURNED_MOST_ROWS
    y = torch.empty(x.shape[0], layer.n_rows, dtype=x.dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    work = _workspace(inputs.shape[1], dtype, min(n_threads, MOST_WORKSPACES) * WORKSPACE_BYTES)
    for first in range(0, layer.n_rows, work.shape[0]):
        tile = work[: min(work.shape[0], layer.n_rows - first)]
        rows = slice(first, first + tile.shape[0])
        _expand(path, layer, first, tile, n_threads)
        if layer.low_rank is not None:
            tile[:, -layer.low_rank.rank :].copy_(layer.low_rank.lora_B[rows])
        part = bias if bias is None else bias[rows]
        if turned:
            product = torch.nn.functional.linear(tile, inputs).T
            y[:, rows] = product if part is None else product + part
        else:
            y[:, rows] = torch.nn.functional.linear(inputs, tile, part)
    return y


def _with_inner_products(layer: Prepared, x: torch.Tensor) -> torch.Tensor:
    """Return x (M, K) filled up to whole words of columns, with scaling * (lora_A x) (M, rank) behind them."""
    parts = [x, x.new_zeros(x.shape[0], -x.shape[1] % WORD)]
    if layer.low_rank is not None:
        low = layer.low_rank
        u = torch.nn.functional.linear(x, low.lora_A.to(x.dtype)) * low.scaling
        parts += [u.to(x.dtype), x.new_zeros(x.shape[0], low.rank - u.shape[1])]
    parts = [part for part in parts if part.shape[1]]
    return x.contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def _workspace(n_columns: int, dtype: torch.dtype, n_bytes: int) -> torch.Tensor:
    """Return this thread's memory as a tile (rows, ``n_columns``); rows may have some unused elements between them."""
    stride = n_columns if n_columns % ALIASING else n_columns + WORD
    n_rows = max(ROW_MULTIPLE, n_bytes // (stride * dtype.itemsize) // ROW_MULTIPLE * ROW_MULTIPLE)
    kept: dict[torch.dtype, torch.Tensor] = _own.__dict__.setdefault("workspaces", {})
    if dtype not in kept or kept[dtype].numel() < n_rows * stride:
        with torch.inference_mode(False):  # it outlives the call, and a later one may run outside inference mode
            kept[dtype] = torch.empty(n_rows * stride, dtype=dtype)
    return kept[dtype][: n_rows * stride].view(n_rows, stride)[:, :n_columns]


def _expand(path: CodePath, layer: Prepared, first: int, tile: torch.Tensor, n_threads: int) -> None:
    """Decode the rows from ``first`` on into a tile (rows, at least K)."""
    if path.lanes == 0:
        plain.expand(layer.weight, first, tile, n_threads)
        return
    job = new_job(
        **layer.operand.fields | {"n_rows": tile.shape[0]},
        first_row=first,
        part_rows=PART_ROWS,
        n_parts=-(-tile.shape[0] // PART_ROWS),
        out=tile.data_ptr(),
        out_stride=tile.stride(0) * tile.element_size(),
    )
    out_type = "bf16" if tile.dtype == torch.bfloat16 else "float"
    team.run(_kernel(path, layer.operand.matrix, out_type), address(job), n_threads)


@functools.cache
def _kernel(path: CodePath, matrix: Matrix, out_type: str) -> int:
    return address_of(expand_text(path, matrix, out_type), path.target)
