"""Errors of exporting to ONNX."""

from __future__ import annotations

from ..formats.errors import SalrError


class ExportError(SalrError):
    """A model has no ONNX form here, or what was exported does not compute what torch computes."""


class LibraryError(SalrError):
    """The native library cannot be built on this machine."""
