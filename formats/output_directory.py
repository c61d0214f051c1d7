"""A directory that appears under its name only when it is complete.

Invariant: everything is written into the sibling ``OUT.partial/``, which an atomic rename turns into ``OUT``.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError
from .partial_output import check_output


@contextmanager
def output_directory(path: str | Path) -> Iterator[Path]:
    """Yield a new, empty directory that becomes ``path`` when the block ends, and vanishes when it fails.

    Raises:
        OutputError: ``path`` exists, or its parent cannot be written.
    """
    path = Path(path)
    check_output(path, force=False, is_directory=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise OutputError("another run is writing here, or one was killed", path=partial, fix="remove it") from error
    except OSError as error:
        raise OutputError(f"cannot be made ({error.strerror})", path=partial, fix="choose another output") from error
    try:
        yield partial
        _rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _rename(partial: Path, path: Path) -> None:
    try:
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"finishing failed ({error.strerror})", path=path, fix="choose another output") from error
