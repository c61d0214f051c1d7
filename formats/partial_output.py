"""``OUT.partial/``: what a run leaves beside its output until the output is complete.

Invariant: one process holds the folder at a time, by a lock that dies with it. ``OUT`` is touched once, by an atomic
rename of ``OUT.partial/data`` (a file, or a folder of shards) after everything in it is durable.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from .errors import OutputError

_LOCK = "lock"


class PartialOutput:
    """The folder of an output that is being made, locked; a context manager.

    When its block ends without ``commit``, the folder vanishes unless ``keep`` is set: it is from the start where an
    earlier run left something.

    Args:
        path: the output's final name.
        force: replace an existing file when the new one is complete.
        fresh: discard what an interrupted run left.
        is_directory: the output is a directory; one that exists is never replaced.

    Raises:
        OutputError: ``path`` exists or cannot be written, or another run is writing it.
    """

    def __init__(
        self, path: str | Path, *, force: bool = False, fresh: bool = False, is_directory: bool = False
    ) -> None:
        self.path = Path(path)
        check_output(self.path, force=force, is_directory=is_directory)
        self.folder = self.path.with_name(self.path.name + ".partial")
        self._lock = self._take_lock()
        self._is_open = True
        if fresh:
            self.clear()
        self.keep = any(self._entries())

    @property
    def data(self) -> Path:
        """Where the output grows: a file, or a folder of shards."""
        return self.folder / "data"

    def _take_lock(self) -> int:
        while True:
            try:
                self.folder.mkdir(exist_ok=True)
            except FileExistsError as error:
                raise OutputError("this is a file", path=self.folder, needed="no such name", fix="remove it") from error
            except OSError as error:
                raise self._cannot_write(error) from error
            try:
                handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # the run that held it has just removed the folder
            except OSError as error:
                raise self._cannot_write(error) from error
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(handle)
                raise OutputError(
                    "another run is writing this output", path=self.folder, fix="wait for it, or end it"
                ) from error
            if _is_still_there(handle, self.folder / _LOCK):
                return handle
            os.close(handle)

    def _cannot_write(self, error: OSError) -> OutputError:
        return OutputError(f"cannot write here ({error.strerror})", path=self.path.parent, fix="choose another output")

    def _entries(self) -> list[Path]:
        return [entry for entry in self.folder.iterdir() if entry.name != _LOCK]

    def clear(self, *, but: str = "") -> None:
        """Discard what the folder holds, except the lock and the file ``but``."""
        for entry in self._entries():
            if entry.name == but:
                continue
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def check_space(self, n_bytes: int) -> None:
        """Refuse an output of ``n_bytes`` that the disk has no room for; what is there already counts.

        Raises:
            OutputError: see above.
        """
        there = sum(path.stat().st_blocks * 512 for path in self.data.parent.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.folder).free
        if free + there < n_bytes:
            raise OutputError(
                f"{free / 1e6:.0f} MB of disk space free",
                path=self.path.parent,
                needed=f"{(n_bytes - there) / 1e6:.0f} MB",
                fix="free some, or choose another output",
            )

    def commit(self) -> None:
        """Give the complete and durable ``data`` its final name, and remove the folder.

        Raises:
            OutputError: the rename failed.
        """
        try:
            if self.path.is_file():
                shutil.copymode(self.path, self.data)  # a private file stays private
            self.data.replace(self.path)
            sync_directory(self.path.parent)
        except OSError as error:
            raise OutputError(f"finishing failed ({error.strerror})", path=self.path, fix="check the disk") from error
        self.keep = False
        self.close()

    def close(self) -> None:
        """Release the lock; remove the folder unless ``keep`` is set."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            if not self.keep:
                self.clear()
                (self.folder / _LOCK).unlink()  # last: whoever locks the new one finds an empty folder
                self.folder.rmdir()
        except OSError:
            pass  # what cannot be removed is seen, and named, by the next run
        finally:
            os.close(self._lock)

    def __enter__(self) -> PartialOutput:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def new_output(path: str | Path, *, force: bool = False, fresh: bool = False) -> PartialOutput:
    """Return the folder of an output that cannot be resumed: what another run left is refused, or discarded if asked.

    Raises:
        OutputError: see ``PartialOutput``; or an interrupted run left something.
    """
    partial = PartialOutput(path, force=force, fresh=fresh)
    if partial.keep:
        partial.close()
        raise OutputError(
            "an interrupted run left this",
            path=partial.folder,
            fix="run its command again to go on, or give --fresh (or remove it) to discard it",
        )
    return partial


def check_output(path: Path, *, force: bool, is_directory: bool = False) -> None:
    """Refuse an output that exists, or whose folder does not.

    Raises:
        OutputError: see above.
    """
    if is_directory and path.exists():
        raise OutputError("the output exists already", path=path, fix="remove it, or choose another name")
    if path.is_dir():
        raise OutputError("this is a directory", path=path, needed="a file name", fix="give a name ending in .salr")
    if path.exists() and not path.is_file():
        raise OutputError("this is no regular file", path=path, needed="a file name", fix="choose another name")
    if path.exists() and not force:
        raise OutputError("the output exists already", path=path, fix="give --force to replace it, or another name")
    if not path.parent.is_dir():
        raise OutputError("no such directory", path=path.parent, fix="make it first")


def check_is_no_input(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output that would replace what it is made from.

    Raises:
        OutputError: see above.
    """
    if path.exists() and any(other.exists() and path.samefile(other) for other in inputs):
        raise OutputError("the output is one of the inputs", path=path, fix="choose another name")


def _is_still_there(handle: int, path: Path) -> bool:
    """Tell whether ``path`` still leads to the open file, so that its lock is the one that others see."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
