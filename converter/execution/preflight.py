"""What a conversion will need, told before it begins.

Invariant: disk space is exact and is checked again by the writer; memory is an estimate from measured runs (seven
float32 copies of the largest matrix a worker) and refuses nothing: a run that is killed can be resumed.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ..plan import Plan

_BASE_BYTES = 500_000_000
_COPIES = 7
_FLOAT_BYTES = 4


@dataclass(frozen=True)
class Needs:
    """Bytes of memory and disk that a conversion takes, and how many are free; None where that cannot be told.

    ``spool_bytes`` of the disk are hidden states at a block's border, for resuming; they are gone in the end.
    """

    memory_bytes: int
    disk_bytes: int
    spool_bytes: int
    free_memory_bytes: int | None

    @property
    def exceeds_memory(self) -> bool:
        """Whether the estimate is more than is free."""
        return self.free_memory_bytes is not None and self.memory_bytes > self.free_memory_bytes


def needs_of(plan: Plan, workers: int) -> Needs:
    """Return what carrying out a plan with ``workers`` on the CPU needs."""
    largest = max((math.prod(module.entry.shape[-2:]) for module in plan.modules), default=0)
    memory = _BASE_BYTES + workers * _COPIES * _FLOAT_BYTES * largest
    spool = 0
    data = plan.options.data
    if data is not None:
        width = plan.checkpoint.config.get("hidden_size")
        stream = _FLOAT_BYTES * data.samples * data.length * width if isinstance(width, int) else 0
        n_streams = 2 if plan.options.method_info.sequential else 1
        spool = 2 * n_streams * stream  # the next one is written before the last one goes
        columns = max((module.entry.n_columns for module in plan.modules), default=0)
        memory += _FLOAT_BYTES * (_block_weights(plan) + 2 * n_streams * columns**2) + 2 * n_streams * stream
    return Needs(memory, sum(spec.n_bytes for spec in plan.specs()), spool, _free_memory())


def _block_weights(plan: Plan) -> int:
    """Return the packed weights of the largest block: those that share everything up to a number in their names."""
    sizes: Counter[str] = Counter()
    for module in plan.modules:
        found = re.match(r".*?\.\d+\.", module.name + ".")
        sizes[found[0] if found else ""] += module.entry.n_weights
    return max(sizes.values(), default=0)


def _free_memory() -> int | None:
    """Return the memory that Linux could hand out, None elsewhere."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
