"""The error of this package."""

from __future__ import annotations

from ..formats.errors import SalrError


class EvaluationError(SalrError):
    """A model or a text cannot be evaluated, or two models cannot be compared."""
