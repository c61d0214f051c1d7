"""Products that gradients flow through: the weight is decoded for the backward pass and dropped with it.

Invariant: no dense weight outlives the pass it was decoded for. Where activation checkpointing runs a forward pass
again inside the backward pass, what it decodes serves the gradient that follows at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from . import reference
from .packed import Adapters, PackedWeight

Tensor = torch.Tensor


class Trainable(Protocol):
    """A product made ready, and its gradient; what ``decode`` returns is its own affair."""

    @property
    def decoded_like(self) -> Tensor:
        """A tensor of the shape and dtype, on the device, that ``decode`` returns; its strides may be 0."""
        ...

    def decode(self) -> Tensor:
        """Return the weight, dense."""
        ...

    def multiply(self, x: Tensor, decoded: Tensor | None) -> Tensor:
        """Return y (M, N) for x (M, K); ``decoded`` where there is one already."""
        ...

    def input_gradient(self, gradient: Tensor, decoded: Tensor) -> Tensor:
        """Return the gradient of x (M, K) for that of y (M, N)."""
        ...


class DecodedInFloat:
    """The gradient of any backend's product: the reference's dense weight, in float32."""

    def __init__(self, run: Callable[[Tensor], Tensor], weight: PackedWeight, adapters: Adapters | None) -> None:
        self._run, self._weight, self._adapters = run, weight, adapters

    @property
    def decoded_like(self) -> Tensor:
        """One float32 zero in the weight's shape (N, K)."""
        return torch.zeros((), device=self._weight.values.device).expand(self._weight.n_rows, self._weight.n_columns)

    def decode(self) -> Tensor:
        """Return the kept weights (N, K) float32."""
        return reference.dense(self._weight)

    def multiply(self, x: Tensor, decoded: Tensor | None) -> Tensor:
        """Return the backend's own product."""
        return self._run(x)

    def input_gradient(self, gradient: Tensor, decoded: Tensor) -> Tensor:
        """Return gradient times W + B A, computed in float32."""
        wide = gradient.float()
        result = wide @ decoded
        if self._adapters is not None:
            own = self._adapters
            result += ((wide @ own.lora_B.float()) * own.scaling) @ own.lora_A.float()
        return result.to(gradient.dtype)


def differentiable(x: Tensor, trainable: Trainable) -> Tensor:
    """Return y (M, N) for x (M, K); gradients flow to x."""
    y: Tensor = _Differentiable.apply(x, trainable)  # type: ignore[no-untyped-call]
    return y


class _Differentiable(torch.autograd.Function):
    """Saves no weight in a first forward pass, and the decoded one in a repeated one.

    Checkpointing compares the shapes of what both passes save, and hands the second pass's tensors to the first one's
    backward: hence a placeholder of the same shape, and a tensor that says which of the two it is.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trainable: Trainable) -> Tensor:
        is_repeated = torch._C._current_graph_task_id() != -1
        decoded = trainable.decode() if is_repeated else None
        ctx.trainable = trainable
        ctx.save_for_backward(trainable.decoded_like if decoded is None else decoded, torch.tensor(is_repeated))
        return trainable.multiply(x, decoded)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        decoded, is_decoded = ctx.saved_tensors
        trainable: Trainable = ctx.trainable
        return trainable.input_gradient(gradient, decoded if is_decoded else trainable.decode()), None
