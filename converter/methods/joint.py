"""The joint choice of mask, values and low-rank part under calibration data: this project's best method.

Minimise |(W - S - B A) H^(1/2)| over sparse S and rank-r B A. A few rounds of weighted alternation (OATS, Zhang &
Papyan 2024, with the full Gram matrix) give a start; ADMM on the sparse part (ALPS, Meng et al. 2024; with a low-rank
part as in 3BASiL, 2025) lets kept values make up for removed ones while the mask still moves; a warm weighted subspace
step keeps the low-rank part current. Last, factors are rounded and kept values refitted against them, or quantized with
error compensation (GPTQ, Frantar et al. 2023) in turn with the low-rank part.
"""

from __future__ import annotations

import torch

from .alternating import MOMENTUM
from .problem import Problem, Solution
from .quantization import compensated, descended, rescaled
from .subspace import start_basis, subspace_step
from .wanda import required_gram
from .weighted import ScaledGram, refine_factors, refit_values, scaled_gram

_WARM_SHARE = 1 / 3
_STAGES = 20
_RHO_FIRST, _RHO_LAST = 0.01, 0.7
_QUANTIZED_ROUNDS = 3


def joint(problem: Problem) -> Solution:
    """Alternate, ADMM, refit; kept values are refitted ones."""
    gram = scaled_gram(required_gram(problem))
    scaled = problem.weight * gram.scale
    basis = start_basis(scaled, problem.rank, gram.matrix) if problem.rank else None
    if problem.keeps_all:
        mask, sparse = torch.ones_like(scaled, dtype=torch.bool), scaled
    else:
        mask, sparse, basis = _sparse_and_basis(problem, scaled, basis, gram)
    if problem.quantizer is not None:
        return _quantized(problem, mask, sparse / gram.scale, basis, gram)
    if basis is None:
        return Solution(mask, None, sparse / gram.scale)
    basis = subspace_step(scaled - sparse, basis, gram.matrix)
    factors = problem.factors(*refine_factors(scaled - sparse, basis, gram))
    target = factors.subtracted(problem.weight) * gram.scale
    return Solution(mask, factors, refit_values(target, sparse, mask, gram.correlation) / gram.scale)


def _sparse_and_basis(
    problem: Problem, scaled: torch.Tensor, basis: torch.Tensor | None, gram: ScaledGram
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the mask, S fitted to it (in scaled columns), and a basis of the low-rank part."""
    n_warm = round(_WARM_SHARE * problem.rounds)
    sparse, basis = _alternate(problem, scaled, basis, gram, n_warm)
    sparse, basis = _admm(problem, scaled, sparse, basis, gram, problem.rounds - n_warm)
    mask = problem.keep(sparse.abs())
    target = scaled - _low_rank(scaled - sparse, basis)
    return mask, refit_values(target, sparse, mask, gram.correlation), basis


def _quantized(
    problem: Problem, mask: torch.Tensor, sparse: torch.Tensor, basis: torch.Tensor | None, gram: ScaledGram
) -> Solution:
    """Round ``sparse`` (N, K) with error compensation; alternate with the low-rank part, which repairs the rounding.

    The last step is one more descent of the codes against the factors as stored: it only lowers the error.
    """
    assert problem.quantizer is not None
    damped = gram.unscaled()
    target, factors = problem.weight, None
    values = compensated(sparse, mask, problem.quantizer, damped)
    for _ in range(_QUANTIZED_ROUNDS):
        if basis is not None:
            lost = (problem.weight - values.values(mask)) * gram.scale
            basis = subspace_step(lost, basis, gram.matrix)
            factors = problem.factors(*refine_factors(lost, basis, gram))
            target = factors.subtracted(problem.weight)
        values = descended(target, mask, rescaled(target, mask, values, damped), damped, sweeps=1)
    return Solution(mask, factors, values)


def _low_rank(error: torch.Tensor, basis: torch.Tensor | None) -> torch.Tensor:
    """Return U U^T E, or zeros at rank 0."""
    return torch.zeros_like(error) if basis is None else basis @ (basis.T @ error)


def _alternate(
    problem: Problem, scaled: torch.Tensor, basis: torch.Tensor | None, gram: ScaledGram, rounds: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return S and a basis after rounds of: keep the largest of W - L, one subspace step for L."""
    low_rank = _low_rank(scaled, basis)
    sparse = torch.zeros_like(scaled)
    for _ in range(rounds if basis is not None else 1):
        sparse = problem.keep_entries(scaled - low_rank)
        if basis is not None:
            basis = subspace_step(scaled - sparse, basis, gram.matrix)
            low_rank = _low_rank(scaled - sparse, basis)
    return sparse, basis


def _admm(
    problem: Problem,
    scaled: torch.Tensor,
    sparse: torch.Tensor,
    basis: torch.Tensor | None,
    gram: ScaledGram,
    rounds: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return S and a basis after ADMM rounds with a penalty rho that grows in stages."""
    identity = torch.eye(gram.correlation.shape[0], device=scaled.device)
    low_rank, dual = _low_rank(scaled - sparse, basis), torch.zeros_like(scaled)
    rho, pull = 0.0, identity
    for number in range(rounds):
        stage = number * _STAGES // rounds
        wanted = _RHO_FIRST * (_RHO_LAST / _RHO_FIRST) ** (stage / (_STAGES - 1))
        if wanted != rho:
            dual *= rho / wanted
            rho = wanted
            pull = rho * torch.cholesky_inverse(torch.linalg.cholesky(gram.correlation + rho * identity))
        target = scaled - low_rank
        free = target + (sparse - dual - target) @ pull
        dual += free
        previous, sparse = sparse, problem.keep_entries(dual.clone())
        dual -= sparse
        if basis is not None:
            rest = scaled - sparse - MOMENTUM * (sparse - previous)
            basis = subspace_step(rest, basis, gram.matrix)
            low_rank = _low_rank(rest, basis)
    return sparse, basis
