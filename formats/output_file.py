"""A file that appears under its name only when it is complete.

Invariant: data is written to ``OUT.partial/data``; ``OUT`` is touched once, by an atomic rename after an fsync. Making
``OUT.partial`` is also the lock: two writers of one output refuse each other.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

from .errors import OutputError


class OutputFile:
    """Positioned writes into a new file; use it as a context manager and call ``commit`` at its end.

    Args:
        path: the final name.
        n_bytes: expected size, held against the free disk space before anything is written.
        force: replace an existing ``path`` when the new file is complete.
        fresh: discard what an interrupted run left in ``OUT.partial``.

    Raises:
        OutputError: ``path`` exists, cannot be written or does not fit on the disk, or another run is writing it.
    """

    def __init__(self, path: str | Path, n_bytes: int, *, force: bool = False, fresh: bool = False) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        check_output(self.path, force=force)
        if fresh and self.partial.is_dir():
            shutil.rmtree(self.partial)
        self._make_partial()
        try:
            self._check_space(n_bytes)
            self._file = os.open(self.partial / "data", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except BaseException:
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        self._is_open = True

    def _make_partial(self) -> None:
        try:
            self.partial.mkdir()
        except FileExistsError as error:
            raise OutputError(
                "another conversion is writing this output, or one was interrupted",
                path=self.partial,
                fix="wait for it, or give --fresh to discard what it left",
            ) from error
        except OSError as error:
            raise OutputError(
                f"cannot write here ({error.strerror})", path=self.path.parent, fix="choose another output"
            ) from error

    def _check_space(self, n_bytes: int) -> None:
        free = shutil.disk_usage(self.partial).free
        if free < n_bytes:
            raise OutputError(
                f"{free / 1e6:.0f} MB of disk space free",
                path=self.path.parent,
                needed=f"{n_bytes / 1e6:.0f} MB",
                fix="free some, or choose another output",
            )

    def write(self, position: int, data: memoryview | bytes) -> None:
        """Write ``data`` at byte ``position``; safe from several threads at once.

        Raises:
            OutputError: the disk is full or failing.
        """
        view = memoryview(data).cast("B")
        try:
            while view:
                n_written = os.pwrite(self._file, view, position)
                position, view = position + n_written, view[n_written:]
        except OSError as error:
            raise OutputError(
                f"writing failed ({error.strerror})", path=self.path, fix="free disk space and run the command again"
            ) from error

    def commit(self) -> None:
        """Make the file durable and give it its name."""
        try:
            os.fsync(self._file)
            self._close()
            if self.path.exists():
                shutil.copymode(self.path, self.partial / "data")  # a private file stays private
            (self.partial / "data").replace(self.path)
            _sync_directory(self.path.parent)
        except OSError as error:
            raise OutputError(f"finishing failed ({error.strerror})", path=self.path, fix="check the disk") from error
        shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self) -> None:
        if self._is_open:
            self._is_open = False
            os.close(self._file)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_open:
            self._close()
            shutil.rmtree(self.partial, ignore_errors=True)


def check_output(path: Path, *, force: bool) -> None:
    """Refuse an output that exists, or whose folder does not.

    Raises:
        OutputError: see above.
    """
    if path.is_dir():
        raise OutputError("this is a directory", path=path, needed="a file name", fix="give a name ending in .salr")
    if path.exists() and not force:
        raise OutputError("the output exists already", path=path, fix="give --force to replace it, or another name")
    if not path.parent.is_dir():
        raise OutputError("no such directory", path=path.parent, fix="make it first")


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
