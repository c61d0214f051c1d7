"""Where kernels leave partial sums: memory in which a place says by itself that its sum is not there yet.

Invariant: this memory is filled once, before any launch or replay that uses it: who asks for it does so outside of a
capture (``launching.uncaptured``), since another graph may be replayed before the one that is being captured.
"""

from __future__ import annotations

import functools

import torch

#: as in sums.cuh
EMPTY = -1


def workspace(device: torch.device, stream: int, use: str, n_words: int) -> torch.Tensor:
    """Return 32-bit words that all products of a stream share, at least so many, empty when new."""
    known = _known(device)
    found = known.get((stream, use))
    if found is None or found.numel() < n_words:
        found = known[stream, use] = torch.full((n_words,), EMPTY, dtype=torch.int32, device=device)
    return found


@functools.cache
def _known(device: torch.device) -> dict[tuple[int, str], torch.Tensor]:
    return {}
