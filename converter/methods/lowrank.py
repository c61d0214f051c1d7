"""Truncated singular value decompositions of flat spectra, on CPU or GPU, reproducibly.

Invariant: the same matrix on the same kind of device gives the same bytes: fixed start vectors, a fixed stopping rule,
and in each column of B the largest entry is positive.
"""

from __future__ import annotations

import torch

#: short sides up to this are decomposed exactly
EXACT_SIDE = 1024
_PIECE = 1024
_OVERSAMPLING = 16
_MOST_BLOCKS = 16
_LEAST_GAIN = 2e-3


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (N, r) and A (r, K), float32, whose product is (nearly) the best rank-``r`` approximation.

    The factors are balanced, B = U sqrt(S) and A = sqrt(S) V^T. Where min(N, K) <= 1024 the result is exact
    (eigendecomposition of the Gram matrix in float64); beyond, a randomised block Krylov method (Musco & Musco 2015,
    Algorithm 2) runs until a further block adds less than 0.2 % of the captured energy.
    """
    if matrix.shape[0] > matrix.shape[1]:
        right, left = truncated_svd(matrix.T, rank)
        return fix_signs(left.T.contiguous(), right.T.contiguous())
    find = _exact_left_vectors if matrix.shape[0] <= EXACT_SIDE else _krylov_left_vectors
    basis = find(matrix, rank)
    return balanced_factors(basis, matrix)


def balanced_factors(basis: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B = U sqrt(S) and A = sqrt(S) V^T for orthonormal left singular vectors ``basis`` (N, r)."""
    projected = basis.T @ matrix
    root = torch.linalg.vector_norm(projected, dim=1, dtype=torch.float64).sqrt()
    inverse = torch.where(root > 0, 1 / root, 0.0).float()
    return fix_signs(basis * root.float(), projected * inverse[:, None])


def fix_signs(lora_b: torch.Tensor, lora_a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flip pairs of columns of B and rows of A so that the largest entry of each column of B is positive."""
    peak = lora_b.gather(0, lora_b.abs().argmax(0, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(lora_b.dtype)
    return lora_b * sign, lora_a * sign.T


def gram(matrix: torch.Tensor) -> torch.Tensor:
    """Return matrix @ matrix.T in float64."""
    return cross_gram(matrix, matrix)


def cross_gram(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right.T in float64, from column pieces so that no full float64 copy exists."""
    total = torch.zeros(left.shape[0], right.shape[0], dtype=torch.float64, device=left.device)
    for start in range(0, left.shape[1], _PIECE):
        total.addmm_(left[:, start : start + _PIECE].double(), right[:, start : start + _PIECE].double().T)
    return total


def _exact_left_vectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    vectors: torch.Tensor = torch.linalg.eigh(gram(matrix)).eigenvectors
    return vectors[:, -rank:].flip(1).float().contiguous()


def _krylov_left_vectors(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Rayleigh-Ritz over span[X, (EE^T)X, (EE^T)^2 X, ...] with full reorthogonalisation."""
    n_rows, block = matrix.shape[0], rank + _OVERSAMPLING
    start = torch.randn(n_rows, block, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    basis = torch.linalg.qr(matrix @ (matrix.T @ start)).Q
    images = basis.T @ matrix
    projected = gram(images)
    vectors: torch.Tensor
    captured = 0.0
    while True:
        values, vectors = torch.linalg.eigh(projected)
        energy = float(values[-rank:].sum())
        if energy - captured <= _LEAST_GAIN * energy or basis.shape[1] + block > min(n_rows, _MOST_BLOCKS * block):
            found: torch.Tensor = basis @ vectors[:, -rank:].flip(1).float()
            return found
        captured = energy
        fresh = matrix @ images[-block:].T
        for _ in range(2):
            fresh = torch.linalg.qr(fresh - basis @ (basis.T @ fresh)).Q
        image = fresh.T @ matrix
        cross = cross_gram(images, image)
        projected = torch.cat([torch.cat([projected, cross], 1), torch.cat([cross.T, gram(image)], 1)])
        basis, images = torch.cat([basis, fresh], 1), torch.cat([images, image])
