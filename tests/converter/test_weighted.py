"""Algebra under a Gram matrix, against brute force in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from salr.converter.methods.subspace import orthonormalise, start_basis, subspace_step
from salr.converter.methods.weighted import (
    DAMPING,
    ScaledGram,
    balance,
    gram_matrix,
    output_energy,
    refine_factors,
    refit_values,
    scaled_gram,
    weighted_svd,
)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(n_columns: int, seed: int = 0, n_tokens: int = 60) -> torch.Tensor:
    inputs = random(seed, n_tokens, n_columns) @ random(seed + 1, n_columns, n_columns)
    return inputs.T @ inputs


def damped(gram: torch.Tensor) -> torch.Tensor:
    return gram.double() + DAMPING * gram.double().diagonal().mean() * torch.eye(gram.shape[0])


def square_root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def best_product(error: torch.Tensor, gram: torch.Tensor, rank: int) -> torch.Tensor:
    """Return argmin |(E - L) H^(1/2)| over rank r: SVD_r(E H^(1/2)) H^(-1/2)."""
    root = square_root(damped(gram))
    left, values, right = torch.linalg.svd(error.double() @ root, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank] @ torch.linalg.inv(root)


@pytest.mark.parametrize(("n_tokens", "n_columns"), [(1, 1), (7, 191), (50, 192), (30, 193), (64, 576), (5, 1000)])
def test_a_gram_matrix_is_symmetric_and_that_of_its_inputs(n_tokens, n_columns):
    inputs = torch.randn(n_tokens, n_columns)
    gram = gram_matrix(inputs)
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=0)
    torch.testing.assert_close(gram.double(), inputs.double().T @ inputs.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_tokens", [60, 5, 1])
def test_a_scaled_gram_is_the_gram_with_one_percent_of_its_mean_diagonal(n_tokens):
    gram = gram_of(12, n_tokens=n_tokens)
    found = scaled_gram(gram)
    whole = found.scale[:, None].double() * found.correlation.double() * found.scale.double()
    torch.testing.assert_close(whole, damped(gram), rtol=1e-5, atol=float(gram.abs().max()) * 1e-6)
    assert (found.correlation.diagonal() == 1).all()
    assert torch.linalg.eigvalsh(found.correlation.double()).min() > 0


def test_a_gram_of_nothing_weighs_every_input_alike():
    found = scaled_gram(torch.zeros(5, 5))
    assert found.scale.tolist() == [1] * 5 and torch.equal(found.correlation, torch.eye(5))


@pytest.mark.parametrize("shape", [(9, 16), (16, 9), (12, 12)])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_weighted_svd_is_the_optimum_that_the_root_of_the_gram_gives(shape, rank):
    error, gram = random(3, *shape), gram_of(shape[1], 4)
    lora_b, lora_a = weighted_svd(error, scaled_gram(gram), rank)
    assert (tuple(lora_b.shape), tuple(lora_a.shape)) == ((shape[0], rank), (rank, shape[1]))
    expected = best_product(error, gram, rank)
    torch.testing.assert_close((lora_b @ lora_a).double(), expected, rtol=1e-3, atol=1e-3)
    reached = output_energy(error - lora_b @ lora_a, damped(gram).float())
    assert reached == pytest.approx(output_energy(error - expected.float(), damped(gram).float()), rel=1e-4)


def test_refined_factors_reach_the_same_optimum_from_a_rough_basis():
    # three strong directions over a little noise, so that two steps converge
    error, gram = random(0, 20, 3) @ random(1, 3, 16) + 0.01 * random(2, 20, 16), scaled_gram(gram_of(16))
    in_scale = error * gram.scale
    factors = refine_factors(in_scale, start_basis(in_scale, 3, gram.matrix), gram)
    expected = torch.linalg.multi_dot(weighted_svd(error, gram, 3))
    torch.testing.assert_close(torch.linalg.multi_dot(factors), expected, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 30))
def test_a_refit_never_increases_the_output_error(seed, n_columns, n_tokens):
    gram = scaled_gram(gram_of(n_columns, seed, n_tokens)).correlation
    target, start = random(seed + 2, 6, n_columns), random(seed + 3, 6, n_columns)
    mask = random(seed + 4, 6, n_columns) > 0
    found = refit_values(target, start, mask, gram)
    before = output_energy(target - start.masked_fill(~mask, 0), gram)
    assert (found[~mask] == 0).all()
    assert output_energy(target - found, gram) <= before * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_a_refit_solves_a_tiny_masked_least_squares_exactly(seed):
    gram = scaled_gram(gram_of(7, seed)).correlation
    target, mask = random(seed + 1, 5, 7), random(seed + 2, 5, 7) > 0
    found = refit_values(target, torch.zeros(5, 7), mask, gram)
    root = square_root(gram.double()).numpy()
    for row in range(5):
        kept = mask[row].numpy()
        expected = np.linalg.lstsq(root[:, kept], root @ target[row].double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[row].numpy()[kept], expected, rtol=2e-3, atol=2e-3)


def test_a_refit_of_rows_that_keep_nothing_is_zero():
    found = refit_values(random(0, 2, 5), random(1, 2, 5), torch.zeros(2, 5, dtype=torch.bool), torch.eye(5))
    assert not found.any()


@pytest.mark.parametrize("n_rows", [1, 255, 257])
def test_output_energy_is_the_squared_norm_of_the_outputs(n_rows):
    error, inputs = random(0, n_rows, 10), random(1, 40, 10)
    expected = float((inputs.double() @ error.double().T).square().sum())
    assert output_energy(error, inputs.T @ inputs) == pytest.approx(expected, rel=1e-5)


def test_balancing_keeps_the_product_and_evens_the_factors():
    lora_b, lora_a = random(0, 12, 3) * 100, random(1, 3, 9) / 7
    found_b, found_a = balance(lora_b, lora_a)
    torch.testing.assert_close(found_b @ found_a, lora_b @ lora_a, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found_b.norm(dim=0), found_a.norm(dim=1))
    assert (found_b.gather(0, found_b.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("rank", [1, 5, 8])
def test_a_basis_is_orthonormal_even_of_small_columns(rank):
    basis = orthonormalise(random(0, 30, rank) * 10.0 ** -torch.arange(rank))
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank), rtol=0, atol=1e-4)


def test_subspace_steps_turn_towards_the_leading_left_vectors():
    error, gram = random(0, 10, 2) @ random(1, 2, 12) + 0.01 * random(2, 10, 12), gram_of(12)
    basis = start_basis(error, 2, gram)
    for _ in range(3):
        basis = subspace_step(error, basis, gram)
    vectors = torch.linalg.eigh((error.double() @ gram.double()) @ error.double().T).eigenvectors[:, -2:]
    overlap = torch.linalg.svdvals(vectors.T @ basis.double())
    assert overlap.min() > 1 - 1e-6


def test_the_identity_gram_weighs_nothing():
    identity = ScaledGram.identity(torch.zeros(3, 4))
    assert identity.scale.tolist() == [1] * 4 and identity.matrix is None
