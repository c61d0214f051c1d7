"""Who computes what in one launch of the fused kernel: equal bytes for each thread block, in contiguous runs.

Invariant: stages of A are split over the first ``a_splits`` thread blocks, rounds over all, in order; a row block's
sharers are consecutive thread blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Work:
    """Bytes of a stage: A's stages, then of each row block its rounds of W and of B."""

    n_a: int
    a_bytes: float
    n_row_blocks: int
    rounds_w: int
    w_bytes: float
    rounds_b: int
    b_bytes: float


def schedule(work: Work, n_blocks: int, a_splits: int) -> npt.NDArray[np.int32]:
    """Return [n_blocks, 4]: first and last (exclusive) stage of A, first and last round, of each thread block.

    ``n_blocks`` is at most the number of rounds.
    """
    a_borders = np.arange(a_splits + 1) * work.n_a // max(a_splits, 1)
    a_first = np.append(a_borders[:-1], np.full(n_blocks - a_splits, work.n_a)).astype(np.int64)
    a_last = np.append(a_borders[1:], np.full(n_blocks - a_splits, work.n_a)).astype(np.int64)
    sizes = np.tile(np.repeat([work.w_bytes, work.b_bytes], [work.rounds_w, work.rounds_b]), work.n_row_blocks)
    total = sizes.sum() + work.n_a * work.a_bytes
    free = np.maximum(total / n_blocks - (a_last - a_first) * work.a_bytes, 0)
    ends = np.cumsum(free) * (sizes.sum() / free.sum())
    borders = np.searchsorted(np.cumsum(sizes), ends - sizes.min() / 2, side="left")
    borders = np.append(0, borders)
    borders[-1] = len(sizes)
    # Each thread block has a round at least: sharers of a row block must be neighbours.
    borders = np.maximum.accumulate(borders - np.arange(n_blocks + 1)) + np.arange(n_blocks + 1)
    borders = np.minimum(borders, len(sizes) - np.arange(n_blocks, -1, -1))
    return np.stack([a_first, a_last, borders[:-1], borders[1:]], 1).astype(np.int32)


def sharers(chosen: npt.NDArray[np.int32], work: Work) -> npt.NDArray[np.int32]:
    """Return [n_row_blocks, 2]: the first and the last thread block with rounds of each row block."""
    rounds = work.rounds_w + work.rounds_b
    found = np.full((work.n_row_blocks, 2), -1, np.int32)
    for block, (_, _, first, last) in enumerate(chosen.tolist()):
        for row_block in range(first // rounds, (last - 1) // rounds + 1):
            if found[row_block, 0] < 0:
                found[row_block, 0] = block
            found[row_block, 1] = block
    return found
