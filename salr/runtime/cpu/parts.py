"""What every kernel does with its job: reads its fields, claims parts of the rows, lets another job be done first.

Invariant: any number of threads may run a kernel on one job at once: each claims parts until none is left, so a thread
that comes late, or never, costs time but no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .assembly import Assembly
from .decoding import WORD
from .job import SLOT


def field(code: Assembly, name: str) -> str:
    """Return a number of the job as i64."""
    return code.load("i64", code.at("%job", 8 * SLOT[name]), 8)


def pointer(code: Assembly, name: str) -> str:
    """Return an address of the job."""
    return code.load("ptr", code.at("%job", 8 * SLOT[name]), 8)


def n_words(code: Assembly) -> str:
    """Return how many words of 64 columns a row has."""
    return code.let(f"lshr i64 {code.add(field(code, 'n_columns'), WORD - 1)}, 6")


@contextmanager
def claimed_rows(code: Assembly, n_together: int) -> Iterator[str]:
    """Run the body for the first of every ``n_together`` rows, part by part as this thread claims them."""
    with claimed_parts(code) as (begin, end), code.loop(begin, end, n_together) as row:
        yield row


@contextmanager
def claimed_parts(code: Assembly) -> Iterator[tuple[str, str]]:
    """Run the body for the first row and the end of each part that this thread claims."""
    n_parts, part_rows, n_rows = (field(code, name) for name in ("n_parts", "part_rows", "n_rows"))
    with code.while_true() as leave:
        part = code.let("atomicrmw add ptr %job, i64 1 acq_rel")
        leave(code.let(f"icmp sge i64 {part}, {n_parts}"))
        begin = code.multiply(part, part_rows)
        yield begin, code.smaller(code.add(begin, part_rows), n_rows)
        code.let(f"atomicrmw add ptr {code.at('%job', 8 * SLOT['done'])}, i64 1 release")


def run_first(code: Assembly) -> None:
    """Help with the kernel that computes u, then wait until every thread has finished its parts of it."""
    kernel, job = pointer(code, "first_kernel"), pointer(code, "first_job")
    with code.when(code.let(f"icmp ne ptr {kernel}, null")):
        code.do(f"call void {kernel}(ptr {job})")
        wanted = code.load("i64", code.at(job, 8 * SLOT["n_parts"]), 8)
        done = code.at(job, 8 * SLOT["done"])
        with code.while_true() as leave:
            count = code.let(f"load atomic i64, ptr {done} acquire, align 8")
            leave(code.let(f"icmp sge i64 {count}, {wanted}"))
            code.pause()
