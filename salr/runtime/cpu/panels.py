"""Products with many rows of x by bfloat16 pairs: weights are decoded into a thread's cache and multiplied there.

Invariant: weights are rounded to bfloat16 (bf16 ones are exact), as are scaling * (lora_A x); sums are float32. Rows of
the matrix are split between threads, which wait for each other only before and after lora_A x.
"""

from __future__ import annotations

import functools
import itertools
import threading
from array import array
from dataclasses import dataclass

import torch

from . import team
from .decoding import WORD
from .job import SLOT, address, new_job
from .machine import address_of
from .panel_kernels import LANES, PACKED_COLUMNS, PART_ROWS, Panel, pack_text, panel_text, workspace_bytes
from .paths import CodePath
from .prepared import Operand, Prepared
from .rows import Matrix

MOST_INPUTS = 512  # rows of x at once: more would only need more memory
MOST_PANEL_BYTES = 6 << 20  # of x at once: every thread reads all of it again and again from the last-level cache
MOST_VECTORS = 4
_own = threading.local()


@dataclass(frozen=True)
class Plan:
    """Kernels and unfinished jobs of one layer for one panel and number of threads.

    ``kernel`` is that of the last job; every job names the one that comes before it. With adapters: x into panels,
    u = scaling * (lora_A x), u into panels, the product. Without: the first and the last.
    """

    panel: Panel
    n_threads: int
    n_columns: int  # of a panel: x filled up to whole words, then u
    rank: int
    kernel: int
    jobs: tuple[array[int], ...]
    keep: tuple[torch.Tensor, ...]


def many_rows(path: CodePath, layer: Prepared, x: torch.Tensor, n_threads: int) -> torch.Tensor:
    """Return the layer's output (M, N) in bfloat16 for bfloat16 x (M, K)."""
    y = torch.empty(x.shape[0], layer.n_rows, dtype=torch.bfloat16)
    spare = -x.shape[1] % WORD
    x = torch.nn.functional.pad(x.detach(), (0, spare)) if spare else x.detach().contiguous()
    step = _most_inputs(x.shape[1])
    plan = _plan_for(path, layer, min(x.shape[0], step), n_threads)
    for first in range(0, x.shape[0], step):
        _run(plan, x[first : first + step], y[first : first + step])
    return y


