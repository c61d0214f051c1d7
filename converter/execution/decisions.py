"""Decisions that need a look at the whole model, kept in a file so that they are made once.

Invariant: a file is used only for the very conversion it was made for: its fingerprint says so.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...formats.errors import OptionError, OutputError
from ...formats.manifest import canonical_json

Overrides = tuple[tuple[str, Mapping[str, Any]], ...]


@dataclass(frozen=True)
class Decisions:
    """What ``target_bits`` adds to the overrides, and the nnz of each module by scope ``global``; None for neither."""

    overrides: Overrides | None = None
    kept_counts: Mapping[str, int] | None = None


def decided_once(
    path: Path | None, fingerprint: Mapping[str, Any], decide: Callable[[], Decisions], *, must_exist: bool = False
) -> Decisions:
    """Return the decisions in ``path``; where it is missing, make them and write it.

    Args:
        path: the file; None to decide without one.
        fingerprint: what the decisions follow from.
        decide: makes them.
        must_exist: refuse to make them, because several jobs would.

    Raises:
        OptionError: the file is missing though it must exist, is damaged, or belongs to another conversion.
        OutputError: it cannot be written.
    """
    if path is not None and path.is_file():
        return _read(path, fingerprint)
    if must_exist:
        raise OptionError(
            "--part with --target-bits or --scope global",
            path=path,
            needed="decisions about the whole model, made once",
            fix="run it once with --plan FILE --dry-run and without --part, then give --plan FILE to each part",
        )
    if path is not None and (path.is_dir() or not path.parent.is_dir()):  # decisions take minutes: told before them
        found = "this is a directory" if path.is_dir() else "its folder is missing"
        raise OutputError(found, path=path, fix="choose another --plan")
    decisions = decide()
    if path is not None:
        _write(path, {"fingerprint": fingerprint, **asdict(decisions)})
    return decisions


def _read(path: Path, fingerprint: Mapping[str, Any]) -> Decisions:
    try:
        value = json.loads(path.read_bytes())
        before, overrides, counts = value["fingerprint"], value["overrides"], value["kept_counts"]
        decisions = Decisions(None if overrides is None else tuple((p, dict(s)) for p, s in overrides), counts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(f"is no plan file ({error})", path=path, fix="remove it to make it again") from error
    if before != json.loads(canonical_json(fingerprint)):
        raise OptionError(
            "holds the decisions of another conversion",
            path=path,
            needed="the same input, options, versions and device",
            fix="remove it to make them again",
        )
    return decisions


def _write(path: Path, value: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".partial")
    try:
        temporary.write_bytes(canonical_json(value))
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"writing failed ({error.strerror})", path=path, fix="choose another --plan") from error
