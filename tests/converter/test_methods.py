"""What each method chooses: exact counts, the errors it promises, and the same answer every time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from salr.converter.methods import Problem, Solution, solve
from salr.converter.methods.lowrank import truncated_svd
from salr.converter.methods.prune import Groups
from salr.converter.methods.weighted import output_energy

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["magnitude", "alternating", "wanda", "sparsegpt", "joint"]
#: 132 columns: SparseGPT prunes in pieces of 128, so the last one is short
SHAPE = (20, 132)
SCOPES = {
    "layer": (Groups("layer"), 1301),
    "row": (Groups("row"), 20 * 61),
    "2:4": (Groups("n:m", 4), 20 * 66),
}


def gram_of(n_columns: int, seed: int = 0, n_tokens: int = 400) -> torch.Tensor:
    """Return X^T X of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n_tokens, n_columns, generator=generator) @ torch.randn(
        n_columns, n_columns, generator=generator
    )
    inputs *= torch.rand(n_columns, generator=generator).square() * 3 + 0.01
    return inputs.T @ inputs


def problem_of(scope: str = "row", rank: int = 4, seed: int = 0, *, data: bool = True, **changes) -> Problem:
    weight = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(seed))
    groups, n_kept = SCOPES[scope]
    settings = {"rounds": 12, "dtype": torch.float32, "gram": gram_of(SHAPE[1], seed) if data else None} | changes
    return Problem(weight, n_kept, groups, rank, **settings)


def stored(problem: Problem, solution: Solution) -> torch.Tensor:
    """Return S + B A as the file would hold it."""
    values = problem.weight if solution.values is None else solution.values.to(problem.dtype).float()
    sparse = values.masked_fill(~solution.mask, 0)
    return sparse if solution.factors is None else solution.factors.subtracted(sparse.neg()).neg()


def frobenius(problem: Problem, method: str) -> float:
    return float((problem.weight - stored(problem, solve(method, problem))).square().sum())


def output(problem: Problem, method: str) -> float:
    return output_energy(problem.weight - stored(problem, solve(method, problem)), problem.gram)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("rank", [0, 3])
def test_every_method_keeps_the_exact_number_in_every_group(method, scope, rank):
    problem = problem_of(scope, rank)
    solution = solve(method, problem)
    assert solution.mask.shape == SHAPE and int(solution.mask.sum()) == problem.n_kept
    if scope == "row":
        assert set(solution.mask.sum(1).tolist()) == {61}
    if scope == "2:4":
        assert set(solution.mask.reshape(-1, 4).sum(1).tolist()) == {2}
    shapes = solution.factors and [tuple(solution.factors.lora_B.shape), tuple(solution.factors.lora_A.shape)]
    assert shapes == ([(20, 3), (3, 132)] if rank else None)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_problem_gives_the_same_bits_and_factors_in_the_files_dtype(method, dtype):
    first, second = (solve(method, problem_of(dtype=dtype)) for _ in range(2))
    assert torch.equal(first.mask, second.mask)
    pairs = ((first.factors.lora_B, second.factors.lora_B), (first.factors.lora_A, second.factors.lora_A))
    for one, two in (*pairs, (first.values, second.values)):
        assert (one is None and two is None) or torch.equal(one, two)
    assert first.factors.lora_A.dtype == first.factors.lora_B.dtype == dtype
    peaks = first.factors.lora_B.float().gather(0, first.factors.lora_B.float().abs().argmax(0, keepdim=True))
    assert (peaks > 0).all()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scope", ["layer", "row"])
def test_alternating_beats_magnitude_and_svd_in_frobenius_error(seed, scope):
    problem = problem_of(scope, 6, seed, data=False)
    assert frobenius(problem, "alternating") < 0.95 * frobenius(problem, "magnitude")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scope", SCOPES)
def test_joint_beats_wanda_and_its_weighted_svd_in_output_error(seed, scope):
    problem = problem_of(scope, 6, seed)
    assert output(problem, "joint") < 0.8 * output(problem, "wanda")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scope", SCOPES)
