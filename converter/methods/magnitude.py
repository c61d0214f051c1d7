"""The paper's method: SALR (arXiv 2601.16991), equations 3 and 4.

W_hat = mask * W0 with the largest magnitudes kept, and the truncated SVD of W0 - W_hat as residual adapter. With
quantized values W_hat is what their codes give, so that the adapter corrects the rounding too.
"""

from __future__ import annotations

from .lowrank import truncated_svd
from .problem import Problem, Solution


def magnitude(problem: Problem) -> Solution:
    """Keep the largest |w|, then B A = SVD_r(W - W_hat); kept values are the source's own."""
    mask = problem.keep(problem.weight.abs())
    values = problem.quantized(problem.weight, mask)
    if not problem.rank:
        return Solution(mask, None, values)
    lost = problem.weight.masked_fill(mask, 0) if values is None else problem.weight - values.values(mask)
    return Solution(mask, problem.factors(*truncated_svd(lost, problem.rank)), values)
