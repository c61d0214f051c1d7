"""Errors of loading and running models."""

from __future__ import annotations

from ..formats.errors import SalrError


class LoadError(SalrError):
    """A model cannot be built from a .salr file here."""


class BackendError(SalrError):
    """A backend is unknown, or cannot be used on this machine."""
