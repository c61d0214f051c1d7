"""The paper's method: SALR (arXiv 2601.16991), equations 3 and 4.

W_hat = mask * W0 with the largest magnitudes kept, and the truncated SVD of W0 - W_hat as residual adapter.
"""

from __future__ import annotations

from ..lowrank import truncated_svd
from .problem import Problem, Solution, stored_factors


def magnitude(problem: Problem) -> Solution:
    """Keep the largest |w|, then B A = SVD_r(W - W_hat); kept values are the source's own bits."""
    mask = problem.keep(problem.weight.abs())
    if not problem.rank:
        return Solution(mask, None, None)
    factors = truncated_svd(problem.weight.masked_fill(mask, 0), problem.rank)
    return Solution(mask, *stored_factors(*factors, problem.dtype))