def test_sparsegpt_makes_up_for_a_part_of_what_its_own_mask_costs(seed, scope):
    problem = problem_of(scope, 0, seed)
    mask = solve("sparsegpt", problem).mask
    assert output(problem, "sparsegpt") < 0.8 * output_energy(problem.weight.masked_fill(mask, 0), problem.gram)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("method", ["alternating", "wanda", "joint"])
def test_a_residual_lowers_the_output_error(method, seed):
    without, with_rank = (output(problem_of("row", rank, seed), method) for rank in (0, 8))
    assert with_rank < without


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_joints_values_are_the_least_squares_ones_beside_the_factors_as_stored(scope, dtype):
    problem = problem_of(scope, 6, dtype=dtype)
    solution = solve("joint", problem)
    gram = problem.gram.double()
    root = torch.linalg.cholesky(gram + 0.01 * gram.diagonal().mean() * torch.eye(gram.shape[0])).T
    target = (problem.weight.double() - solution.factors.lora_B.double() @ solution.factors.lora_A.double()) @ root.T
    found = least = 0.0
    for row, kept, values in zip(target, solution.mask, solution.values.double(), strict=True):
        best = torch.linalg.lstsq(root[:, kept], row[:, None]).solution[:, 0]
        least += float((row - root[:, kept] @ best).square().sum())
        found += float((row - root[:, kept] @ values[kept]).square().sum())
    assert found < 1.001 * least


def test_data_lowers_the_output_error_of_alternating():
    blind = problem_of(data=False)
    seeing = problem_of()
    error = output_energy(seeing.weight - stored(blind, solve("alternating", blind)), seeing.gram)
    assert output(seeing, "alternating") < 0.8 * error


def test_magnitude_is_the_papers_mask_and_svd():
    problem = problem_of("layer", 5, data=False)
    solution = solve("magnitude", problem)
    size = problem.weight.abs()
    assert solution.values is None and size[solution.mask].min() >= size[~solution.mask].max()
    expected = torch.linalg.multi_dot(truncated_svd(problem.weight.masked_fill(solution.mask, 0), 5))
    torch.testing.assert_close(solution.factors.lora_B @ solution.factors.lora_A, expected)


def test_wanda_scores_by_weight_times_norm_of_the_input_and_keeps_the_sources_bits():
    problem = problem_of("row", 0)
    solution = solve("wanda", problem)
    scores = problem.weight.abs() * problem.gram.diagonal().sqrt()
    assert solution.values is None
    for row, mask in zip(scores, solution.mask, strict=True):
        assert row[mask].min() >= row[~mask].max()


def test_alternating_makes_kept_places_exact():
    problem = problem_of(dtype=torch.float32)
    solution = solve("alternating", problem)
    error = problem.weight - stored(problem, solution)
    assert error[solution.mask].abs().max() < 1e-6 < error[~solution.mask].abs().max()


def test_a_2_4_mask_of_magnitude_keeps_the_two_largest_of_four():
    problem = problem_of("2:4", 0, data=False)
    solution = solve("magnitude", problem)
    fours, masks = problem.weight.abs().reshape(-1, 4), solution.mask.reshape(-1, 4)
    smallest_kept = fours.masked_fill(~masks, torch.inf).amin(1)
    assert (smallest_kept >= fours.masked_fill(masks, 0).amax(1)).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["zero weight", "dead inputs", "one token", "no activity"])
def test_degenerate_problems_give_finite_numbers_and_exact_counts(method, kind):
    problem = problem_of("row", 4)
    weight = torch.zeros(SHAPE) if kind == "zero weight" else problem.weight
    gram = {
        "zero weight": lambda: problem.gram,
        "dead inputs": partial(dead_inputs, problem.gram),
        "one token": lambda: gram_of(SHAPE[1], n_tokens=1),
        "no activity": lambda: torch.zeros(SHAPE[1], SHAPE[1]),
    }[kind]()
    problem = Problem(weight, problem.n_kept, problem.groups, 4, 6, torch.float32, gram)
    solution = solve(method, problem)
    assert set(solution.mask.sum(1).tolist()) == {61}
    assert torch.isfinite(stored(problem, solution)).all()


def dead_inputs(gram: torch.Tensor) -> torch.Tensor:
    alive = (torch.arange(gram.shape[0]) % 3 > 0).float()
    return gram * alive * alive[:, None]
