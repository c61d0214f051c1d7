"""Adapters that train beside an expanded product: their gradients against float64, in every pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from salr.runtime import gradients, product, reference
from salr.runtime.matrix import Matrix
from salr.runtime.packed import Adapters
from salr.runtime.packing import pack

pytestmark = pytest.mark.gpu
DEVICE, BACKEND = "cuda", "cuda"
#: frozen in the packed product and trained beside it
RANKS = [(0, (16,)), (64, (16,)), (0, (16, 64)), (300, (5, 3))]
PASSES = {
    "once": lambda run, x: run(x),
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "repeated": lambda run, x: checkpoint(run, x, use_reentrant=False),
}


def random(*shape, scale=1.0):
    return torch.randn(*shape, device=DEVICE) * scale


def packed_matrix(n_rows, n_columns, rank):
    dense = random(n_rows, n_columns, scale=0.02)
    frozen = Adapters(
        random(rank, n_columns, scale=0.02).bfloat16(), random(n_rows, rank, scale=0.02).bfloat16(),
        torch.rand(rank, device=DEVICE) + 0.5,
    )  # fmt: skip
    return Matrix(pack(dense, random(n_rows, n_columns) > 0, "bf16", 128), frozen if rank else None)


def exact(matrix, x, trained):
    """Return the product in float64, differentiable."""
    weight, own = reference.dense(matrix.weight).double(), matrix.adapters
    if own is not None:
        weight = weight + (own.lora_B.double() * own.scaling.double()) @ own.lora_A.double()
    y = x @ weight.T
    for a, b, scaling in trained:
        y = y + scaling * (x @ a.T @ b.T)
    return y


def leaves(x, trained):
    return [x, *(factor for a, b, _ in trained for factor in (a, b))]


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 4096), (300, 100)])
@pytest.mark.parametrize(("frozen", "ranks"), RANKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_adapters_are_those_of_the_dense_matrix(passes, shape, frozen, ranks, dtype, monkeypatch):
    monkeypatch.setattr(gradients, "MANY_ROWS", 512 if shape[0] == 300 else 4096)
    matrix, (n_rows, n_columns) = packed_matrix(*shape, frozen), shape
    x = random(2, 260, n_columns).bfloat16().requires_grad_()
    trained = [
        (random(rank, n_columns, scale=0.02).to(dtype).requires_grad_(),
         random(n_rows, rank, scale=0.2).to(dtype).requires_grad_(), scaling)
        for rank, scaling in zip(ranks, (2.0, 0.75), strict=False)
    ]  # fmt: skip
    upstream = random(2, 260, n_rows).bfloat16()
    wide = [(a.detach().double().requires_grad_(), b.detach().double().requires_grad_(), s) for a, b, s in trained]
    wide_x = x.detach().double().requires_grad_()
    expected = exact(matrix, wide_x, wide)
    expected.backward(upstream.double())

    y = PASSES[passes](lambda x: product.linear(x, matrix, None, BACKEND, trained), x)
    y.backward(upstream)
    assert y.dtype == x.dtype and relative_error(y, expected) < 1e-2
    for found, reference_leaf in zip(leaves(x, trained), leaves(wide_x, wide), strict=True):
        assert found.grad.dtype == found.dtype and relative_error(found.grad, reference_leaf.grad) < 1e-2
    with torch.no_grad():
        assert relative_error(product.linear(x, matrix, None, BACKEND, trained), expected) < 1e-2


def relative_error(found, expected):
    return float((found.detach().double() - expected.detach()).norm() / expected.detach().norm())


def test_a_step_can_be_captured_and_replayed():
    matrix = packed_matrix(1024, 512, 64)
    x = random(300, 512).bfloat16().requires_grad_()
    trained = [
        (random(16, 512, scale=0.02).bfloat16().requires_grad_(), random(1024, 16).bfloat16().requires_grad_(), 2.0)
    ]

    def step():
        y = checkpoint(
            lambda x: product.linear(x, matrix, None, BACKEND, trained),
            x,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return torch.autograd.grad(y.float().square().sum(), leaves(x, trained))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [step() for _ in range(3)][-1]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = step()
        for gradient in found:
            gradient.fill_(torch.nan)
        graph.replay()
        stream.synchronize()
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-3
