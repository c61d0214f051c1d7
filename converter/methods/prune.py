"""Static masks: which weights are kept.

Invariant: weights are selected by count, never by threshold alone, because weights from a coarse grid tie by the
thousand. Among equal scores at the boundary the lower flat index is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_BIN_BITS = 16


def keep_largest(scores: torch.Tensor, n_kept: int) -> torch.Tensor:
    """Return a bool mask, shaped as ``scores`` (groups, n), of the ``n_kept`` largest entries of each group.

    Ties at the boundary keep the lower index. ``scores`` must hold no NaN.
    """
    n_elements = scores.shape[1]
    if n_kept >= n_elements:
        return torch.ones_like(scores, dtype=torch.bool)
    if n_kept <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    boundary = _ranked(scores, n_elements - n_kept)
    mask = scores > boundary
    ties = scores == boundary
    n_missing = n_kept - mask.sum(1, keepdim=True)
    if bool((ties.sum(1, keepdim=True) > n_missing).any()):
        _keep_first(ties, n_missing)
    return mask.logical_or_(ties)


def _keep_first(ties: torch.Tensor, n_kept: torch.Tensor) -> None:
    """Clear all but the first ``n_kept`` (groups, 1) set entries of each group, in place."""
    if ties.shape[0] == 1 and not ties.is_cuda:  # one long row: counting along it would take four bytes an entry
        places = np.flatnonzero(ties.numpy())
        ties.view(-1)[torch.from_numpy(places[int(n_kept) :])] = False
    else:
        ties &= ties.cumsum(1, dtype=torch.int32) <= n_kept


def _ranked(scores: torch.Tensor, index: int) -> torch.Tensor:
    """Return the entry (groups, 1) that would stand at ``index`` if each group were sorted."""
    if scores.is_cuda:
        return torch.kthvalue(scores, index + 1, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(scores.numpy(), index, axis=1)[:, index : index + 1].copy())


@dataclass(frozen=True)
class Groups:
    """Where weights compete for being kept: the whole matrix, each row, or each ``m`` columns of a row (n:m)."""

    kind: str
    m: int = 0

    def count(self, shape: tuple[int, ...]) -> int:
        """Return the number of groups in a matrix of ``shape`` (N, K)."""
        return {"layer": 1, "row": shape[0], "n:m": shape[0] * shape[1] // (self.m or 1)}[self.kind]


def keep_roughly(scores: torch.Tensor, n_kept: int, groups: Groups) -> torch.Tensor:
    """Return the mask of ``keep_in_groups``, and all that tie at a boundary: for steps whose mask is not final."""
    grouped = scores.reshape(groups.count(tuple(scores.shape)), -1)
    n_removed = grouped.shape[1] - n_kept // grouped.shape[0]
    return (grouped >= _ranked(grouped, n_removed)).view(scores.shape) if n_removed else torch.ones_like(scores) > 0


def keep_in_groups(scores: torch.Tensor, n_kept: int, groups: Groups) -> torch.Tensor:
    """Return the mask (N, K) of the largest ``scores`` (N, K), the same number in each group.

    ``n_kept`` counts the whole matrix and is a multiple of the number of groups.
    """
    n_groups = groups.count(tuple(scores.shape))
    return keep_largest(scores.reshape(n_groups, -1), n_kept // n_groups).view(scores.shape)


def global_kept_counts(weights: Sequence[torch.Tensor], n_removed: int) -> list[int]:
    """Return how many weights each tensor keeps when ``n_removed`` of all go, smallest magnitudes first.

    Exact and streaming: a radix selection over the bits of |w| in float32, so ``weights`` is iterated three times and
    must be re-iterable; ties at the boundary remove the later tensors' weights first.
    """
    coarse = [_histogram(_magnitude_keys(weight) >> _BIN_BITS) for weight in weights]
    top, n_below_top = _boundary_bin(torch.stack(coarse).sum(0), n_removed)
    fine = [_histogram(_low_bits(_magnitude_keys(weight), top)) for weight in weights]
    low, n_below_low = _boundary_bin(torch.stack(fine).sum(0), n_removed - n_below_top)
    n_ties_removed = n_removed - n_below_top - n_below_low
    removed = [int(c[:top].sum() + f[:low].sum()) for c, f in zip(coarse, fine, strict=True)]
    for index in reversed(range(len(removed))):
        n_ties = min(int(fine[index][low]), n_ties_removed)
        removed[index] += n_ties
        n_ties_removed -= n_ties
    return [weight.numel() - n for weight, n in zip(weights, removed, strict=True)]


def _magnitude_keys(weight: torch.Tensor) -> torch.Tensor:
    """Return int32 keys that order as |w| does."""
    return weight.reshape(-1).float().contiguous().view(torch.int32) & 0x7FFFFFFF


def _low_bits(keys: torch.Tensor, top: int) -> torch.Tensor:
    return keys[keys >> _BIN_BITS == top] & ((1 << _BIN_BITS) - 1)


def _histogram(keys: torch.Tensor) -> torch.Tensor:
    return torch.bincount(keys, minlength=1 << _BIN_BITS)


def _boundary_bin(histogram: torch.Tensor, n_removed: int) -> tuple[int, int]:
    """Return the bin that holds the ``n_removed``-th smallest key, and how many keys lie below that bin."""
    cumulative = histogram.cumsum(0)
    index = int(torch.searchsorted(cumulative, n_removed, right=False))
    index = min(index, histogram.numel() - 1)
    return index, int(cumulative[index - 1]) if index else 0
