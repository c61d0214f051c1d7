"""How long decoded weights live that a forward pass, repeated inside a backward pass, hands over to its gradients."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from salr.formats.reader import SalrFile
from torch.utils.checkpoint import checkpoint

from salr.runtime import gradients, product, reference
from salr.runtime.matrix import Matrix
from salr.runtime.packed import PackedWeight

PASSES = {
    "once": lambda run, x: run(x),
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "repeated": lambda run, x: checkpoint(run, x, use_reentrant=False),
}


@pytest.fixture
def matrix(golden):
    return Matrix(PackedWeight.from_module(SalrFile(golden).module("layers.0.mlp.up")), None)


@pytest.fixture
def trained(matrix):
    """Return an adapter of rank 4."""
    a, b = torch.randn(4, matrix.weight.n_columns), torch.randn(matrix.weight.n_rows, 4)
    return [(a.requires_grad_(), b.requires_grad_(), 2.0)]


@pytest.fixture
def x(matrix):
    return torch.randn(4, matrix.weight.n_columns, requires_grad=True)


def assert_same_gradients(run, reference_run, x, trained):
    """Compare what reaches x and the factors."""
    found = []
    for each in (run, reference_run):
        each(x).sum().backward()
        leaves = [x, *trained[0][:2]]
        found.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm() and theirs.norm() > 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_a_repeated_pass_decoded_in_vain_ends_with_the_backward_pass(matrix, trained, x, monkeypatch, reentrant):
    decoded, dense_of = [], reference.dense
    monkeypatch.setattr(reference, "dense", lambda weight: remember(dense_of(weight)))

    def remember(weight):
        decoded.append(weakref.ref(weight))
        return weight

    def run(x, scale):
        return product.linear(x, matrix, None, "cpu", trained).detach() * scale  # the product needs no gradient

    scale = torch.ones((), requires_grad=True)
    checkpoint(run, x, scale, use_reentrant=reentrant).sum().backward()
    gc.collect()
    assert len(decoded) == 1 and decoded[0]() is None and scale.grad is not None


@pytest.fixture
def alive(monkeypatch):
    """Return a function that counts the decoded weights in memory, now and the most when one more was decoded."""
    found, most, dense_of = [], [0], reference.dense

    def count():
        most[0] = max(most[0], sum(weight() is not None for weight in found))
        return sum(weight() is not None for weight in found), most[0]

    def remember(weight):
        count()
        decoded = dense_of(weight)
        found.append(weakref.ref(decoded))
        return decoded

    monkeypatch.setattr(reference, "dense", remember)
    return count


def layers(matrix, trained, n_layers=12, fresh=False):
    """Return layers of one weight that know nothing of each other, (..., K) to (..., K)."""
    missing = matrix.weight.n_columns - matrix.weight.n_rows

    def layer(own):
        def run(x):
            now = [(a * 1, b * 1, scaling) for a, b, scaling in trained] if fresh else trained
            return torch.nn.functional.pad(product.linear(x, own, None, "cpu", now), (0, missing)) / 16

        return run

    return [layer(Matrix(matrix.weight, None)) for _ in range(n_layers)]


def one_by_one(x, each, repeated):
    for run in each:
        x = repeated(run, x)
    return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_was_decoded_ends_with_a_backward_pass_that_fails(matrix, trained, x, alive, reentrant):
    def fail(_):
        raise RuntimeError("on purpose")

    first, second = layers(matrix, trained, 2)

    def run(x):
        x = first(x)
        if x.requires_grad:
            x.register_hook(fail)
        return second(x)

    y = checkpoint(run, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="on purpose"):
        y.sum().backward()
    gc.collect()
    assert alive() == (0, 1)  # the first layer's was there when the second's was decoded


def test_factors_that_are_made_anew_each_time_let_no_weights_gather(matrix, trained, x, alive):
    each = layers(matrix, trained, fresh=True)
    runs = [partial(one_by_one, each=each, repeated=PASSES[name]) for name in ("repeated", "once")]
    assert_same_gradients(*runs, x, trained)
    assert alive() == (0, 0)  # none when the next was decoded


@pytest.mark.parametrize("inner", PASSES)
@pytest.mark.parametrize("outer", ["reentrant", "repeated"])
def test_many_layers_that_are_repeated_at_once_hold_few_weights(matrix, trained, x, alive, outer, inner):
    each = layers(matrix, trained)
    parts, plain = (partial(one_by_one, each=each, repeated=PASSES[name]) for name in (inner, "once"))
    assert_same_gradients(lambda x: PASSES[outer](parts, x), plain, x, trained)
    left, most = alive()
    assert left == 0 and most <= gradients.MOST_HELD < len(each)
