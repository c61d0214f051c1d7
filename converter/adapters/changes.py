"""What adapters do to a tensor of the base: replace it or rows of it, add to it, rescale it.

Invariant: everything is computed in float32 from the tensors as they are on disk, a part at a time and with one
thread, so that it gives the same bits wherever it is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from ..execution.threads import one_thread
from ..sources.checkpoint import SourceTensor, parts_of

_Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Update:
    """A low-rank update scaling * lora_B lora_A of one matrix, with DoRA's magnitudes (N,) or None, in float32.

    ``is_folded``: it becomes a part of the tensor; otherwise it stays a pair of factors.
    """

    lora_A: Callable[[], torch.Tensor]
    lora_B: Callable[[], torch.Tensor]
    scaling: float
    magnitude: Callable[[], torch.Tensor] | None
    is_folded: bool


@dataclass
class TensorChange:
    """All changes of one tensor of the base, whose rows in float32 ``source`` gives.

    A transposed tensor is (K, N), as Conv1D and embeddings are to a LoRA. ``dtype`` is what the result is stored in.
    """

    tensor: SourceTensor
    dtype: str
    transposed: bool
    source: _Rows
    replaced_by: str | None = None
    token_rows: dict[int, Callable[[], torch.Tensor]] = field(default_factory=dict)
    updates: list[Update] = field(default_factory=list)
    additions: list[Callable[[], torch.Tensor]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Return a part of the changed tensor along its first dimension, in float32."""
        part = self.source(start, stop).float()
        inside = [index for index in self.token_rows if start <= index < stop]
        if inside or self.additions:
            part = part.clone()
        for index in inside:
            part[index - start] = self.token_rows[index]()
        with one_thread():
            if self.updates:
                part = self._updated(part, start, stop)
            for addition in self.additions:
                part += addition()[start:stop]
        return part

    def gain(self) -> torch.Tensor:
        """Return magnitude / |W + scaling B A| of each of the N rows; a DoRA is the first of the updates."""
        gain = self._gains[0]
        assert gain is not None
        return gain

    def _updated(self, part: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        gains = {index: gain for index, gain in enumerate(self._gains) if gain is not None}
        result = part * self._along(gains[0], start, stop) if 0 in gains else part.clone()
        for index, update in enumerate(self.updates):
            if update.is_folded:
                delta = self._delta(update, start, stop)
                result += delta * self._along(gains[index], start, stop) if index in gains else delta
        return result

    def _along(self, gain: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return a vector (N,) in the shape that multiplies rows ``start`` to ``stop`` of the tensor."""
        return gain[None, :] if self.transposed else gain[start:stop, None]

    def _delta(self, update: Update, start: int, stop: int) -> torch.Tensor:
        lora_a, lora_b = update.lora_A(), update.lora_B()
        if self.transposed:
            return update.scaling * (lora_a[:, start:stop].T @ lora_b.T)
        return update.scaling * (lora_b[start:stop] @ lora_a)

    @cached_property
    def _gains(self) -> list[torch.Tensor | None]:
        return [self._gain(update) if update.magnitude is not None else None for update in self.updates]

    def _gain(self, update: Update) -> torch.Tensor:
        assert update.magnitude is not None
        norms = []
        with one_thread():
            for start, stop in parts_of(self.tensor):
                weight = self.source(start, stop).double() + self._delta(update, start, stop).double()
                norms.append(weight.square().sum(0 if self.transposed else 1))
            squared = torch.stack(norms).sum(0) if self.transposed else torch.cat(norms)
            return (update.magnitude().double() / squared.sqrt()).float()
