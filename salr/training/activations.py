"""The largest singular value of each layer's inputs, by power iteration over passes of the model.

Invariant: no activations are kept: a pass adds up X^T (X v) for every layer at once, K numbers a layer; the model is
left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..formats.errors import OptionError
from .packed_model import inner_model

MOST_PASSES = 30
_TOLERANCE = 1e-3

Tensor = torch.Tensor


class _Iteration:
    """One layer's vector v (K,), of length 1, and the sum of X^T (X v) so far."""

    def __init__(self) -> None:
        self.vector: Tensor | None = None
        self.total: Tensor | None = None
        self.value = 0.0

    def add(self, x: Tensor, mask: Tensor | None) -> None:
        """Count the inputs x (..., K) of one call; ``mask`` (...) leaves out what is 0."""
        rows = x[mask.bool()] if mask is not None and mask.shape == x.shape[:-1] else x.reshape(-1, x.shape[-1])
        rows = rows.detach().float()
        if self.vector is None or self.total is None:
            generator = torch.Generator().manual_seed(0)
            start = torch.randn(x.shape[-1], generator=generator).to(x.device)
            self.vector, self.total = start / start.norm(), torch.zeros_like(start)
        self.total += (rows @ self.vector) @ rows

    def turn(self) -> bool:
        """End a pass; tell whether the value has settled."""
        if self.total is None:
            return True
        before, self.value = self.value, float(self.total.norm())
        if not self.value:
            return True
        self.vector, self.total = self.total / self.value, torch.zeros_like(self.total)
        return abs(self.value - before) <= _TOLERANCE * self.value


def largest_singular_values(
    model: Any, layers: Sequence[str], batches: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return sigma_max of each layer's inputs X (tokens, K), all batches together; 0 where the layer gets none.

    Args:
        layers: names in the transformers model.
        batches: inputs of the model; ``attention_mask`` leaves tokens out.

    Raises:
        OptionError: an activation is not finite.
    """
    inner = inner_model(model)
    device = next(inner.parameters()).device
    iterations = {name: _Iteration() for name in layers}
    with _watched(inner, iterations) as show, torch.no_grad():
        for _ in range(MOST_PASSES):
            for batch in batches:
                moved = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
                show(moved.get("attention_mask"))
                inner(**moved)
            if all([iteration.turn() for iteration in iterations.values()]):
                break
    for name, iteration in iterations.items():
        if not iteration.value < float("inf"):
            raise OptionError("an activation is not finite", tensor=name, fix="give a residual_lr")
    return {name: iteration.value**0.5 for name, iteration in iterations.items()}


@contextmanager
def _watched(model: Any, iterations: Mapping[str, _Iteration]) -> Iterator[Any]:
    """Hook the layers and put the model into evaluation mode; yield what sets the mask of the next batch."""
    masks: list[Tensor | None] = [None]

    def watch(iteration: _Iteration) -> Any:
        return lambda module, inputs: iteration.add(inputs[0], masks[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(i)) for name, i in iterations.items()]
    was_training = model.training
    model.eval()
    try:
        yield lambda mask: masks.__setitem__(0, mask)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
