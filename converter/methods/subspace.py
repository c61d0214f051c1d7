"""Subspace iteration for weighted low-rank approximation, warm-started from round to round.

The best rank-r approximation of E under the norm |E H^(1/2)| has as left vectors the leading eigenvectors of
E H E^T, and given left vectors U the best right factor is U^T E.
Invariant: bases have orthonormal columns.
"""

from __future__ import annotations

import torch

_START_STEPS = 4


def orthonormalise(matrix: torch.Tensor) -> torch.Tensor:
    """Return an orthonormal basis of the columns of ``matrix`` (N, r): Cholesky QR in float64."""
    columns = matrix.double()
    columns = columns / torch.linalg.vector_norm(columns, dim=0).clamp_min(1e-300)
    gram = columns.T @ columns
    gram.diagonal().add_(1e-12)
    factor = torch.linalg.cholesky_ex(gram).L
    basis: torch.Tensor = torch.linalg.solve_triangular(factor, columns.T, upper=False)
    return basis.T.float().contiguous()


def subspace_step(error: torch.Tensor, basis: torch.Tensor, gram: torch.Tensor | None = None) -> torch.Tensor:
    """Return an orthonormal basis of E H E^T U; ``gram`` is H (K, K), None for the identity."""
    image = error.T @ basis
    return orthonormalise(error @ (image if gram is None else gram @ image))


def start_basis(
    matrix: torch.Tensor, rank: int, gram: torch.Tensor | None = None, steps: int = _START_STEPS
) -> torch.Tensor:
    """Return a basis (N, r) near the leading left vectors, from a fixed random start."""
    start = torch.randn(matrix.shape[0], rank, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    basis = orthonormalise(start)
    for _ in range(steps):
        basis = subspace_step(matrix, basis, gram)
    return basis
