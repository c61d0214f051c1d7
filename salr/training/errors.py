"""Errors of training."""

from __future__ import annotations

from ..formats.errors import SalrError


class DataError(SalrError):
    """Training data are missing or unreadable, lack a field, or have nothing to learn."""
