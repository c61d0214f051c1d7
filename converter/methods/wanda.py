"""Wanda (Sun et al., ICLR 2024) with a weighted low-rank correction.

Keep the largest |w| * |x|_2 in each output row; kept values are the source's own bits. The residual adapter minimises
the output error: |(W - W_hat - B A) H^(1/2)|.
"""

from __future__ import annotations

import torch

from ..weighted import scaled_gram, weighted_svd
from .problem import Problem, Solution, stored_factors


def wanda(problem: Problem) -> Solution:
    """Score by |w| sqrt(diag H), then the weighted SVD of what was removed."""
    gram = required_gram(problem)
    mask = problem.keep(problem.weight.abs() * gram.diagonal().clamp_min(0).sqrt())
    if not problem.rank:
        return Solution(mask, None, None)
    factors = weighted_svd(problem.weight.masked_fill(mask, 0), scaled_gram(gram), problem.rank)
    return Solution(mask, *stored_factors(*factors, problem.dtype))


def required_gram(problem: Problem) -> torch.Tensor:
    """Return the problem's Gram matrix; a method with data is never called without one."""
    assert problem.gram is not None
    return problem.gram
