"""What is kept of the reference while the other models run: its log-probabilities on disk, its first choices.

Invariant: the file is made at its full size (so a full disk is told before the run, not by a crash within), and is
gone when the block ends. float16 rounds a log-probability by at most 2^-11 of itself; ``rounded`` does the same to the
other model's and normalizes both again, so that a model's divergence from itself is exactly 0 and never negative.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .errors import EvaluationError

_LOWEST = -6e4
_SPARE_BYTES = 1 << 28


class Spool:
    """Rows of float16 log-probabilities (n_rows, vocabulary) on disk, and the reference's top-1 ids (n_rows,)."""

    def __init__(self, path: Path, n_rows: int, n_vocabulary: int) -> None:
        self.n_vocabulary = n_vocabulary
        self._rows = np.memmap(path, np.float16, "r+", shape=(n_rows, n_vocabulary))
        self._top = np.zeros(n_rows, np.int64)

    def put(self, start: int, log_probs: torch.Tensor) -> None:
        """Store rows from ``start`` on; ``log_probs`` is (rows, vocabulary)."""
        stop = start + log_probs.shape[0]
        self._rows[start:stop] = log_probs.clamp(min=_LOWEST).half().cpu().numpy()
        self._top[start:stop] = log_probs.argmax(-1).cpu().numpy()

    def log_probs(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Return rows ``start`` to ``stop``, normalized, float32 (rows, vocabulary)."""
        rows = torch.from_numpy(np.array(self._rows[start:stop])).to(device)
        return rows.float().log_softmax(-1)

    def top(self, start: int, stop: int, device: torch.device) -> torch.Tensor:
        """Return the top-1 ids of rows ``start`` to ``stop``, int64 (rows,)."""
        return torch.from_numpy(self._top[start:stop]).to(device)


def rounded(log_probs: torch.Tensor) -> torch.Tensor:
    """Return ``log_probs`` (rows, vocabulary) as they come back from a spool."""
    return log_probs.clamp(min=_LOWEST).half().float().log_softmax(-1)


@contextmanager
def open_spool(n_rows: int, n_vocabulary: int) -> Iterator[Spool]:
    """Yield a spool in a temporary directory (TMPDIR says where).

    Raises:
        EvaluationError: the disk has no room for it.
    """
    with tempfile.TemporaryDirectory(prefix="salr-reference-") as folder:
        path, n_bytes = Path(folder) / "log_probs", 2 * n_rows * n_vocabulary
        free = shutil.disk_usage(folder).free - _SPARE_BYTES
        if free < n_bytes:
            raise _no_room(folder, f"{max(0, free) / 1e9:.1f} GB of disk space free", n_bytes)
        with path.open("wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            except OSError as error:
                raise _no_room(folder, f"no room ({error.strerror})", n_bytes) from error
        yield Spool(path, n_rows, n_vocabulary)


def _no_room(folder: str, found: str, n_bytes: int) -> EvaluationError:
    return EvaluationError(
        found,
        path=Path(folder).parent,
        needed=f"{n_bytes / 1e9:.1f} GB for the reference's probabilities",
        fix="set TMPDIR to a larger disk, or score fewer windows (--max-windows)",
    )
