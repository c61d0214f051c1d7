"""What launching a training step costs the host: real layers around products whose launches go nowhere.

Invariant: everything that the host does for a step on a GPU is done, but for the driver, in whose place stands a call
of the C library; in float32 on a CPU, with matrices so small that arithmetic is no matter. What is computed means
nothing, and torch's own operations cost a CPU less than a GPU's launches.
"""

from __future__ import annotations

import contextlib
import ctypes
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from random_model import Sizes
from salr.cuda import expanded, launching
from salr.cuda.compilation import Function
from salr.cuda.device_layout import SlabWeight
from salr.cuda.low_rank import fragments
from torch.utils._python_dispatch import TorchDispatchMode

from salr.runtime.backends import Product
from salr.runtime.linear import SalrLinear
from salr.runtime.matrix import Matrix, _Ready

from .cost import SIDES, prepared
from .report import table

SIZES = Sizes(hidden=128, layers=4, heads=2, kv_heads=1, head_columns=64, intermediate=256, words=64)
TOKENS = 4
WARM_UP = 10
HEAD = ("side", "checkpointing", "host ms a step", "x dense", "us more a linear", "operations", "views", "launches")
_CPU = torch.device("cpu")
_LINEARS = 7 * SIZES.layers
_VIEWS = (
    "view",
    "_unsafe_view",
    "t",
    "transpose",
    "slice",
    "split",
    "detach",
    "alias",
    "expand",
    "unsqueeze",
    "permute",
)


def run(steps: int) -> None:
    """Time steps of the sides in turn, with both kinds of checkpointing, and print a table in Markdown."""
    torch.set_num_threads(1)
    with replaced_driver():
        print(table(HEAD, measured(steps)))


def measured(steps: int) -> list[list[str]]:
    """Return the table's lines; ``replaced_driver`` is at work."""
    sides = {side: kind for side, kind in SIDES.items() if kind[0] != "nf4"}
    models = {side: model(*kind) for side, kind in sides.items()}
    lines = []
    for reentrant in (False, True):
        stepped = {}
        for side, tuned in models.items():
            checkpoint(tuned, reentrant)
            stepped[side] = tuned, [parameter for parameter in tuned.parameters() if parameter.requires_grad]
            for _ in range(WARM_UP):
                step(*stepped[side])
        times: dict[str, list[float]] = {side: [] for side in models}
        for _ in range(steps):
            for side, arguments in stepped.items():
                start = time.perf_counter()
                step(*arguments)
                times[side].append(1e3 * (time.perf_counter() - start))
        dense = None
        for side, taken in times.items():
            fastest = statistics.mean(sorted(taken)[: max(1, steps // 4)])  # others use the machine too
            dense = dense or fastest
            lines.append([
                side, "reentrant" if reentrant else "not reentrant", f"{fastest:.1f}", f"{fastest / dense:.2f}",
                f"{1e3 * (fastest - dense) / _LINEARS:.0f}", *map(str, counted(*stepped[side])),
            ])  # fmt: skip
    return lines


def model(kind: str, train_residual: bool) -> Any:
    """Return a model with adapters in float32 whose packed layers compute as on a GPU."""
    tuned = prepared(kind, train_residual, SIZES, _CPU).float()
    for module in tuned.modules():
        if isinstance(module, SalrLinear):
            install(module.matrices()[0])
    return tuned


def install(matrix: Matrix) -> None:
    """Make the GPU's product with an expanded weight the one that a matrix uses; it expands nothing."""
    nothing = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    slabs = SlabWeight(matrix.weight.n_rows, matrix.weight.n_columns, "bitmap16", torch.float32, *nothing, 1024)
    ranks = matrix.adapters
    product = expanded.ExpandedProduct(slabs, None if ranks is None else fragments(ranks, torch.float32), None)
    matrix._products[_CPU, None, None] = _Ready(Product(product, lambda: product), None, None)


@contextlib.contextmanager
def replaced_driver() -> Iterator[None]:
    """Let launches call the C library, with as many arguments as a launch has."""
    nothing = ctypes.CDLL(None).sched_yield
    nothing.argtypes = (ctypes.c_void_p,) * 4
    driver: Any = SimpleNamespace(cuLaunchKernelEx=nothing)
    gpu: Any = SimpleNamespace(
        shared_memory_per_multiprocessor=228 << 10, shared_memory_per_block_optin=227 << 10, multi_processor_count=132
    )
    kernels = {
        "function": lambda *_: Function(1, 0), "stream_of": lambda _: 0, "definitions": lambda *_, **__: ()
    }  # fmt: skip
    cuda = {"get_device_properties": lambda _: gpu, "current_device": lambda: 0}
    modules = (expanded, kernels), (torch.cuda, cuda)
    with contextlib.ExitStack() as stack:
        for module, replaced in modules:
            stack.enter_context(mock.patch.multiple(module, **replaced))
        stack.enter_context(mock.patch.object(launching, "driver", lambda: driver))
        yield


def checkpoint(tuned: Any, reentrant: bool) -> None:
    """Choose a kind of gradient checkpointing."""
    options = {"use_reentrant": reentrant, "preserve_rng_state": False}
    tuned.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if reentrant:
        tuned.enable_input_require_grads()


def step(tuned: Any, trained: list[torch.nn.Parameter]) -> None:
    """Run forward and backward passes, and drop the gradients."""
    ids = torch.arange(TOKENS)[None]
    tuned(input_ids=ids, labels=ids).loss.backward()
    for parameter in trained:
        parameter.grad = None


def counted(tuned: Any, trained: list[torch.nn.Parameter]) -> tuple[int, int, int]:
    """Return how many of torch's operations a step dispatches, views apart, and how often it launches ours."""
    seen: Counter[bool] = Counter()
    launch, launches = launching.Launch.__call__, []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), options: Any = None) -> Any:
            seen[operation.overloadpacket.__name__.startswith(_VIEWS)] += 1
            return operation(*args, **(options or {}))

    def count(self: launching.Launch, stream: int) -> None:
        launches.append(stream)
        launch(self, stream)

    with mock.patch.object(launching.Launch, "__call__", count), Counting():
        step(tuned, trained)
    return seen[False], seen[True], len(launches)
