"""What the bytes of a conversion follow from, so that only the same conversion goes on where one was interrupted.

Invariant: two runs of equal fingerprints give equal bytes. Large inputs are known by size, time of change and first
bytes, and are watched while they are read; their SHA-256 digests stand in the manifest.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...formats.container import TensorSpec
from ...formats.errors import InputLostError
from ...formats.manifest import canonical_json
from ...formats.validation import digest
from ...formats.version import VERSION
from ..options import ConvertOptions
from .devices import environment

_HEAD_BYTES = 1 << 16
_INTERVAL_S = 1.0


class InputFiles:
    """The large files that a conversion reads, by the names that the manifest gives them.

    Raises:
        InputLostError: one cannot be read.
    """

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self.paths = dict(paths)
        self._states = {name: _state(path) for name, path in self.paths.items()}
        self._checked = time.monotonic()

    def fingerprint(self) -> dict[str, Any]:
        """Return size, time of change and a digest of the first bytes of each."""
        return {name: [*self._states[name][2:], digest(_head(path))] for name, path in self.paths.items()}

    def watch(self) -> None:
        """Do ``check`` if the last time was a second ago: a look at many files over a network takes a while."""
        if time.monotonic() - self._checked >= _INTERVAL_S:
            self.check()

    def check(self) -> None:
        """Refuse to go on when a file is no longer the one that was opened.

        Raises:
            InputLostError: one vanished or was changed.
        """
        self._checked = time.monotonic()
        for name, path in self.paths.items():
            if _state(path) != self._states[name]:
                raise InputLostError(
                    "was changed while it was converted",
                    path=path,
                    fix="put the old file back and run the same command, or give --fresh to start over",
                )


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except OSError as error:
        raise lost(path, error) from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise lost(path, error) from error


def lost(path: Path, error: OSError) -> InputLostError:
    """Return the error for an input that cannot be read any more."""
    return InputLostError(
        f"cannot be read any more ({error.strerror})", path=path, fix="put it back and run the same command again"
    )


def fingerprint(
    options: ConvertOptions,
    device: torch.device,
    inputs: InputFiles,
    assets: Mapping[str, bytes],
    specs: Iterable[TensorSpec],
) -> dict[str, Any]:
    """Return everything that the output's bytes follow from, as JSON."""
    layout = [[spec.name, spec.dtype, list(spec.shape)] for spec in specs]
    adapters = [name for name, _ in options.adapters]
    division = {"max_shard_size": options.max_shard_size, "part": list(options.part) if options.part else None}
    return {
        "inputs": inputs.fingerprint() | {name: digest(data) for name, data in assets.items()},
        "options": {**options.recorded(), "adapters": adapters, **division},
        "environment": {**environment(device), "salr": VERSION, "transformers": version("transformers")},
        "tensors": digest(canonical_json(layout)),
    }
