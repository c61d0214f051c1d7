"""Errors a caller may want to catch. Each message reads ``path: tensor 'name': found, needed; what to do``."""

from __future__ import annotations

from os import PathLike


class SalrError(Exception):
    """Base class of every error SALR raises on purpose.

    Args:
        found: what was found.
        path: file or directory it was found in.
        tensor: tensor, module or key it concerns.
        needed: what was needed instead.
        fix: what the user can do.
    """

    def __init__(
        self,
        found: str,
        *,
        path: str | PathLike[str] | None = None,
        tensor: str | None = None,
        needed: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.found, self.path, self.tensor, self.needed, self.fix = found, path, tensor, needed, fix
        place = "".join([f"{path}: " if path is not None else "", f"tensor '{tensor}': " if tensor is not None else ""])
        super().__init__(f"{place}{found}" + (f", needed {needed}" if needed else "") + (f"; {fix}" if fix else ""))


class FormatError(SalrError):
    """A .salr (or safetensors) file breaks a rule of docs/format.md."""


class VersionError(FormatError):
    """A .salr file needs a newer reader than this one."""


class ChecksumError(FormatError):
    """Bytes differ from the digest that was stored when they were written."""


class SourceError(SalrError):
    """A checkpoint cannot be read, or holds something that cannot be converted."""


class InputLostError(SourceError):
    """An input file vanished or changed while it was read."""


class AdapterError(SalrError):
    """An adapter cannot be read, does not fit its base, or uses a feature that has no exact form here."""


class CalibrationError(SalrError):
    """Calibration text is missing, too short or unreadable, or the model cannot be run on it."""


class OptionError(SalrError):
    """An option, or a combination of options, makes no sense for this input."""


class OutputError(SalrError):
    """The output exists, cannot be written, or does not fit on the disk."""


class MismatchError(SalrError):
    """A .salr file is sound in itself but does not match the source it is compared with."""
