"""SparseGPT (Frantar & Alistarh, ICML 2023) with a weighted low-rank correction.

Columns are pruned from left to right in pieces of 128; what removing a weight costs is made up for by the columns still
to come, through the Cholesky factor of the inverse Gram matrix. Quantized values are compensated in a second pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .problem import Problem, Solution
from .quantization import compensated
from .wanda import required_gram
from .weighted import damped_gram, scaled_gram, weighted_svd

_COLUMNS = 128


def sparsegpt(problem: Problem) -> Solution:
    """Prune with error compensation, then the weighted SVD of W - S; kept values are refitted ones."""
    gram = required_gram(problem)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped_gram(gram)))
    inverse_factor = torch.linalg.cholesky(inverse, upper=True)
    mask, sparse = _prune_columns(problem, inverse_factor)
    values = None if problem.quantizer is None else compensated(sparse, mask, problem.quantizer, damped_gram(gram))
    if not problem.rank:
        return Solution(mask, None, values or sparse)
    stored = sparse if values is None else values.values(mask)
    factors = weighted_svd(problem.weight - stored, scaled_gram(gram), problem.rank)
    return Solution(mask, problem.factors(*factors), values or sparse)


def _prune_columns(problem: Problem, inverse_factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = problem.weight.clone()
    mask = torch.zeros_like(weight, dtype=torch.bool)
    n_columns, n_done, n_kept = weight.shape[1], 0, 0
    for start in range(0, n_columns, _COLUMNS):
        stop = min(start + _COLUMNS, n_columns)
        piece, factor = weight[:, start:stop], inverse_factor[start:stop, start:stop]
        # Whole-matrix budgets are spread evenly over the pieces; the last takes what is left.
        n_done = round(problem.n_kept * stop / n_columns)
        groups = problem.groups.count(tuple(weight.shape)) if problem.groups.kind == "row" else 1
        n_piece = (n_done - n_kept) // groups * groups if stop < n_columns else problem.n_kept - n_kept
        if problem.groups.kind == "n:m":
            n_piece = problem.n_kept * (stop - start) // n_columns
        n_kept += n_piece
        mask[:, start:stop] = replace(problem, n_kept=n_piece).keep((piece / factor.diagonal()).abs())
        errors = torch.zeros_like(piece)
        for column in range(stop - start):
            removed = piece[:, column].masked_fill(mask[:, start + column], 0) / factor[column, column]
            errors[:, column] = removed
            piece[:, column:] -= removed[:, None] * factor[column, column:]
        weight[:, stop:] -= errors @ inverse_factor[start:stop, stop:]
    return mask, weight.masked_fill_(~mask, 0)
