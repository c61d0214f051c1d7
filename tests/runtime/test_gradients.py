"""Gradients through packed products: when the weight is decoded, what is kept, and what autocast asks for."""

from __future__ import annotations

import pytest
import torch
from salr.formats.reader import SalrFile
from torch.utils.checkpoint import checkpoint

from salr.runtime import gradients, product, reference
from salr.runtime.matrix import Matrix
from salr.runtime.packed import PackedWeight

UP = "layers.0.mlp.up"
#: of x, before its columns
LEADING_SHAPE = 5, 3


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
    assert sum(kept) <= 8


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


def adapters(matrix, frozen=(), ranks=(4, 2, 3)):
    """Return factors with scalings 2, 1 and -0.5, all trained but those of ``frozen``."""
    weight, found = matrix.weight, []
    for i, (rank, scaling) in enumerate(zip(ranks, (2.0, 1.0, -0.5), strict=False)):
        pair = torch.randn(rank, weight.n_columns), torch.randn(weight.n_rows, rank)
        found.append((*(factor.requires_grad_(i not in frozen) for factor in pair), scaling))
    return found


def leaves(x, trained):
    return [x, *(factor for a, b, _ in trained for factor in (a, b))]


def results(run, x, trained, bias=None, upstream=None):
    """Return y and the gradients of x, bias and factors, None where there is none, and clear them."""
    leaves = [x, *([] if bias is None else [bias]), *(f for a, b, _ in trained for f in (a, b))]
    y = run(x)
    y.backward(torch.ones_like(y) if upstream is None else upstream)
    found = [y.detach(), *(leaf.grad for leaf in leaves)]
    for leaf in leaves:
        leaf.grad = None
    return found


def dense(matrix, trained, bias=None):
    """Return the function of x that autograd differentiates by itself."""
    weight = reference.dense(matrix.weight)

    def run(x):
        y = x @ weight.T
        for a, b, scaling in trained:
            y = y + scaling * (x @ a.T @ b.T)
        return y if bias is None else y + bias

    return run


def assert_equal(found, expected, tolerance=1e-4):
    """Compare tensors by the norm of their difference, as a share; None is equal to None alone."""
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert (ours - theirs).norm() <= tolerance * theirs.norm() and theirs.norm() > 0


PASSES = {
    "once": lambda run, x: run(x),
    "reentrant": lambda run, x: checkpoint(run, x, use_reentrant=True),
    "repeated": lambda run, x: checkpoint(run, x, use_reentrant=False),
}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 2)])
@pytest.mark.parametrize("bias", [None, "frozen", "trained"])
def test_gradients_of_adapters_are_those_of_the_dense_layer(matrix, passes, frozen, bias):
    assert_as_dense(matrix, passes, frozen, bias, needs_x=True)


@pytest.mark.parametrize("passes", ["once", "repeated"])
@pytest.mark.parametrize("frozen", [(), (1,)])
@pytest.mark.parametrize("bias", [None, "trained"])
def test_adapters_train_where_x_needs_no_gradient(matrix, decoded, passes, frozen, bias):
    assert_as_dense(matrix, passes, frozen, bias, needs_x=False)
    assert len(decoded) == 1  # for the comparison: no gradient goes through the weight


def assert_as_dense(matrix, passes, frozen, bias, needs_x):
    """Compare the output and every gradient, that of x with ``needs_x``, with those of the dense layer."""
    x = torch.randn(*LEADING_SHAPE, matrix.weight.n_columns, requires_grad=needs_x)
    if bias is not None:
        bias = torch.randn(matrix.weight.n_rows, requires_grad=bias == "trained")
    trained, upstream = adapters(matrix, frozen), torch.randn(*LEADING_SHAPE, matrix.weight.n_rows)

    def ours(x):
        return PASSES[passes](lambda x: product.linear(x, matrix, bias, "cpu", trained), x)

    expected = results(dense(matrix, trained, bias), x, trained, bias, upstream)
    assert_equal(results(ours, x, trained, bias, upstream), expected)
    with torch.no_grad():
        assert_equal([ours(x)], expected[:1])


