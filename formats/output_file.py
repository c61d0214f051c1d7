"""Files that are written at known places, from several threads at once.

Invariant: an ``OutputFile`` appears under its name only when it is complete; until then it is ``OUT.partial/data``.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from .errors import OutputError
from .partial_output import PartialOutput, new_output


class DataFile:
    """Positioned writes into one file; ``place`` is what errors name.

    Raises:
        OutputError: the file cannot be made.
    """

    def __init__(self, path: Path, place: Path) -> None:
        self._place = place
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise self._failed(error) from error
        self._is_open = True

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"writing failed ({error.strerror})", path=self._place, fix="free disk space and run the command again"
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
            raise self._failed(error) from error

    def read(self, begin: int, end: int) -> bytes:
        """Return the bytes from ``begin`` to ``end``, fewer where the file is shorter."""
        return os.pread(self._file, end - begin, begin)

    def sync(self) -> None:
        """Wait until everything written so far is on the disk.

        Raises:
            OutputError: the disk is full or failing.
        """
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise self._failed(error) from error

    def finish(self, n_bytes: int | None = None) -> None:
        """Cut the file to ``n_bytes`` if they are given, make it durable and close it.

        Raises:
            OutputError: the disk is failing.
        """
        try:
            if n_bytes is not None:
                os.ftruncate(self._file, n_bytes)
            os.fsync(self._file)
        except OSError as error:
            raise self._failed(error) from error
        self.close()

    def close(self) -> None:
        """Close the file; what was written stays."""
        if self._is_open:
            self._is_open = False
            os.close(self._file)


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
        self._partial: PartialOutput = new_output(path, force=force, fresh=fresh)
        self.path = self._partial.path
        try:
            self._partial.check_space(n_bytes)
            self._file = DataFile(self._partial.data, self.path)
        except BaseException:
            self._partial.close()
            raise

    def write(self, position: int, data: memoryview | bytes) -> None:
        """Write ``data`` at byte ``position``; safe from several threads at once.

        Raises:
            OutputError: the disk is full or failing.
        """
        self._file.write(position, data)

    def commit(self) -> None:
        """Make the file durable and give it its name."""
        self._file.finish()
        self._partial.commit()

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._partial.close()
