"""Spreading a budget of bits over modules: sparsity and rank of each, by measured sensitivity.

For each module and each sparsity of a grid the weights with the largest |w| sqrt(diag H) stay, and the eigenvalues of
E H E^T of what goes give the output error at every rank at once. The objective is the sum over modules of output error
as a share of the module's output. A Lagrange multiplier on bytes picks one candidate a module.
Invariant: the choice is never worse on that objective than the best uniform sparsity and rank within the same budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from ..formats.bitmap import bitmap_width
from ..formats.dtypes import DTYPE_BITS
from ..formats.errors import CalibrationError, OptionError
from .module_options import ModuleOptions
from .options import ConvertOptions
from .plan import Plan, PlannedModule, n_removed
from .prune import Groups, keep_in_groups
from .sequential import open_block_run
from .weighted import damped_gram, output_energy

SPARSITIES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RANKS = (0, 8, 16, 32, 64, 96, 128)
_BISECTIONS = 60


@dataclass(frozen=True)
class Candidate:
    """One way to store a module: its size in bits, and its output error as a share of the output."""

    sparsity: float
    rank: int
    n_bits: float
    error: float


@dataclass(frozen=True)
class Allocation:
    """The candidate chosen for each module, the objective reached, and that of the best uniform choice."""

    chosen: dict[str, Candidate]
    objective: float
    uniform_objective: float


def with_budget(
    plan: Plan, options: ConvertOptions, device: torch.device, pool: ThreadPoolExecutor
) -> tuple[ConvertOptions, Allocation]:
    """Return options whose overrides set sparsity and rank of every module so that ``target_bits`` is kept.

    Raises:
        OptionError: the budget is below what the sparsest candidates take.
        CalibrationError: the calibration data is unusable.
    """
    assert options.target_bits is not None
    experts = [module.name for module in plan.modules if len(module.entry.shape) == 3]
    if experts:
        raise OptionError("--target-bits", tensor=experts[0], needed="2-D weights", fix=f"--exclude '{experts[0]}'")
    curves = dict(_curves(plan, options, device, pool))
    budget = options.target_bits * sum(module.entry.n_weights for module in plan.modules if module.name in curves)
    allocation = allocate(curves, budget)
    chosen = allocation.chosen.items()
    overrides = tuple((name, {"sparsity": c.sparsity, "rank": c.rank}) for name, c in sorted(chosen))
    return replace(options, overrides=(*options.overrides, *overrides)), allocation


def allocate(curves: dict[str, list[Candidate]], budget_bits: float) -> Allocation:
    """Choose one candidate a module, minimising the summed error within ``budget_bits``.

    Raises:
        OptionError: even the smallest candidates exceed the budget.
    """
    smallest = sum(min(c.n_bits for c in candidates) for candidates in curves.values())
    if smallest > budget_bits:
        raise OptionError("--target-bits is below what the sparsest choice takes", fix="raise it")
    uniform = _best_uniform(curves, budget_bits)
    low, high = 0.0, 1.0
    best = _at_price(curves, high)
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        choice = _at_price(curves, price)
        if _size(choice) <= budget_bits:
            best, high = choice, price
        else:
            low = price
    best = _spend_rest(curves, best, budget_bits)
    if uniform is not None and (_size(best) > budget_bits or _error(uniform) < _error(best)):
        best = uniform
    return Allocation(best, _error(best), _error(uniform) if uniform is not None else float("inf"))


def _at_price(curves: dict[str, list[Candidate]], price: float) -> dict[str, Candidate]:
    """Return for each module the candidate with the least error + price * bits."""
    return {
        name: min(options, key=lambda c: (c.error + price * c.n_bits, c.n_bits)) for name, options in curves.items()
    }


def _spend_rest(
    curves: dict[str, list[Candidate]], chosen: dict[str, Candidate], budget_bits: float
) -> dict[str, Candidate]:
    """Use what the multiplier left over: the best affordable improvement first, until nothing fits."""
    chosen = dict(chosen)
    while True:
        left = budget_bits - _size(chosen)
        steps = [
            ((chosen[name].error - c.error) / max(c.n_bits - chosen[name].n_bits, 1.0), name, c)
            for name, options in curves.items()
            for c in options
            if c.error < chosen[name].error and c.n_bits - chosen[name].n_bits <= left
        ]
        if not steps:
            return chosen
        _, name, candidate = max(steps, key=lambda step: (step[0], step[1]))
        chosen[name] = candidate


def _best_uniform(curves: dict[str, list[Candidate]], budget_bits: float) -> dict[str, Candidate] | None:
    choices = []
    for sparsity in SPARSITIES:
        for rank in RANKS:
            choice = {
                name: max((c for c in options if c.sparsity == sparsity and c.rank <= rank), key=lambda c: c.rank)
                for name, options in curves.items()
            }
            if _size(choice) <= budget_bits:
                choices.append(choice)
    return min(choices, key=_error, default=None)


def _size(chosen: dict[str, Candidate]) -> float:
    return sum(candidate.n_bits for candidate in chosen.values())


def _error(chosen: dict[str, Candidate]) -> float:
    return sum(candidate.error for candidate in chosen.values())


def _curves(
    plan: Plan, options: ConvertOptions, device: torch.device, pool: ThreadPoolExecutor
) -> Iterator[tuple[str, list[Candidate]]]:
    """Yield each prunable module with its candidates."""

    def measured(item: tuple[PlannedModule, torch.Tensor | None]) -> tuple[str, list[Candidate]]:
        return item[0].name, _candidates(item[0], item[1], plan, device)

    for batch in _with_gram(plan, options, device, pool):
        yield from pool.map(measured, [item for item in batch if item[0].entry.pattern != "dense"])


def _with_gram(
    plan: Plan, options: ConvertOptions, device: torch.device, pool: ThreadPoolExecutor
) -> Iterator[Sequence[tuple[PlannedModule, torch.Tensor | None]]]:
    seen: set[str] = set()
    run = None
    if options.data is not None:
        try:
            run = open_block_run(plan, options, device, pool)
        except CalibrationError:
            if options.calibration is not None:
                raise
    for batch in run.gram_matrices() if run is not None else ():
        seen.update(module.name for module, _ in batch)
        yield batch
    yield [(module, None) for module in plan.modules if module.name not in seen]


def _candidates(module: PlannedModule, gram: torch.Tensor | None, plan: Plan, device: torch.device) -> list[Candidate]:
    entry = module.entry
    source = plan.checkpoint.read(entry.source_tensor).to(device)
    weight = (source.T if entry.transposed else source).to(torch.float32, memory_format=torch.contiguous_format)
    if gram is None:
        gram = torch.eye(weight.shape[1], device=device)
    damped = damped_gram(gram)
    energy = output_energy(weight, damped) or 1.0
    found = []
    for sparsity in SPARSITIES:
        spectrum = _error_spectrum(weight, damped, sparsity)
        for rank in RANKS:
            if rank <= min(weight.shape) and (sparsity or not rank):
                error = float(spectrum[rank:].sum()) / energy
                found.append(Candidate(sparsity, rank, _n_bits(module, sparsity, rank, plan.options), error))
    return found


def _error_spectrum(weight: torch.Tensor, gram: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Return the eigenvalues of E H E^T in falling order, E being what a weighted mask of ``sparsity`` removes."""
    n_kept = weight.numel() - int(sparsity * weight.numel())
    mask = keep_in_groups(weight.abs() * gram.diagonal().sqrt(), n_kept, Groups("layer"))
    error = weight.masked_fill(mask, 0)
    if error.shape[0] <= error.shape[1]:
        product = error @ gram @ error.T
    else:
        factor = torch.linalg.cholesky(gram)
        product = (scaled := error @ factor).T @ scaled
    values: torch.Tensor = torch.linalg.eigvalsh(product.double())
    return values.clamp_min(0).flip(0)


def _n_bits(module: PlannedModule, sparsity: float, rank: int, options: ConvertOptions) -> float:
    """Return the size of a module stored so, adapters counted: values, bitmap, row offsets and factors."""
    entry = module.entry
    width = DTYPE_BITS[entry.dtype]
    factor_bits = width * rank + sum(DTYPE_BITS[t.pair.lora_A.dtype] * t.pair.rank for t in module.trained)
    factors = factor_bits * (entry.n_rows + entry.n_columns)
    if not sparsity:
        return width * entry.n_weights + factors
    kept = entry.n_weights - n_removed(module.name, ModuleOptions(sparsity), entry.n_rows, entry.n_columns, options)
    return width * kept + 8 * bitmap_width(entry.n_columns) * entry.n_rows + 64 * (entry.n_rows + 1) + factors