def test_adapters_of_many_rows_are_concatenated(matrix, monkeypatch):
    monkeypatch.setattr(gradients, "MANY_ROWS", 15)
    dimensions, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors, dim=0: dimensions.append(dim) or cat(tensors, dim))
    assert_as_dense(matrix, "once", (1,), None, needs_x=True)
    assert dimensions.count(1) == 4  # u and B, with gradients and without


@pytest.mark.parametrize("seen", [True, False])
def test_a_layer_saves_x_alone_where_someone_sees_it(matrix, seen):
    trained, x = adapters(matrix), torch.randn(4, matrix.weight.n_columns, requires_grad=True)
    expected, saved = results(dense(matrix, trained), x, trained), []

    def run(x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t.clone(), torch.clone):
            return product.linear(x, matrix, None, "cpu", trained)

    assert_equal(
        results(run if seen else lambda x: product.linear(x, matrix, None, "cpu", trained), x, trained), expected
    )
    assert saved == ([x.shape] if seen else [])


@pytest.mark.parametrize("passes", PASSES)
def test_a_layer_may_be_used_again_in_what_is_repeated(matrix, passes):
    trained, x = adapters(matrix), torch.randn(4, matrix.weight.n_columns, requires_grad=True)
    missing = matrix.weight.n_columns - matrix.weight.n_rows

    def used_again(layer):
        def run(x):
            again = layer(torch.nn.functional.pad(layer(x), (0, missing)))
            return torch.cat([again, layer(x[:2]), layer(x[:1]).detach()])  # the same memory, fewer rows

        return lambda x: PASSES[passes](run, x)

    expected = results(used_again(dense(matrix, trained)), x, trained)
    found = results(used_again(lambda x: product.linear(x, matrix, None, "cpu", trained)), x, trained)
    assert_equal(found, expected)


@pytest.mark.parametrize("passes", PASSES)
def test_a_torch_that_cannot_tell_who_sees_saved_tensors_gives_the_same_gradients(matrix, decoded, monkeypatch, passes):
    monkeypatch.setattr(gradients, "_hooks", lambda _: True)  # as before torch 2.8
    assert_as_dense(matrix, passes, (), None, needs_x=True)
    assert len(decoded) == 2  # once for the comparison


def test_factors_of_another_dtype_are_cast_and_their_gradients_back(matrix):
    trained = adapters(matrix)
    x = torch.randn(4, matrix.weight.n_columns).bfloat16().requires_grad_()
    rounded = [(*(f.detach().bfloat16().requires_grad_() for f in pair), scaling) for *pair, scaling in trained]
    found = results(lambda x: product.linear(x, matrix, None, "cpu", trained), x, trained)
    expected = results(lambda x: product.linear(x, matrix, None, "cpu", rounded), x, rounded)
    assert_equal(found, [*expected[:2], *(gradient.float() for gradient in expected[2:])], 0)


def test_under_autocast_adapters_are_computed_in_its_dtype(matrix):
    trained, x = adapters(matrix), torch.randn(4, matrix.weight.n_columns, requires_grad=True)

    def ours(x):
        return product.linear(x, matrix, None, "cpu", trained)

    def cast(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ours(x)

    expected = results(lambda x: ours(x.bfloat16()), x, trained)
    assert_equal(results(cast, x, trained), expected, 0)
    expected = results(ours, x, trained)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the backward pass alone
        y = torch.autograd.grad(sum_without_autocast(ours, x), x)[0]
    torch.testing.assert_close(y, expected[1], rtol=0, atol=0)


def sum_without_autocast(run, x):
    """Return run(x).sum() computed without autocast."""
    with torch.autocast("cpu", enabled=False):
        return run(x).sum()


def test_the_output_may_be_changed_in_place(matrix):
    trained, x = adapters(matrix), torch.randn(*LEADING_SHAPE, matrix.weight.n_columns, requires_grad=True)
    expected = results(lambda x: dense(matrix, trained)(x) * 2 + 1, x, trained)
    assert_equal(
        results(lambda x: product.linear(x, matrix, None, "cpu", trained).mul_(2).add_(1), x, trained), expected
    )


@pytest.mark.parametrize("passes", ["once", "repeated"])
def test_factors_that_change_before_the_backward_pass_are_told(matrix, passes):
    trained, x = adapters(matrix, ranks=(4,)), torch.randn(4, matrix.weight.n_columns, requires_grad=True)
    y = PASSES[passes](lambda x: product.linear(x, matrix, None, "cpu", trained), x)
    with torch.no_grad():
        trained[0][1].add_(1)
    with pytest.raises(RuntimeError, match=r"in ?place"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(4,), LEADING_SHAPE])