def _run(plan: Plan, x: torch.Tensor, y: torch.Tensor) -> None:
    """Finish a plan's jobs for x (M, whole words of columns) and y (M, N), and run them."""
    panel, n_vectors = plan.panel, -(-x.shape[0] // LANES)
    n_panels = -(-n_vectors // panel.n_vectors)
    panel_bytes, each = plan.n_columns // 2 * panel.n_bytes, workspace_bytes(panel, n_panels)
    packed, workspace = _kept("panels", n_panels * panel_bytes), _kept("workspace", plan.n_threads * each)
    jobs = [job[:] for job in plan.jobs]
    for job in jobs:
        job[SLOT["n_inputs"]], job[SLOT["n_panels"]], job[SLOT["panel_bytes"]] = x.shape[0], n_panels, panel_bytes
        job[SLOT["packed"]], job[SLOT["workspace"]], job[SLOT["workspace_bytes"]] = packed, workspace, each
    for job in jobs[:-1:2]:
        job[SLOT["n_rows"]] = job[SLOT["n_parts"]] = n_vectors
    jobs[0][SLOT["x"]], jobs[0][SLOT["x_stride"]] = x.data_ptr(), 2 * x.stride(0)
    jobs[-1][SLOT["out"]], jobs[-1][SLOT["out_stride"]] = y.data_ptr(), 2 * y.stride(0)
    if len(jobs) > 2:
        u = x.new_zeros(x.shape[0], plan.rank)  # a rank that was filled up leaves columns that no kernel writes
        jobs[1][SLOT["out"]] = jobs[2][SLOT["x"]] = u.data_ptr()
        jobs[1][SLOT["out_stride"]] = jobs[2][SLOT["x_stride"]] = 2 * plan.rank
        jobs[2][SLOT["packed"]] += x.shape[1] // 2 * panel.n_bytes
    for before, job in itertools.pairwise(jobs):
        job[SLOT["first_job"]] = address(before)
    team.run(plan.kernel, address(jobs[-1]), plan.n_threads)


def _most_inputs(n_columns: int) -> int:
    """Return how many rows of x are multiplied at once: whole panels of any shape, as fits MOST_PANEL_BYTES."""
    fits = MOST_PANEL_BYTES // (2 * n_columns) // (LANES * MOST_VECTORS)
    return min(MOST_INPUTS, max(1, fits) * LANES * MOST_VECTORS)


def _plan_for(path: CodePath, layer: Prepared, n_inputs: int, n_threads: int) -> Plan:
    """Return the plan with the widest panel among those that add the fewest rows to x."""
    n_vectors = -(-n_inputs // LANES)
    width = min(range(1, MOST_VECTORS + 1), key=lambda n: (-(-n_vectors // n) * n, -n))
    key = path, "panels", width, n_threads
    plan: Plan | None = layer.plans.get(key)
    if plan is None:
        plan = layer.plans[key] = _plan(path, layer, Panel(width), n_threads)
    return plan


def _plan(path: CodePath, layer: Prepared, panel: Panel, n_threads: int) -> Plan:
    n_columns = -(-layer.n_columns // WORD) * WORD
    packing = _pack_kernel(path, panel)
    kernels = [packing]
    jobs = [new_job(part_rows=1, n_columns=n_columns)]
    rank, factors, keep = 0, dict[str, int](), tuple[torch.Tensor, ...]()
    if layer.low_rank is not None:
        low, lora_B = layer.low_rank, layer.low_rank.lora_B.bfloat16()
        rank = -(-low.rank // PACKED_COLUMNS) * PACKED_COLUMNS
        kernels += [_kernel(path, low.operand.matrix, panel), packing]
        jobs += [_product(low.operand, panel, n_threads, {}), new_job(part_rows=1, n_columns=rank)]
        factors, keep = {"lora_B": lora_B.data_ptr(), "rank": low.rank}, (lora_B,)
    if layer.bias is not None:
        factors["bias"] = layer.bias.data_ptr()
    kernels.append(_kernel(path, layer.operand.matrix, panel))
    jobs.append(_product(layer.operand, panel, n_threads, factors))
    for kernel, job in zip(kernels, jobs[1:], strict=False):
        job[SLOT["first_kernel"]] = kernel
    return Plan(panel, n_threads, n_columns + rank, rank, kernels[-1], tuple(jobs), keep)


def _product(operand: Operand, panel: Panel, n_threads: int, fields: dict[str, int]) -> array[int]:
    """Return the unfinished job of one matrix: parts of equal size for all threads, or of the most rows."""
    groups = -(-operand.n_rows // (n_threads * panel.n_rows))
    part_rows = min(PART_ROWS, groups * panel.n_rows)
    return new_job(**operand.fields | fields, part_rows=part_rows, n_parts=-(-operand.n_rows // part_rows))


def _kept(name: str, n_bytes: int) -> int:
    """Return the address of memory of this thread, the same for every call: new memory costs page faults."""
    kept: dict[str, torch.Tensor] = _own.__dict__
    if name not in kept or kept[name].numel() < n_bytes:
        with torch.inference_mode(False):  # it outlives the call, and a later one may run outside inference mode
            kept[name] = torch.empty(n_bytes, dtype=torch.uint8)
    return kept[name].data_ptr()


@functools.cache
def _pack_kernel(path: CodePath, panel: Panel) -> int:
    return address_of(pack_text(panel), path.target)


@functools.cache
def _kernel(path: CodePath, matrix: Matrix, panel: Panel) -> int:
    return address_of(panel_text(path, matrix, panel), path.target)
