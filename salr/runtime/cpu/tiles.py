"""Products with many rows of x: some rows of the matrix are decoded into a workspace, then torch multiplies.

Invariant: weights, x and the product are float32 (``panels`` is for bfloat16 x where the processor multiplies such
pairs). lora_B stands beside the weights, scaling * (lora_A x) beside x, so that one product serves both. A thread's
workspace is reused by all its layers.
"""

from __future__ import annotations

import functools
import threading

import torch

from . import plain, team
from .decoding import WORD
from .job import address, new_job
from .kernels import expand_text
from .machine import address_of
from .paths import CodePath
from .prepared import Prepared
from .rows import Matrix

WORKSPACE_BYTES = 9 << 19  # a thread; 1 and 9 MiB are slower: x is rearranged for each tile, tiles leave the cache
MOST_WORKSPACES = 4
ROW_MULTIPLE = 64  # torch's products work in units of so many
PART_ROWS = 16
ALIASING = 256  # rows of a multiple of so many elements fall into few cache sets, which costs up to 60 %
_own = threading.local()


def many_rows(path: CodePath, layer: Prepared, x: torch.Tensor, n_threads: int) -> torch.Tensor:
    """Return the layer's output (M, N) in x's dtype for x (M, K)."""
    inputs = _with_inner_products(layer, x.detach().float())
    y = torch.empty(x.shape[0], layer.n_rows, dtype=x.dtype)
    work = _workspace(inputs.shape[1], min(n_threads, MOST_WORKSPACES) * WORKSPACE_BYTES)
    for first in range(0, layer.n_rows, work.shape[0]):
        tile = work[: min(work.shape[0], layer.n_rows - first)]
        rows = slice(first, first + tile.shape[0])
        _expand(path, layer, first, tile, n_threads)
        if layer.low_rank is not None:
            tile[:, -layer.low_rank.rank :].copy_(layer.low_rank.lora_B[rows])
        y[:, rows] = torch.nn.functional.linear(inputs, tile, None if layer.bias is None else layer.bias[rows])
    return y


def _with_inner_products(layer: Prepared, x: torch.Tensor) -> torch.Tensor:
    """Return x (M, K) filled up to whole words of columns, with scaling * (lora_A x) (M, rank) behind them."""
    parts = [x, x.new_zeros(x.shape[0], -x.shape[1] % WORD)]
    if layer.low_rank is not None:
        low = layer.low_rank
        u = torch.nn.functional.linear(x, low.lora_A.float()) * low.scaling
        parts += [u, x.new_zeros(x.shape[0], low.rank - u.shape[1])]
    parts = [part for part in parts if part.shape[1]]
    return x.contiguous() if len(parts) == 1 else torch.cat(parts, 1)


def _workspace(n_columns: int, n_bytes: int) -> torch.Tensor:
    """Return this thread's memory as a tile (rows, ``n_columns``); rows may have some unused elements between them."""
    stride = n_columns if n_columns % ALIASING else n_columns + WORD
    n_rows = max(ROW_MULTIPLE, n_bytes // (stride * 4) // ROW_MULTIPLE * ROW_MULTIPLE)
    kept: torch.Tensor | None = getattr(_own, "workspace", None)
    if kept is None or kept.numel() < n_rows * stride:
        with torch.inference_mode(False):  # it outlives the call, and a later one may run outside inference mode
            kept = _own.workspace = torch.empty(n_rows * stride)
    return kept[: n_rows * stride].view(n_rows, stride)[:, :n_columns]


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
    team.run(_kernel(path, layer.operand.matrix), address(job), n_threads)


@functools.cache
def _kernel(path: CodePath, matrix: Matrix) -> int:
    return address_of(expand_text(path, matrix), path.target)
