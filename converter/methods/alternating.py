"""Joint choice of mask and low-rank part without a refit: GoDec (Zhou & Tao, ICML 2011) with momentum.

Repeat: S = the largest entries of W - L; L = the best rank-r approximation of W - S (one warm subspace step). At kept
places S + L = W, so only pruned places carry error; at the end kept values are recomputed against the stored factors.
With a Gram matrix H, scores and low-rank part are weighted by it. The default without calibration text takes H from
random tokens: that knows which inputs are large, and a refit would only fit the noise in it.
"""

from __future__ import annotations

import torch

from .problem import Problem, Solution
from .subspace import start_basis, subspace_step
from .weighted import ScaledGram, refine_factors, scaled_gram

MOMENTUM = 0.8
_QUANTIZED_ROUNDS = 4


def alternating(problem: Problem) -> Solution:
    """Alternate ``problem.rounds`` times, then values = W - B A on the mask with the factors as stored."""
    gram = ScaledGram.identity(problem.weight) if problem.gram is None else scaled_gram(problem.gram)
    scaled = problem.weight if gram.matrix is None else problem.weight * gram.scale
    if not problem.rank:
        mask = problem.keep(scaled.abs())
        return Solution(mask, None, problem.quantized(problem.weight, mask, gram.scale.square()))
    low_rank, basis = _alternate(problem, scaled, gram)
    mask = problem.keep((scaled - low_rank).abs())
    if problem.quantizer is not None:
        return _quantized(problem, scaled, low_rank, basis, mask, gram)
    rest = torch.where(mask, low_rank, scaled)
    del low_rank
    factors = problem.factors(*refine_factors(rest, basis, gram))
    del rest
    return Solution(mask, factors, factors.subtracted(problem.weight))


def _quantized(
    problem: Problem,
    scaled: torch.Tensor,
    low_rank: torch.Tensor,
    basis: torch.Tensor,
    mask: torch.Tensor,
    gram: ScaledGram,
) -> Solution:
    """Alternate rounding and low-rank part, which comes last and so repairs the rounding: LoftQ (Li et al. 2023)."""
    for _ in range(_QUANTIZED_ROUNDS):
        values = problem.quantized((scaled - low_rank) / gram.scale, mask, gram.scale.square())
        assert values is not None
        lost = scaled - values.values(mask) * gram.scale
        basis = subspace_step(lost, basis, gram.matrix)
        low_rank = basis @ (basis.T @ lost)
    return Solution(mask, problem.factors(*refine_factors(lost, basis, gram)), values)


def _alternate(problem: Problem, scaled: torch.Tensor, gram: ScaledGram) -> tuple[torch.Tensor, torch.Tensor]:
    """Return L (N, K) and its left vectors (N, r) after ``problem.rounds`` rounds.

    In place where it can be: a layer of a large model is a gigabyte in float32.
    """
    basis = start_basis(scaled, problem.rank, gram.matrix)
    low_rank, sparse = basis @ (basis.T @ scaled), torch.zeros_like(scaled)
    for _ in range(problem.rounds):
        previous, sparse = sparse, problem.keep_entries(low_rank.neg_().add_(scaled))
        rest = torch.sub(scaled, sparse, alpha=1 + MOMENTUM).add_(previous, alpha=MOMENTUM)
        del previous, low_rank
        basis = subspace_step(rest, basis, gram.matrix)
        low_rank = basis @ (basis.T @ rest)
    return low_rank, basis
