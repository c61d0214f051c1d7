"""Spreading a budget of bits over modules: sparsity, rank and encodings of each, by measured sensitivity.

Each module's candidates carry their size and the change of the model's hidden states they cause
(``converter.candidates``). The objective is the sum of those changes; a Lagrange multiplier on bits picks one candidate
a module.
Invariant: the choice is never worse on that objective than the best uniform choice within the same budget.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from ...formats.errors import OptionError
from ..options import ConvertOptions
from ..plan import Plan
from .candidates import Candidate, measured_candidates

_BISECTIONS = 60


@dataclass(frozen=True)
class Allocation:
    """The candidate chosen for each module, the objective reached, and that of the best uniform choice."""

    chosen: dict[str, Candidate]
    objective: float
    uniform_objective: float


def with_budget(
    plan: Plan, options: ConvertOptions, device: torch.device, pool: ThreadPoolExecutor
) -> tuple[ConvertOptions, Allocation]:
    """Return options whose overrides set sparsity, rank and encodings of every module so that ``target_bits`` is kept.

    Raises:
        OptionError: the budget is below what the sparsest candidates take.
        CalibrationError: the calibration data is unusable.
    """
    assert options.target_bits is not None
    experts = [module.name for module in plan.modules if len(module.entry.shape) == 3]
    if experts:
        raise OptionError("--target-bits", tensor=experts[0], needed="2-D weights", fix=f"--exclude '{experts[0]}'")
    curves = dict(measured_candidates(plan, options, device, pool))
    budget = options.target_bits * sum(module.entry.n_weights for module in plan.modules if module.name in curves)
    allocation = allocate(curves, budget)
    chosen = allocation.chosen.items()
    overrides = tuple((name, c.settings()) for name, c in sorted(chosen))
    return replace(options, overrides=(*options.overrides, *overrides)), allocation


def allocate(curves: dict[str, list[Candidate]], budget_bits: float) -> Allocation:
    """Choose one candidate a module, minimising the summed error within ``budget_bits``.

    Raises:
        OptionError: even the smallest candidates exceed the budget.
    """
    smallest = sum(min(c.n_bits for c in candidates) for candidates in curves.values())
    if smallest > budget_bits:
        raise OptionError(
            "--target-bits is below what the smallest choice takes",
            needed=f"{smallest / budget_bits:.2f} times that",
            fix="raise it",
        )
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
    best = _spend_rest({name: _frontier(options) for name, options in curves.items()}, best, budget_bits)
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
    """Return the best choice of one kind of candidate for all modules, ranks cut down where a module is too small."""
    kinds: dict[tuple[float, str, str], dict[str, list[Candidate]]] = {}
    for name, options in curves.items():
        for c in options:
            kinds.setdefault((c.sparsity, c.values, c.adapter_values), {}).setdefault(name, []).append(c)
    choices = []
    for by_module in kinds.values():
        for rank in sorted({c.rank for options in by_module.values() for c in options}):
            fitting = {name: [c for c in options if c.rank <= rank] for name, options in by_module.items()}
            if len(fitting) < len(curves) or not all(fitting.values()):
                continue
            choice = {name: max(options, key=lambda c: c.rank) for name, options in fitting.items()}
            if _size(choice) <= budget_bits:
                choices.append(choice)
    return min(choices, key=_error, default=None)


def _frontier(options: list[Candidate]) -> list[Candidate]:
    """Return the candidates that no other beats in both size and error, by size."""
    found: list[Candidate] = []
    for candidate in sorted(options, key=lambda c: (c.n_bits, c.error)):
        if not found or candidate.error < found[-1].error:
            found.append(candidate)
    return found


def _size(chosen: dict[str, Candidate]) -> float:
    return sum(candidate.n_bits for candidate in chosen.values())


def _error(chosen: dict[str, Candidate]) -> float:
    return sum(candidate.error for candidate in chosen.values())
