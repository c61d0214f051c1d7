"""Threads that compute, with one thread of torch each, and threads for what goes on beside them.

Invariant: torch's setting is the caller's own again afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread in this thread: some sums, and eigenvectors, depend on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool whose workers each compute with one thread, as the caller does meanwhile."""
    with one_thread(), ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


@contextmanager
def beside(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool for what goes on beside the numerical work; after an error nothing new is begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
