"""Products with few rows of x: every weight is decoded once, in registers, for up to 8 of them.

Invariant: outputs are float32 sums, rounded once to x's dtype at the end.
"""

from __future__ import annotations

import functools
from array import array
from dataclasses import dataclass, replace

import torch

from . import team
from .decoding import WORD
from .job import SLOT, address, new_job
from .kernels import Product, product_text, rows_together
from .machine import address_of
from .paths import CodePath
from .prepared import LowRank, Operand, Prepared
from .rows import Matrix, in_pairs, in_scaled_pairs

COMPILED_ROWS = (1, 2, 3, 4, 6, 8)  # other numbers are filled up with zeros
PART_BYTES = 1 << 17
BYTES_A_THREAD = 96 << 10  # for less than this a second thread costs more than it brings


@dataclass(frozen=True)
class Plan:
    """Kernel and unfinished job for one layer, number of inputs and threads; with adapters also those of u."""

    product: Product
    n_threads: int
    kernel: int
    job: array[int]
    first_job: array[int] | None = None


def few_rows(path: CodePath, layer: Prepared, x: torch.Tensor, n_threads: int) -> torch.Tensor:
    """Return the layer's output (M, N) in x's dtype for x (M, K); a pass over the weights for every 8 rows of x."""
    step = COMPILED_ROWS[-1]
    if x.shape[0] <= step:
        return _one_pass(path, layer, x, n_threads)
    parts = [x[first : first + step] for first in range(0, x.shape[0], step)]
    return torch.cat([_one_pass(path, layer, part, n_threads) for part in parts])


def multiplies_pairs(path: CodePath, layer: Prepared, x: torch.Tensor) -> bool:
    """Tell whether products of bfloat16 pairs are exact for this layer: x is bfloat16, weights and lora_A fit in it.

    One row of x does not pay for making int8 weights bfloat16.
    """
    if not path.has_bf16_products or x.dtype != torch.bfloat16:
        return False
    matrices = [layer.operand.matrix] + ([layer.low_rank.operand.matrix] if layer.low_rank else [])
    return all(in_pairs(m, "bf16") or (x.shape[0] > 1 and in_scaled_pairs(m, "bf16")) for m in matrices)


def _one_pass(path: CodePath, layer: Prepared, x: torch.Tensor, n_threads: int) -> torch.Tensor:
    n_inputs = next(n for n in COMPILED_ROWS if n >= x.shape[0])
    key = path, n_inputs, n_threads, x.dtype == torch.bfloat16
    plan = layer.plans.get(key)
    if plan is None:
        x_type = "bf16" if multiplies_pairs(path, layer, x) else "float"
        plan = layer.plans[key] = _plan(path, layer, Product(n_inputs, x_type, layer.rank_encoding), n_threads)
    words = _in_words(x, plan.product)
    y = torch.empty(n_inputs, layer.n_rows)
    job = plan.job[:]
    job[SLOT["x"]], job[SLOT["y"]] = words.data_ptr(), y.data_ptr()
    if plan.first_job is not None and layer.low_rank is not None:
        u = torch.zeros(n_inputs, layer.low_rank.rank)
        first_job = plan.first_job[:]
        first_job[SLOT["x"]], first_job[SLOT["y"]] = words.data_ptr(), u.data_ptr()
        job[SLOT["first_job"]], job[SLOT["u"]] = address(first_job), u.data_ptr()
    team.run(plan.kernel, address(job), plan.n_threads)
    return (y if n_inputs == x.shape[0] else y[: x.shape[0]]).to(x.dtype)


def _in_words(x: torch.Tensor, product: Product) -> torch.Tensor:
    """Return x as (words of 64 columns, n_inputs, 64), filled up with zeros."""
    x = x.detach() if product.x_type == "bf16" else x.detach().float()
    spare_columns, spare_rows = -x.shape[1] % WORD, product.n_inputs - x.shape[0]
    if spare_columns or spare_rows:
        x = torch.nn.functional.pad(x, (0, spare_columns, 0, spare_rows))
    if product.n_inputs == 1:
        return x.contiguous()
    return x.reshape(product.n_inputs, -1, WORD).transpose(0, 1).contiguous()


def _plan(path: CodePath, layer: Prepared, product: Product, n_threads: int) -> Plan:
    """Return the plan of a layer; its job still lacks the addresses of x, y, u and of the first job."""
    n_threads = max(1, min(n_threads, layer.operand.n_bytes // BYTES_A_THREAD))
    kernel, job = _unfinished(path, layer.operand, product, n_threads, layer.n_rows)
    plan = Plan(product, n_threads, kernel, job)
    if layer.bias is not None:
        job[SLOT["bias"]] = layer.bias.data_ptr()
    if layer.low_rank is None:
        return plan
    low: LowRank = layer.low_rank
    inner = replace(product, rank_encoding="")
    job[SLOT["first_kernel"]], first_job = _unfinished(path, low.operand, inner, n_threads, low.rank)
    job[SLOT["lora_B"]], job[SLOT["rank"]] = low.lora_B.data_ptr(), low.rank
    return replace(plan, first_job=first_job)


def _unfinished(
    path: CodePath, operand: Operand, product: Product, n_threads: int, y_stride: int
) -> tuple[int, array[int]]:
    part_rows = _part_rows(operand, rows_together(path, product), n_threads)
    job = new_job(**operand.fields, part_rows=part_rows, n_parts=-(-operand.n_rows // part_rows), y_stride=y_stride)
    return _kernel(path, operand.matrix, product), job


def _part_rows(operand: Operand, together: int, n_threads: int) -> int:
    """Return how many rows a thread claims at once: few enough that all threads end at about the same time."""
    if n_threads == 1:
        return max(operand.n_rows, 1)
    n_parts = max(4 * n_threads, operand.n_bytes // PART_BYTES)
    return max(together, operand.n_rows // n_parts // together * together)


@functools.cache
def _kernel(path: CodePath, matrix: Matrix, product: Product) -> int:
    return address_of(product_text(path, matrix, product), path.target)
