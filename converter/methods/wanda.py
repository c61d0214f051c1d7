"""Wanda (Sun et al., ICLR 2024) with a weighted low-rank correction.

Keep the largest |w| * |x|_2 in each output row; kept values are the source's own. The residual adapter minimises the
output error: |(W - W_hat - B A) H^(1/2)|, W_hat as its values are stored.
"""

from __future__ import annotations

import torch

from .problem import Problem, Solution
from .weighted import scaled_gram, weighted_svd


def wanda(problem: Problem) -> Solution:
    """Score by |w| sqrt(diag H), then the weighted SVD of what was removed."""
    gram = required_gram(problem)
    importance = gram.diagonal().clamp_min(0)
    mask = problem.keep(problem.weight.abs() * importance.sqrt())
    values = problem.quantized(problem.weight, mask, importance)
    if not problem.rank:
        return Solution(mask, None, values)
    lost = problem.weight.masked_fill(mask, 0) if values is None else problem.weight - values.values(mask)
    return Solution(mask, problem.factors(*weighted_svd(lost, scaled_gram(gram), problem.rank)), values)


def required_gram(problem: Problem) -> torch.Tensor:
    """Return the problem's Gram matrix; a method with data is never called without one."""
    assert problem.gram is not None
    return problem.gram
