"""The journal of a run: one JSON object a line, written only after what it speaks of is on the disk.

Invariant: a line that is there is true. Lines are appended by one thread, a group at a time: first the data is made
durable, then the lines, so that nobody who writes data ever waits for the disk. A last line that was torn ends the
journal where it begins.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import OutputError
from .manifest import canonical_json

Record = dict[str, Any]


class Journal:
    """Appends records to the file ``path``, behind those that are there already.

    Args:
        path: of the journal.
        sync: makes everything durable that was written before the call.

    Raises:
        OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, sync: Callable[[], None]) -> None:
        self._path, self._sync = path, sync
        self.records, n_bytes = read_journal(path)
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._file, n_bytes)
            os.lseek(self._file, n_bytes, os.SEEK_SET)
        except OSError as error:
            raise self._failed(error) from error
        self._error: OutputError | None = None
        self._waiting: queue.SimpleQueue[Record | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._append_groups, name="salr-journal", daemon=True)
        self._thread.start()

    def append(self, record: Record) -> None:
        """Have ``record`` written once everything that was written before this call is durable; does not wait.

        Raises:
            OutputError: an earlier record could not be written.
        """
        if self._error is not None:
            raise self._error
        self._waiting.put(record)

    def flush(self) -> None:
        """Wait until every record so far is durable.

        Raises:
            OutputError: one could not be written.
        """
        written = threading.Event()
        self._waiting.put(written)
        written.wait()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Write what waits, and end.

        Raises:
            OutputError: a record could not be written.
        """
        if not self._thread.is_alive():
            return
        self._waiting.put(None)
        self._thread.join()
        os.close(self._file)
        if self._error is not None:
            raise self._error

    def _append_groups(self) -> None:
        more = True
        while more:
            group = [self._waiting.get()]
            while not self._waiting.empty():
                group.append(self._waiting.get())
            more = None not in group
            records = [record for record in group if isinstance(record, dict)]
            if records and self._error is None:
                try:
                    self._append(records)
                except OSError as error:
                    self._error = self._failed(error)
                except OutputError as error:
                    self._error = error
            for written in group:
                if isinstance(written, threading.Event):
                    written.set()

    def _append(self, records: list[Record]) -> None:
        self._sync()
        view = memoryview(b"".join(canonical_json(record) + b"\n" for record in records))
        while view:
            view = view[os.write(self._file, view) :]
        os.fdatasync(self._file)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"writing failed ({error.strerror})", path=self._path, fix="free disk space and run the command again"
        )


def read_journal(path: Path) -> tuple[list[Record], int]:
    """Return the records of a journal, none where it is missing, and the bytes that they take.

    Raises:
        OutputError: the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise OutputError(f"cannot be read ({error.strerror})", path=path, fix="give --fresh to start over") from error
    records: list[Record] = []
    n_bytes = 0
    for line in data.splitlines(keepends=True):
        record = _parsed(line)
        if record is None:
            break
        records.append(record)
        n_bytes += len(line)
    return records, n_bytes


def _parsed(line: bytes) -> Record | None:
    """Return a whole line's record, None for one that was torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
