"""Masks: exact counts, ties to the lower index, and one threshold over a whole model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from salr.converter.methods.prune import global_kept_counts, keep_largest
from salr.converter.module_options import ModuleOptions

grids = st.tuples(st.integers(1, 8), st.integers(1, 40), st.integers(0, 10**6)).map(
    lambda case: torch.from_numpy(
        np.random.default_rng(case[2]).integers(-7, 8, (case[0], case[1])).astype(np.float32) / 8
    )
)


def largest(weight: torch.Tensor, n_kept: int, n_groups: int = 1) -> torch.Tensor:
    """Return the mask of the ``n_kept`` largest magnitudes, chosen in each of ``n_groups`` groups of rows."""
    return keep_largest(weight.abs().view(n_groups, -1), n_kept // n_groups).view(weight.shape)


def sorted_mask(weight: torch.Tensor, n_kept: int) -> np.ndarray:
    """Keep by a stable sort: largest magnitude first, the lower flat index first among equals."""
    flat = weight.abs().reshape(-1).numpy()
    mask = np.zeros(flat.size, bool)
    mask[np.lexsort((np.arange(flat.size), -flat))[:n_kept]] = True
    return mask.reshape(weight.shape)


@given(grids, st.integers(0, 95))
def test_a_layers_mask_is_the_top_of_a_stable_sort_even_with_massive_ties(weight, percent):
    n_kept = weight.numel() - ModuleOptions(percent / 100).n_removed(weight.numel())
    mask = largest(weight, n_kept).numpy()
    assert mask.sum() == n_kept
    np.testing.assert_array_equal(mask, sorted_mask(weight, n_kept))


@given(grids, st.integers(0, 95))
def test_a_rows_mask_keeps_the_same_number_in_each_row(weight, percent):
    n_rows, n_columns = weight.shape
    kept_in_row = n_columns - ModuleOptions(percent / 100).n_removed(n_columns)
    mask = largest(weight, kept_in_row * n_rows, n_rows).numpy()
    expected = np.stack([sorted_mask(row[None], kept_in_row)[0] for row in weight])
    np.testing.assert_array_equal(mask, expected)


@settings(max_examples=12)
@given(st.lists(grids, min_size=1, max_size=5), st.integers(0, 95))
def test_global_counts_are_those_of_one_sort_over_all_weights(weights, percent):
    flat = np.concatenate([weight.abs().reshape(-1).numpy() for weight in weights])
    n_removed = ModuleOptions(percent / 100).n_removed(flat.size)
    kept = np.lexsort((np.arange(flat.size), -flat))[: flat.size - n_removed]
    ends = np.cumsum([weight.numel() for weight in weights])
    owner = np.searchsorted(ends, kept, side="right")
    expected = np.bincount(owner, minlength=len(weights)).tolist()
    assert global_kept_counts(weights, n_removed) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_global_counts_are_exact_for_every_dtype(dtype):
    torch.manual_seed(0)
    weights = [torch.randn(30, 40).to(dtype) * scale for scale in (0.1, 1, 3)]
    flat = torch.cat([weight.float().abs().reshape(-1) for weight in weights])
    threshold = flat.sort().values[1800]
    counts = global_kept_counts(weights, 1800)
    assert sum(counts) == 1800
    for weight, count in zip(weights, counts, strict=True):
        magnitude = weight.float().abs()
        assert int((magnitude > threshold).sum()) <= count <= int((magnitude >= threshold).sum())


@pytest.mark.parametrize("n_removed", [0, 1, 199, 200])
def test_global_counts_hold_at_the_ends(n_removed):
    weights = [torch.zeros(10, 10), torch.ones(10, 10)]
    counts = global_kept_counts(weights, n_removed)
    assert counts == [max(0, 100 - n_removed), min(100, 200 - n_removed)]


def test_all_equal_weights_keep_the_lowest_indices():
    assert largest(torch.full((2, 4), -0.5), 3).tolist() == [[True, True, True, False], [False] * 4]
    assert largest(torch.zeros(2, 4), 4, 2).tolist() == [[True, True, False, False]] * 2


def test_the_sign_of_a_weight_does_not_matter():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0]])
    assert largest(weight, 2).tolist() == [[False, False, True, True]]


def test_infinite_scores_rank_first():
    assert keep_largest(torch.tensor([[1.0, float("inf"), 2.0]]), 1).tolist() == [[False, True, False]]


@pytest.mark.parametrize(("n_kept", "expected"), [(0, False), (6, True), (7, True), (-1, False)])
def test_keeping_all_or_nothing_needs_no_threshold(n_kept, expected):
    assert (keep_largest(torch.arange(6.0).view(1, 6), n_kept) == expected).all()


@pytest.mark.parametrize(
    ("sparsity", "n_elements", "n_removed"),
    [
        (0.7, 10, 7),
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.1, 30, 3),
        (0.5, 7, 3),
        (0, 9, 0),
        (0.95, 20, 19),
        (0.95, 1, 0),
    ],
)
def test_counts_use_decimal_arithmetic(sparsity, n_elements, n_removed):
    assert ModuleOptions(sparsity).n_removed(n_elements) == n_removed


def test_a_numpy_float_counts_as_the_number_it_is():
    assert ModuleOptions(np.float64(0.7)).n_removed(10) == 7
