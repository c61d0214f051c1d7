"""Gradients through products on packed weights, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from salr.runtime.gradients import differentiable
from salr.runtime.matrix import Matrix
from tests.cuda.matrices import DEVICE, LARGE, adapters, error, exact, weight

pytestmark = pytest.mark.gpu


def gradients(run, x, upstream):
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(upstream)
    return y.detach(), x.grad


def product(packed, low_rank, dtype):
    return Matrix(packed, low_rank).product(torch.device(DEVICE), dtype, None, "cuda").trainable()


@pytest.mark.emulated(dtype=[torch.bfloat16], encoding=["bf16"])
@pytest.mark.parametrize("encoding", ["bf16", "fp16", "fp32", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_x_is_that_of_the_dense_matrix(encoding, dtype):
    packed, low_rank = weight(1000, 712, 0.5, encoding), adapters(1000, 712, 24, dtype)
    x, upstream = (torch.randn(300, n, device=DEVICE).to(dtype) for n in (712, 1000))
    y, gradient = gradients(lambda x: differentiable(x, product(packed, low_rank, dtype)), x, upstream)
    assert error(y, exact(x, packed, low_rank, None, dtype)) < 5e-3
    columns = exact(torch.eye(712, device=DEVICE), packed, low_rank, None, dtype)  # (K, N)
    assert error(gradient, upstream.double() @ columns.T) < 5e-3


@pytest.mark.emulated(rank=[])
@pytest.mark.parametrize("shape", [LARGE, (300, 100), (1, 8)])
@pytest.mark.parametrize("rank", [0, 64, 300])
@pytest.mark.parametrize("batch", [1, 40, 520])
def test_any_size_and_rank_has_a_gradient(shape, rank, batch):
    packed, low_rank = weight(*shape), adapters(*shape, rank) if rank else None
    x, upstream = (torch.randn(batch, n, device=DEVICE).bfloat16() for n in reversed(shape))
    _, gradient = gradients(lambda x: differentiable(x, product(packed, low_rank, torch.bfloat16)), x, upstream)
    columns = exact(torch.eye(shape[1], device=DEVICE), packed, low_rank, None)
    assert error(gradient, upstream.double() @ columns.T) < 5e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradient_and_decodes_once(reentrant, monkeypatch):
    packed, low_rank = weight(512, 256), adapters(512, 256, 16)
    x, upstream = (torch.randn(300, n, device=DEVICE).bfloat16() for n in (256, 512))
    trainable, decoded = product(packed, low_rank, torch.bfloat16), []
    decode = trainable.decode
    monkeypatch.setattr(trainable, "decode", lambda: decoded.append(decode()) or decoded[-1])
    _, expected = gradients(lambda x: differentiable(x, trainable), x, upstream)
    assert len(decoded) == 1
    _, gradient = gradients(lambda x: checkpoint(differentiable, x, trainable, use_reentrant=reentrant), x, upstream)
    assert len(decoded) == 2 and error(gradient, expected.double()) < 5e-3


def test_a_layer_keeps_no_dense_weight_between_forward_and_backward():
    packed = weight(4096, 4096)
    trainable = product(packed, None, torch.bfloat16)
    x = torch.randn(256, 4096, device=DEVICE).bfloat16().requires_grad_()
    differentiable(x, trainable).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = differentiable(x, trainable)
    assert torch.cuda.memory_allocated() - before < 2 * y.numel() * 2 + 2**20
