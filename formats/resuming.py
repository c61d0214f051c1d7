"""A writer that goes on where a run of the same command was interrupted.

Invariant: a tensor counts as written only when its journal line, which follows its bytes to the disk, is there and the
bytes still match the digest in it. What is made again has the same bytes at the same place.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from .container import PIECE_BYTES, TensorSpec
from .errors import InputLostError, OutputError, SalrError
from .journal import Journal, Record, read_journal
from .manifest import canonical_json
from .partial_output import PartialOutput
from .writer import SalrWriter

#: in the folder of an output: decisions that were made before the first tensor
PLAN_NAME = "plan.json"
_READERS = 4


class ResumingWriter(SalrWriter):
    """Writes what an interrupted run has not written yet; ``notes`` are those of what it has.

    Args:
        partial: the locked folder of the output.
        specs: as for ``SalrWriter``.
        fingerprint: everything that the bytes follow from, as nested JSON; only the same may go on.

    Raises:
        OutputError: what lies there was made from something else.
    """

    def __init__(
        self,
        partial: PartialOutput,
        specs: Iterable[TensorSpec] | Mapping[str, Iterable[TensorSpec]],
        fingerprint: Mapping[str, Any],
    ) -> None:
        path, fingerprint = partial.folder / "journal", json.loads(canonical_json(fingerprint))
        records = read_journal(path)[0] if partial.data.exists() else []
        if records:
            _check_same(partial.folder, records[0].get("fingerprint"), fingerprint)
        else:
            partial.clear(but=PLAN_NAME)
        super().__init__(partial, specs)
        self._journal = Journal(path, self.sync)
        if not records:
            self._journal.append({"fingerprint": fingerprint})
        self.notes: list[Record] = []
        try:
            self.notes = [record["note"] for record in self._sound(records[1:]) if record.get("note")]
        except BaseException:
            self.__exit__(OutputError, OutputError("interrupted"), None)
            raise

    def __enter__(self) -> ResumingWriter:
        return self

    def record(self, names: Iterable[str] = (), note: Record | None = None) -> None:
        """Journal that tensors are written, with a note for the run that may go on from here."""
        self._journal.append({"tensors": {name: self.checksums[name] for name in names}, "note": note})

    def flush(self) -> None:
        """Wait until every record so far is durable."""
        self._journal.flush()

    def _sound(self, records: list[Record]) -> Iterator[Record]:
        """Yield the records all of whose tensors hold what was written; these count as written."""
        with ThreadPoolExecutor(_READERS) as pool:
            for record, is_sound in zip(records, pool.map(self._matches, records), strict=True):
                if is_sound:
                    for name, stored in record["tensors"].items():
                        self.written(name, stored)
                    yield record

    def _matches(self, record: Record) -> bool:
        tensors = record.get("tensors", {})
        return all(name in self._places and self._digest(name) == stored for name, stored in tensors.items())

    def _digest(self, name: str) -> str:
        target, tensor = self.place(name)
        state = xxhash.xxh3_128()
        for begin in range(tensor.begin, tensor.end, PIECE_BYTES):
            state.update(target.data.read(begin, min(begin + PIECE_BYTES, tensor.end)))
        return state.hexdigest()

    def finish(self, manifest: Any) -> int:
        """Write header and manifest, and give the output its name; see ``SalrWriter``."""
        self._journal.close()
        return super().finish(manifest)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._partial.keep = error is not None and is_resumable(error)
        try:
            self._journal.close()
        except OutputError:
            pass  # the run has failed already, or will say the same of its data
        finally:
            super().__exit__(kind, error, trace)


def is_resumable(error: BaseException) -> bool:
    """Tell whether the same command may succeed after ``error``: only a refused input or option never will."""
    return not isinstance(error, SalrError) or isinstance(error, (OutputError, InputLostError))


def _check_same(folder: Path, before: Any, now: Mapping[str, Any]) -> None:
    difference = next(_differences(before, now, ""), None)
    if difference is not None:
        place, old, new = difference
        raise OutputError(
            f"an interrupted run with another {place} left this (then {_short(old)}, now {_short(new)})",
            path=folder,
            needed="the same input, options, versions and device",
            fix="run its command again to go on, or give --fresh to start over",
        )


def _differences(before: Any, now: Any, place: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the places at which two nested objects differ, with what stands there."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in sorted({*before, *now}):
            yield from _differences(before.get(key), now.get(key), f"{place}.{key}" if place else str(key))
    elif before != now:
        yield place or "fingerprint", before, now


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
