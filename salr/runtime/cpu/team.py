"""Running one kernel on several threads at once: the OpenMP team that torch uses, or Python's threads.

Invariant: ``run`` returns when no thread works on the job any more. torch's own team is taken where there is one:
two teams would wait for work at the same time and take the cores from each other.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait


def run(kernel: int, job: int, n_threads: int) -> None:
    """Call ``void kernel(void *job)``, both given as addresses, on ``n_threads`` threads; the GIL is released."""
    if n_threads == 1:
        _function(kernel)(job)
    elif (openmp := _openmp()) is not None:
        openmp(kernel, job, n_threads, 0)
    else:
        function = _function(kernel)
        others = [_pool(n_threads - 1).submit(function, job) for _ in range(n_threads - 1)]
        function(job)
        wait(others)


def title() -> str:
    """Return whose threads run the kernels."""
    return "Python's threads" if _openmp() is None else "torch's OpenMP threads"


@functools.cache
def _function(address: int) -> Callable[[int], None]:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


@functools.cache
def _openmp() -> Callable[[int, int, int, int], None] | None:
    """Return GOMP_parallel, which libgomp and LLVM's OpenMP both have, if importing torch has loaded one of them."""
    try:
        found = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # no such function; on Windows CDLL(None) is a TypeError
        return None
    found.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    found.restype = None
    function: Callable[[int, int, int, int], None] = found
    return function


@functools.cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="salr-cpu")
