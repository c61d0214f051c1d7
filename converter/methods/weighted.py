"""Algebra under a Gram matrix H = sum x x^T: errors are judged by tr(E H E^T), the energy they cause in the output.

Invariant: a Gram matrix is damped before it is inverted or factored, so a singular one is no error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .lowrank import fix_signs, truncated_svd
from .subspace import subspace_step

DAMPING = 0.01
_CG_STEPS = 10
_ROWS = 256
_GRAM_COLUMNS = 192


@dataclass(frozen=True)
class ScaledGram:
    """H damped by 1 % of its mean diagonal, as D C D: ``scale`` D (K,), ``matrix`` C (K, K) with unit diagonal."""

    scale: torch.Tensor
    matrix: torch.Tensor | None

    @staticmethod
    def identity(weight: torch.Tensor) -> ScaledGram:
        """Return the Gram matrix that weighs nothing, for a weight (N, K)."""
        return ScaledGram(torch.ones(weight.shape[1], device=weight.device), None)

    def unscaled(self) -> torch.Tensor:
        """Return D C D (K, K): H damped, of a Gram matrix that came from data."""
        return self.correlation * self.scale * self.scale[:, None]

    @property
    def correlation(self) -> torch.Tensor:
        """C (K, K) of a Gram matrix that came from data."""
        assert self.matrix is not None
        return self.matrix


def gram_matrix(inputs: torch.Tensor) -> torch.Tensor:
    """Return X^T X (K, K) of X (tokens, K); beyond blocks on the diagonal one half is computed, the other copied."""
    n_columns = inputs.shape[1]
    gram = inputs.new_empty(n_columns, n_columns)
    for start in range(0, n_columns, _GRAM_COLUMNS):
        stop = min(start + _GRAM_COLUMNS, n_columns)
        gram[start:, start:stop] = inputs[:, start:].T @ inputs[:, start:stop]
        gram[start:stop, stop:] = gram[stop:, start:stop].T
    return gram


def damped_gram(gram: torch.Tensor) -> torch.Tensor:
    """Return H (K, K) with 1 % of its mean diagonal added to the diagonal, or 1 where no input was ever active."""
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * float(gram.diagonal().double().mean()) or 1.0)
    return damped


def scaled_gram(gram: torch.Tensor) -> ScaledGram:
    """Damp and normalise a Gram matrix; inputs that were never active get the damping alone."""
    scale = damped_gram(gram).diagonal().sqrt()
    matrix = gram / scale / scale[:, None]
    matrix.diagonal().fill_(1.0)
    return ScaledGram(scale, matrix)


def weighted_svd(error: torch.Tensor, gram: ScaledGram, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B (N, r), A (r, K) minimising |(E - B A) H^(1/2)|: EoRA (Liu et al. 2024), SVD-LLM (Wang et al. 2024)."""
    scaled = error * gram.scale
    factor = torch.linalg.cholesky(gram.correlation)
    lora_b, projected = truncated_svd(scaled @ factor, rank)
    lora_a = torch.linalg.solve_triangular(factor, projected, upper=False, left=False) / gram.scale
    return balance(lora_b, lora_a)


def refine_factors(error: torch.Tensor, basis: torch.Tensor, gram: ScaledGram) -> tuple[torch.Tensor, torch.Tensor]:
    """Return B, A for ``error`` from a nearly converged basis of left vectors; ``error`` is in scaled columns."""
    for _ in range(2):
        basis = subspace_step(error, basis, gram.matrix)
    return balance(basis, (basis.T @ error) / gram.scale)


def balance(lora_b: torch.Tensor, lora_a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rewrite a product as U sqrt(S) and sqrt(S) V^T of its own singular value decomposition."""
    basis, small = torch.linalg.qr(lora_b.double())
    left, values, right = torch.linalg.svd(small @ lora_a.double(), full_matrices=False)
    rank, root = lora_b.shape[1], values.sqrt()
    return fix_signs((basis @ left[:, :rank] * root[:rank]).float(), (root[:rank, None] * right[:rank]).float())


def minus_product(
    weight: torch.Tensor, lora_b: torch.Tensor, lora_a: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return W - B A in float32, in ``out`` if given, which may be W.

    The product is computed in float64, where bf16 factors multiply and add (nearly) exactly.
    """
    lora_a, lora_b = lora_a.double(), lora_b.double()
    exact = torch.empty_like(weight) if out is None else out
    for row in range(0, weight.shape[0], _ROWS):
        piece = slice(row, row + _ROWS)
        exact[piece] = weight[piece].double() - lora_b[piece] @ lora_a
    return exact


def refit_values(
    target: torch.Tensor, start: torch.Tensor, mask: torch.Tensor, gram: torch.Tensor, steps: int = _CG_STEPS
) -> torch.Tensor:
    """Return values (N, K), 0 outside ``mask``, that minimise tr((T - S) H (T - S)^T): all rows at once.

    Conjugate gradients on the normal equations restricted to the mask, preconditioned by diag H, from ``start``; as
    the refit steps of ALPS (Meng et al. 2024).
    """
    inverse = 1 / gram.diagonal()
    values = start.masked_fill(~mask, 0)
    residual = ((target - values) @ gram).masked_fill_(~mask, 0)
    scaled = residual * inverse
    direction = scaled.clone()
    energy = (residual * scaled).sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ gram).masked_fill_(~mask, 0)
        step = energy / (direction * image).sum(1, keepdim=True).clamp_min(1e-30)
        values = values + step * direction
        residual = residual - step * image
        scaled = residual * inverse
        previous, energy = energy, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + (energy / previous.clamp_min(1e-30)) * direction
    return values


def output_energy(error: torch.Tensor, gram: torch.Tensor) -> float:
    """Return tr(E H E^T), summed in float64 from pieces of rows."""
    total = 0.0
    for row in range(0, error.shape[0], _ROWS):
        piece = error[row : row + _ROWS]
        total += float(((piece @ gram) * piece).double().sum())
    return total
