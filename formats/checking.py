"""Checking a whole file on threads: every digest and every module's structure, beside what the caller does meanwhile.

Invariant: findings come in one order, whichever thread was first, and no thread outlives the check.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from . import naming, validation
from .errors import ChecksumError, FormatError

if TYPE_CHECKING:
    from .reader import SalrFile

#: a name with what is wrong about it, or None
Finding = tuple[str, FormatError | None]

#: more would wait for memory: one thread digests about 10 GB/s
_MOST_THREADS = 8
#: checked by one call of a thread, so that tens of thousands of small experts make few calls
_GROUP_BYTES = 1 << 24


class IntegrityCheck:
    """The check of a file, begun at once; a context manager, whose end drops what is not under way.

    The modules' structure is looked at first, because kernels depend on it.
    """

    def __init__(self, file: SalrFile) -> None:
        digested = [(name, file.tensors[name].n_bytes) for name in sorted(file.manifest.checksums)]
        modules = [(name, file.tensors[naming.values_name(name)].n_bytes) for name in file.modules]
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS), thread_name_prefix="salr-check")
        self._modules = self._begin(file, modules, module_problem)
        self._digests = self._begin(file, digested, digest_problem)

    def __enter__(self) -> IntegrityCheck:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def findings(self) -> Iterator[Finding]:
        """Yield each tensor by name with its digest's error or None, then each module with that of its structure."""
        for group in (*self._digests, *self._modules):
            yield from group.result()

    def require_modules(self) -> None:
        """Wait until every module's structure is checked, so that kernels may index by it.

        Raises:
            FormatError: a module's tensors contradict each other.
        """
        _require(finding for group in self._modules for finding in group.result())

    def require_all(self) -> None:
        """Wait for the whole check.

        Raises:
            FormatError: the first of the findings that is wrong.
        """
        _require(self.findings())

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Let the body work with the file; leaving it waits for the whole check.

        Raises:
            FormatError: the first of the findings that is wrong. It takes the place of an error of the body, which
                the damage may have caused and which stays its context.
        """
        try:
            yield
        except Exception:
            self.require_all()
            raise
        self.require_all()

    def _begin(
        self, file: SalrFile, sizes: Iterable[tuple[str, int]], problem: Callable[[SalrFile, str], FormatError | None]
    ) -> list[Future[list[Finding]]]:
        def check(names: list[str]) -> list[Finding]:
            return [(name, problem(file, name)) for name in names]

        return [self._pool.submit(check, names) for names in _groups(sizes)]


def digest_problem(file: SalrFile, name: str) -> ChecksumError | None:
    """Return what is wrong with a tensor's digest."""
    if validation.digest(file.raw(name)) == file.manifest.checksums[name]:
        return None
    return validation.damaged(file.path_of(name), name)


def module_problem(file: SalrFile, name: str) -> FormatError | None:
    """Return the first thing that is wrong with a module's structure."""
    try:
        file.module(name)
        file.pairs(name)
    except FormatError as error:
        return error
    return None


def _require(findings: Iterable[Finding]) -> None:
    for _, problem in findings:
        if problem is not None:
            raise problem


def _groups(sizes: Iterable[tuple[str, int]]) -> Iterator[list[str]]:
    """Divide names with their bytes into runs of about ``_GROUP_BYTES``."""
    group: list[str] = []
    total = 0
    for name, n_bytes in sizes:
        group.append(name)
        total += n_bytes
        if total >= _GROUP_BYTES:
            yield group
            group, total = [], 0
    if group:
        yield group
