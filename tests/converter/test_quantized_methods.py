"""What each method makes of quantized values: exact counts, residuals that repair the rounding, numbers that fit."""

from __future__ import annotations

import pytest
import torch
from salr.converter.execution.packing import stored_weight
from salr.converter.methods import Problem, Solution, solve
from salr.converter.methods.prune import Groups
from salr.converter.methods.quantization import Quantized, Quantizer
from salr.converter.methods.weighted import output_energy

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["magnitude", "alternating", "wanda", "sparsegpt", "joint"]
#: 68 columns: one piece of 64 and a short one, a multiple of 4, and no multiple of the group of 24
SHAPE = (20, 68)
SCOPES = {
    "layer": (Groups("layer"), 701),
    "row": (Groups("row"), 20 * 31),
    "2:4": (Groups("n:m", 4), 20 * 34),
    "all": (Groups("row"), 20 * 68),
}


def gram_of(n_tokens: int = 300) -> torch.Tensor:
    """Return X^T X of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(9)
    inputs = torch.randn(n_tokens, SHAPE[1], generator=generator) @ torch.randn(SHAPE[1], SHAPE[1], generator=generator)
    inputs *= torch.rand(SHAPE[1], generator=generator).square() * 3 + 0.01
    return inputs.T @ inputs


def problem_of(scope: str = "row", encoding: str = "nf4", rank: int = 4, **changes) -> Problem:
    weight = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(8))
    groups, n_kept = SCOPES[scope]
    settings = {"rounds": 9, "dtype": torch.float32, "gram": gram_of(), "quantizer": Quantizer(encoding, 24)}
    return Problem(**{"weight": weight, "n_kept": n_kept, "groups": groups, "rank": rank} | settings | changes)


def output(problem: Problem, solution: Solution) -> float:
    error = problem.weight - stored_weight(solution.mask, solution.values, solution.factors)
    return output_energy(error, problem.gram)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("encoding", ["int8", "nf4"])
def test_every_method_keeps_the_exact_number_and_returns_codes_with_float16_scales(method, scope, encoding):
    problem = problem_of(scope, encoding)
    solution = solve(method, problem)
    assert int(solution.mask.sum()) == problem.n_kept and isinstance(solution.values, Quantized)
    if scope == "2:4":
        assert set(solution.mask.reshape(-1, 4).sum(1).tolist()) == {2}
    codes, scales = solution.values.codes, solution.values.scales
    assert codes.dtype == torch.uint8 and codes.shape == SHAPE and scales.shape == (20, 3)
    assert torch.equal(scales.half().float(), scales) and (scales >= 0).all()
    assert not (codes[solution.mask] == 128).any() if encoding == "int8" else codes.max() < 16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scope", ["row", "all"])
@pytest.mark.parametrize("factor_dtype", [torch.int8, torch.bfloat16], ids=str)
def test_the_residual_repairs_what_rounding_costs(method, scope, factor_dtype):
    """Whatever weighs the error: the residual of magnitude lowers the plain one, all others that of the output."""
    problem = problem_of(scope, factor_dtype=factor_dtype, gram=torch.eye(68) if method == "magnitude" else gram_of())
    with_rank, without = solve(method, problem), solve(method, problem_of(scope, rank=0, gram=problem.gram))
    assert with_rank.factors.lora_A.dtype == with_rank.factors.lora_B.dtype == factor_dtype
    assert output(problem, with_rank) < 0.9 * output(problem, without)
    assert without.factors is None


@pytest.mark.parametrize("method", METHODS)
def test_int8_factors_use_the_whole_range_and_cost_little(method):
    problem = problem_of(factor_dtype=torch.int8)
    small, exact = solve(method, problem), solve(method, problem_of())
    lora_b, lora_a, scales = small.factors
    assert set(lora_b.abs().amax(0).tolist()) == set(lora_a.abs().amax(1).tolist()) == {127}
    assert scales.dtype == torch.float32 and scales.shape == (4,) and (scales > 0).all()
    product = small.factors.scaled_b() @ lora_a.float()
    torch.testing.assert_close(small.factors.subtracted(problem.weight), problem.weight - product, atol=1e-5, rtol=0)
    assert exact.factors.rank_scales is None
    assert output(problem, small) < 1.05 * output(problem, exact)


@pytest.mark.parametrize("encoding", ["int8", "nf4"])
@pytest.mark.parametrize("scope", ["row", "2:4", "all"])
def test_compensating_methods_beat_those_that_round_to_nearest(encoding, scope):
    problem = problem_of(scope, encoding)
    errors = {method: output(problem, solve(method, problem)) for method in METHODS}
    assert errors["joint"] < 0.85 * min(errors["magnitude"], errors["alternating"], errors["wanda"])
    assert errors["sparsegpt"] < errors["wanda"]


@pytest.mark.parametrize("method", METHODS)
def test_finer_encodings_lose_less(method):
    def lost(scope: str, **changes) -> float:
        problem = problem_of(scope, rank=0, **changes)
        return output(problem, solve(method, problem))

    assert lost("all", encoding="int8") < 0.1 * lost("all", encoding="nf4")
    assert lost("all", quantizer=Quantizer("nf4", 4)) < lost("all", quantizer=Quantizer("nf4", 68))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "alternating"])
def test_methods_that_do_not_refit_round_the_sources_own_weights(method):
    problem = problem_of(rank=0)
    solution = solve(method, problem)
    each = problem.quantizer.each(solution.values.scales, 68)
    expected = problem.quantizer.codes(problem.weight, each)
    assert torch.equal(solution.values.codes[solution.mask], expected[solution.mask])


@pytest.mark.parametrize("method", METHODS)
def test_the_same_problem_gives_the_same_codes(method):
    first, second = (solve(method, problem_of(factor_dtype=torch.int8)) for _ in range(2))
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.values.codes[first.mask], second.values.codes[first.mask])
    assert torch.equal(first.values.scales, second.values.scales)
    assert all(torch.equal(one, two) for one, two in zip(first.factors, second.factors, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["zero weight", "dead inputs", "one token", "no activity"])
def test_degenerate_problems_give_finite_numbers_and_exact_counts(method, kind):
    alive = (torch.arange(68) % 3 > 0).float()
    changes = {
        "zero weight": lambda: {"weight": torch.zeros(SHAPE)},
        "dead inputs": lambda: {"gram": gram_of() * alive * alive[:, None]},
        "one token": lambda: {"gram": gram_of(1)},
        "no activity": lambda: {"gram": torch.zeros(68, 68)},
    }[kind]()
    problem = problem_of(factor_dtype=torch.int8, **changes)
    solution = solve(method, problem)
    found = stored_weight(solution.mask, solution.values, solution.factors)
    assert set(solution.mask.sum(1).tolist()) == {31} and torch.isfinite(found).all()
    if kind == "zero weight":
        assert not found.any() and not solution.values.scales.any()
    else:
        assert (problem.weight - found).square().sum() < 4 * problem.weight.square().sum()
