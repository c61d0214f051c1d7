"""How mask, kept values and residual factors of one matrix are chosen; one module a method, named after its source.

Invariant: a method is a pure function from a ``Problem`` to a ``Solution``; the same problem on the same kind of device
gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

from .alternating import alternating
from .joint import joint
from .magnitude import magnitude
from .problem import Factors, Problem, Solution
from .sparsegpt import sparsegpt
from .wanda import wanda

_METHODS: dict[str, Callable[[Problem], Solution]] = {
    "magnitude": magnitude,
    "alternating": alternating,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "joint": joint,
}


def solve(method: str, problem: Problem) -> Solution:
    """Run a method by name."""
    return _METHODS[method](problem)


__all__ = ["Factors", "Problem", "Solution", "solve"]
