"""Who computes what in one launch of the fused kernel: equal bytes for each thread block, in contiguous runs.

Invariant: stages of A are split over the first ``a_parts`` thread blocks, rounds over all, in order; a row block's
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


def schedule(work: Work, n_blocks: int, a_parts: int) -> npt.NDArray[np.int32]:
    """Return [n_blocks, 4]: first and last (exclusive) stage of A, first and last round, of each thread block.

    Of a row block's rounds, those of B come first and go with its first round of W; each thread block has a round of W
    at least, so that sharers are neighbours: ``n_blocks`` is at most the number of rounds of W.
    """
    splits = np.minimum(np.arange(n_blocks + 1), a_parts) * work.n_a // max(a_parts, 1)
    sizes = np.full((work.n_row_blocks, work.rounds_w), work.w_bytes)
    sizes[:, 0] += work.rounds_b * work.b_bytes
    ends = np.cumsum(sizes.ravel())
    share = (ends[-1] + work.n_a * work.a_bytes) / n_blocks
    free = np.cumsum(np.maximum(share - np.diff(splits) * work.a_bytes, 0))
    borders = np.append(0, np.searchsorted(ends, free * (ends[-1] / free[-1]) - work.w_bytes / 2))
    borders[-1] = ends.size
    steps = np.arange(n_blocks + 1)
    borders = np.maximum.accumulate(borders - steps) + steps
    borders = np.minimum(borders, ends.size - steps[::-1])
    row_block, k = np.divmod(borders, work.rounds_w)
    rounds = row_block * (work.rounds_w + work.rounds_b) + np.where(k > 0, k + work.rounds_b, 0)
    return np.stack([splits[:-1], splits[1:], rounds[:-1], rounds[1:]], 1).astype(np.int32)


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