@pytest.mark.parametrize("passes", ["once", "reentrant", "repeated"])
@pytest.mark.parametrize("again", ["the layer", "another", "nothing"])
def test_x_that_changes_before_the_backward_pass_is_told(matrix, passes, again, shape):
    trained, x = adapters(matrix, ranks=(4,)), torch.randn(*shape, matrix.weight.n_columns, requires_grad=True)
    other = {"the layer": matrix, "another": Matrix(matrix.weight, None), "nothing": None}[again]

    def run(x):
        x = x * 1
        y = product.linear(x, matrix, None, "cpu", trained)
        x.mul_(2)
        return y + (x.sum() if other is None else product.linear(x, other, None, "cpu", trained)).exp()

    y = PASSES[passes](run, x)
    told = "input of a packed layer was changed" if passes == "repeated" else "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=told):
        y.sum().backward()


def test_x_may_change_after_a_product_that_needs_no_gradient(matrix):
    trained, x = adapters(matrix), torch.randn(4, matrix.weight.n_columns, requires_grad=True)

    def twice(layer):
        def run(x):
            x = x * 1
            y = layer(x).detach()
            x.mul_(2)
            return y + layer(x)

        return lambda x: PASSES["repeated"](run, x)

    expected = results(twice(dense(matrix, trained)), x, trained)
    assert_equal(results(twice(lambda x: product.linear(x, matrix, None, "cpu", trained)), x, trained), expected)


def test_a_graph_can_be_used_twice_and_not_differentiated_several(matrix):
    trained, x = adapters(matrix), torch.randn(4, matrix.weight.n_columns, requires_grad=True)
    y = product.linear(x, matrix, None, "cpu", trained).pow(2).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(y, x, create_graph=True)
    assert torch.equal(gradient, first)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("passes", ["once", "repeated"])  # reentrant checkpoints refuse torch.autograd.grad
def test_a_gradient_with_a_graph_of_its_own_is_the_same_under_autocast(matrix, passes):
    trained, x = adapters(matrix), torch.randn(4, matrix.weight.n_columns, requires_grad=True)
    y = PASSES[passes](lambda x: product.linear(x, matrix, None, "cpu", trained), x).sum()
    expected = torch.autograd.grad(y, leaves(x, trained), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(y, leaves(x, trained), create_graph=True)
    assert_equal(found, expected, 0)


def test_no_rows_have_gradients_of_zeros(matrix):
    trained, x = adapters(matrix), torch.zeros(0, matrix.weight.n_columns, requires_grad=True)
    product.linear(x, matrix, None, "cpu", trained).sum().backward()
    assert x.grad.shape == x.shape
    assert all(torch.equal(f.grad, torch.zeros_like(f)) for a, b, _ in trained for f in (a, b))


def test_torch_func_maps_a_layer_and_is_refused_a_forward_derivative(matrix):
    trained, x = adapters(matrix), torch.randn(*LEADING_SHAPE, matrix.weight.n_columns)

    def ours(x):
        return product.linear(x, matrix, None, "cpu", trained)

    torch.testing.assert_close(torch.func.vmap(ours)(x), ours(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(ours, (x,), (x,))
