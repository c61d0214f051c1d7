"""Checking a whole file on threads: every digest and every module's structure, beside what the caller does meanwhile.

Invariant: findings come in one order, whichever thread was first, and no thread outlives the check.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from . import naming
from .container import StoredTensor
from .errors import FormatError
from .manifest import Manifest, ModuleEntry

#: a name with what is wrong about it, or None
Finding = tuple[str, FormatError | None]

#: more would wait for memory: one thread digests about 10 GB/s
_MOST_THREADS = 8
#: checked by one call of a thread, so that tens of thousands of small experts make few calls
_GROUP_BYTES = 1 << 24


class Checkable(Protocol):
    """What is checked: a file that knows what is wrong with one of its tensors or modules (see ``reader.SalrFile``)."""

    manifest: Manifest

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor."""
        ...

    @property
    def modules(self) -> Mapping[str, ModuleEntry]:
        """Every packed module."""
        ...

    def digest_problem(self, name: str) -> FormatError | None:
        """Return what is wrong with a tensor's digest."""
        ...

    def module_problem(self, name: str) -> FormatError | None:
        """Return the first thing that is wrong with a module's structure."""
        ...


class IntegrityCheck:
    """The check of a file, begun at once; a context manager, whose end drops what is not under way.

    The modules' structure is looked at first, because kernels depend on it.
    """

    def __init__(self, file: Checkable) -> None:
        digested = [(name, file.tensors[name].n_bytes) for name in sorted(file.manifest.checksums)]
        modules = [(name, file.tensors[naming.values_name(name)].n_bytes) for name in file.modules]
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, _MOST_THREADS), thread_name_prefix="salr-check")
        self._modules = self._begin(modules, file.module_problem)
        self._digests = self._begin(digested, file.digest_problem)

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
        self, sizes: Iterable[tuple[str, int]], problem: Callable[[str], FormatError | None]
    ) -> list[Future[list[Finding]]]:
        def check(names: list[str]) -> list[Finding]:
            return [(name, problem(name)) for name in names]

        return [self._pool.submit(check, names) for names in _groups(sizes)]


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
