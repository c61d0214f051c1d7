"""Gradients through packed products: when the weight is decoded, what is kept, and what autocast asks for."""

from __future__ import annotations

import pytest
import torch
from salr.formats.reader import SalrFile
from torch.utils.checkpoint import checkpoint

from salr.runtime import product, reference
from salr.runtime.matrix import Matrix
from salr.runtime.packed import PackedWeight

UP = "layers.0.mlp.up"


@pytest.fixture
def matrix(golden):
    return Matrix(PackedWeight.from_module(SalrFile(golden).module(UP)), None)


@pytest.fixture
def decoded(monkeypatch):
    """Count how often a weight is decoded by the reference."""
    found, dense = [], reference.dense
    monkeypatch.setattr(reference, "dense", lambda weight: found.append(weight.n_rows) or dense(weight))
    return found


def gradient(run, x):
    x = x.clone().requires_grad_()
    run(x).pow(2).sum().backward()
    return x.grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_pass_that_checkpointing_repeats_decodes_for_the_gradient_too(matrix, decoded, reentrant):
    x = torch.randn(4, matrix.weight.n_columns)

    def run(x):
        return product.linear(x, matrix, None, "cpu")

    expected = gradient(run, x)
    assert len(decoded) == 1
    found = gradient(lambda x: checkpoint(run, x, use_reentrant=reentrant), x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(decoded) == 2


def test_saved_tensors_that_are_moved_away_and_back_change_nothing(matrix):
    x = torch.randn(4, matrix.weight.n_columns)

    def run(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            return product.linear(x, matrix, None, "cpu")

    expected = gradient(lambda x: product.linear(x, matrix, None, "cpu"), x)
    torch.testing.assert_close(gradient(run, x), expected, rtol=0, atol=0)


def test_no_dense_weight_is_kept_between_forward_and_backward(matrix):
    kept = []
    x = torch.randn(4, matrix.weight.n_columns, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.untyped_storage().nbytes()) or t, lambda t: t
    ):
        product.linear(x, matrix, None, "cpu")
    assert kept and sum(kept) <= 8


def test_a_bias_that_is_trained_has_a_gradient(matrix):
    bias = torch.zeros(matrix.weight.n_rows, requires_grad=True)
    x = torch.randn(4, matrix.weight.n_columns)
    product.linear(x, matrix, bias, "cpu").sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 4))


def test_autocast_casts_x_as_torch_does(matrix):
    x = torch.randn(4, matrix.weight.n_columns)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = product.linear(x, matrix, None, "cpu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, product.linear(x.bfloat16(), matrix, None, "cpu"))
