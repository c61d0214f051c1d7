"""Joint choice of mask and low-rank part without a refit: GoDec (Zhou & Tao, ICML 2011) with momentum.

Repeat: S = the largest entries of W - L; L = the best rank-r approximation of W - S (one warm subspace step). At kept
places S + L = W, so only pruned places carry error; at the end kept values are recomputed against the stored factors.
With a Gram matrix H, scores and low-rank part are weighted by it. The default without calibration text takes H from
random tokens: that knows which inputs are large, and a refit would only fit the noise in it.
"""

from __future__ import annotations

import torch

from ..subspace import start_basis, subspace_step
from ..weighted import ScaledGram, minus_product, refine_factors, scaled_gram
from .problem import Problem, Solution, stored_factors

MOMENTUM = 0.8


def alternating(problem: Problem) -> Solution:
    """Alternate ``problem.rounds`` times, then values = W - B A on the mask with the factors as stored."""
    gram = ScaledGram.identity(problem.weight) if problem.gram is None else scaled_gram(problem.gram)
    scaled = problem.weight if gram.matrix is None else problem.weight * gram.scale
    if not problem.rank:
        return Solution(problem.keep(scaled.abs()), None, None)
    low_rank, basis = _alternate(problem, scaled, gram)
    mask = problem.keep((scaled - low_rank).abs())
    rest = torch.where(mask, low_rank, scaled)
    del low_rank
    lora_b, lora_a = stored_factors(*refine_factors(rest, basis, gram), problem.dtype)
    del rest
    return Solution(mask, lora_b, lora_a, minus_product(problem.weight, lora_b, lora_a))


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
