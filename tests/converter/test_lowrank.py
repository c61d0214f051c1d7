"""Truncated SVDs: as good as LAPACK's, with fixed signs, and the same bytes every time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from salr.converter.execution.threads import one_thread_each
from salr.converter.methods.lowrank import fix_signs, truncated_svd


def flat_matrix(n_rows: int, n_columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n_rows, n_columns, generator=torch.Generator().manual_seed(seed))


def captured(matrix: torch.Tensor, lora_b: torch.Tensor, lora_a: torch.Tensor) -> float:
    remaining = matrix.double() - lora_b.double() @ lora_a.double()
    return float(matrix.double().square().sum() - remaining.square().sum())


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (7, 64), (64, 7), (65, 63), (200, 65), (64, 200)])
@pytest.mark.parametrize("rank", [1, 4, "full"])
def test_short_sides_are_exact_against_lapack_in_float64(shape, rank):
    rank = min(shape) if rank == "full" else min(rank, *shape)
    matrix = flat_matrix(*shape)
    lora_b, lora_a = truncated_svd(matrix, rank)
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    assert (lora_b.shape, lora_a.shape, lora_b.dtype) == ((shape[0], rank), (rank, shape[1]), torch.float32)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    assert torch.linalg.norm(lora_b.double() @ lora_a.double() - best) <= 1e-5 * torch.linalg.norm(matrix.double())


def test_factors_are_balanced():
    matrix = flat_matrix(40, 90)
    lora_b, lora_a = truncated_svd(matrix, 5)
    root = torch.linalg.svdvals(matrix.double())[:5].sqrt()
    torch.testing.assert_close(torch.linalg.vector_norm(lora_b.double(), dim=0), root, rtol=1e-4, atol=0)
    torch.testing.assert_close(torch.linalg.vector_norm(lora_a.double(), dim=1), root, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1100, 1300), (1300, 1100)])
def test_the_krylov_method_reaches_99_percent_of_the_exact_energy_on_a_flat_spectrum(shape):
    matrix, rank = flat_matrix(*shape), 32
    exact = float(torch.linalg.eigvalsh(matrix.double() @ matrix.double().T)[-rank:].sum())
    share = captured(matrix, *truncated_svd(matrix, rank)) / exact
    assert 0.99 <= share <= 1 + 1e-6


def test_the_krylov_method_finds_a_low_rank_matrix_whole():
    matrix = flat_matrix(1030, 8) @ flat_matrix(8, 1040, seed=1)
    lora_b, lora_a = truncated_svd(matrix, 16)
    assert torch.isfinite(lora_b).all() and torch.isfinite(lora_a).all()
    assert torch.linalg.norm(lora_b @ lora_a - matrix) <= 1e-3 * torch.linalg.norm(matrix)


@pytest.mark.parametrize("shape", [(50, 80), (80, 50), (1030, 1040)])
def test_the_largest_entry_of_each_column_of_b_is_positive(shape):
    lora_b, _ = truncated_svd(flat_matrix(*shape), 6)
    peaks = lora_b.gather(0, lora_b.abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()


def test_fixing_signs_keeps_the_product():
    lora_b, lora_a = flat_matrix(6, 3), flat_matrix(3, 5)
    fixed_b, fixed_a = fix_signs(lora_b, lora_a)
    torch.testing.assert_close(fixed_b @ fixed_a, lora_b @ lora_a)
    assert not torch.equal(fixed_b, lora_b) or not (lora_b.abs().max(0).values != lora_b.max(0).values).any()


@pytest.mark.parametrize("shape", [(90, 120), (1030, 1040)])
def test_the_same_matrix_gives_the_same_bytes(shape):
    matrix = flat_matrix(*shape)
    torch.manual_seed(1)
    with one_thread_each(2) as pool:
        first, second = pool.map(lambda _: truncated_svd(matrix, 5), range(2))
    torch.rand(7)
    with one_thread_each(1) as pool:
        third = pool.submit(truncated_svd, matrix.clone(), 5).result()
    for b, a in (second, third):
        np.testing.assert_array_equal(b.numpy().view(np.uint32), first[0].numpy().view(np.uint32))
        np.testing.assert_array_equal(a.numpy().view(np.uint32), first[1].numpy().view(np.uint32))


@pytest.mark.parametrize("shape", [(6, 10), (1030, 1040)])
def test_a_matrix_of_zeros_gives_zero_factors(shape):
    lora_b, lora_a = truncated_svd(torch.zeros(shape), 4)
    assert not (lora_b @ lora_a).any() and torch.isfinite(lora_b).all() and torch.isfinite(lora_a).all()


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e12, 1e18])
def test_scale_does_not_matter(scale):
    matrix = flat_matrix(30, 40)
    expected = torch.linalg.multi_dot(truncated_svd(matrix, 7))
    found = torch.linalg.multi_dot(truncated_svd(matrix * scale, 7)) / scale
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_every_rank_keeps_the_theorems_bound():
    matrix = flat_matrix(24, 60)
    energy = float(matrix.double().square().sum())
    for rank in range(1, 25):
        remaining = energy - captured(matrix, *truncated_svd(matrix, rank))
        assert remaining <= energy * (1 - rank / 24) + 1e-6 * energy
