"""Products with at most 16 rows of x: every weight is decoded once, in registers, for all of them.

Invariant: outputs are float32 sums, rounded once to x's dtype at the end.
"""

from __future__ import annotations

import functools
from array import array

import torch

from . import team
from .job import SLOT, address, new_job
from .decoding import WORD
from .kernels import Matrix, Product, product_text, rows_together
from .machine import address_of
from .paths import CodePath
from .prepared import LowRank, Operand, Prepared

MOST_ROWS = 16
COMPILED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # other numbers are filled up with zeros
PART_BYTES = 1 << 17
BYTES_A_THREAD = 1 << 17  # a second thread costs more than it brings for less than this


def few_rows(path: CodePath, layer: Prepared, x: torch.Tensor, n_threads: int) -> torch.Tensor:
    """Return the layer's output (M, N) in x's dtype for x (M, K), 1 <= M <= 16."""
    n_inputs = next(n for n in COMPILED_ROWS if n >= x.shape[0])
    x_type = "bf16" if _in_pairs(path, layer, x) else "float"
    words = _in_words(x, x_type, n_inputs)
    y = torch.empty(n_inputs, layer.n_rows)
    n_threads = max(1, min(n_threads, layer.operand.n_bytes // BYTES_A_THREAD))
    kernel, job = _job(path, layer.operand, Product(n_inputs, x_type, layer.rank_encoding), n_threads, words, y)
    if layer.bias is not None:
        job[SLOT["bias"]] = layer.bias.data_ptr()
    if layer.low_rank is not None:
        first_kernel, first_job, u = _inner(path, layer.low_rank, n_inputs, words, x_type, n_threads)
        job[SLOT["first_kernel"]], job[SLOT["first_job"]] = first_kernel, address(first_job)
        job[SLOT["lora_B"]], job[SLOT["rank"]] = layer.low_rank.lora_B.data_ptr(), layer.low_rank.rank
        job[SLOT["u"]] = u.data_ptr()
    team.run(kernel, address(job), n_threads)
    return y[: x.shape[0]].to(x.dtype)


def _in_pairs(path: CodePath, layer: Prepared, x: torch.Tensor) -> bool:
    """Tell whether products of bfloat16 pairs are exact for this layer: weights, lora_A and x are all bfloat16."""
    encodings = {layer.operand.matrix.encoding}
    if layer.low_rank is not None:
        encodings.add(layer.low_rank.operand.matrix.encoding)
    return path.has_bf16_products and x.dtype == torch.bfloat16 and encodings == {"bf16"}


def _in_words(x: torch.Tensor, x_type: str, n_inputs: int) -> torch.Tensor:
    """Return x as (words of 64 columns, n_inputs, 64), filled up with zeros."""
    x = x.detach() if x_type == "bf16" else x.detach().float()
    spare_columns, spare_rows = -x.shape[1] % WORD, n_inputs - x.shape[0]
    if spare_columns or spare_rows:
        x = torch.nn.functional.pad(x, (0, spare_columns, 0, spare_rows))
    if n_inputs == 1:
        return x.contiguous()
    return x.view(n_inputs, -1, WORD).transpose(0, 1).contiguous()


def _inner(
    path: CodePath, low_rank: LowRank, n_inputs: int, words: torch.Tensor, x_type: str, n_threads: int
) -> tuple[int, array[int], torch.Tensor]:
    """Return kernel and job of u = scaling * (lora_A x), and u (M, rank) itself."""
    u = torch.zeros(n_inputs, low_rank.rank)
    kernel, job = _job(path, low_rank.operand, Product(n_inputs, x_type), n_threads, words, u)
    return kernel, job, u


def _job(
    path: CodePath, operand: Operand, product: Product, n_threads: int, words: torch.Tensor, y: torch.Tensor
) -> tuple[int, array[int]]:
    kernel = _kernel(path, operand.matrix, product)
    together = rows_together(path, product)
    part_rows = _part_rows(operand.n_rows, operand.n_bytes, together, n_threads)
    job = new_job(**operand.fields)
    job[SLOT["part_rows"]], job[SLOT["n_parts"]] = part_rows, -(-operand.n_rows // part_rows)
    job[SLOT["x"]], job[SLOT["y"]], job[SLOT["y_stride"]] = words.data_ptr(), y.data_ptr(), y.shape[1]
    return kernel, job


def _part_rows(n_rows: int, n_bytes: int, together: int, n_threads: int) -> int:
    """Return how many rows a thread claims at once: few enough that all threads end at about the same time."""
    if n_threads == 1:
        return max(n_rows, 1)
    n_parts = max(4 * n_threads, n_bytes // PART_BYTES)
    return max(together, n_rows // n_parts // together * together)


@functools.cache
def _kernel(path: CodePath, matrix: Matrix, product: Product) -> int:
    return address_of(product_text(path, matrix, product), path.target)
