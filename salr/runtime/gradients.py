"""Products that gradients flow through, with the adapters that train beside them: one node of autograd for a layer.

Invariant: the weight is decoded for the backward pass, and no dense weight outlives the pass it was decoded for, also
where that fails. Where activation checkpointing runs a forward pass again inside the backward pass, what it decodes
serves the gradient that follows at once. No more than the newest ``MOST_HELD`` weights are held, however much is
repeated (a whole model, or the outer one of nested checkpoints); the others are decoded again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch

from . import reference
from .packed import Adapters, PackedWeight

Tensor = torch.Tensor
#: lora_A (r, K), lora_B (N, r) and scaling of an adapter that trains beside a packed product
TrainedAdapter = tuple[Tensor, Tensor, float]
#: rows of x from which several adapters are concatenated: y is read and written once, for more work of the host
MANY_ROWS = 4096
#: dense weights that a backward pass holds for gradients to come: a decoder layer's are 7
MOST_HELD = 8


class Trainable(Protocol):
    """A product made ready, and its gradient; what ``decode`` returns is its own affair.

    The caller may write to what ``multiply`` and ``input_gradient`` return.
    """

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


def differentiable(x: Tensor, trainable: Trainable, adapters: Sequence[TrainedAdapter] = ()) -> Tensor:
    """Return the product and its adapters' (..., N) for x (..., K), in x's dtype; gradients flow to x and the factors.

    Factors of another dtype are cast to x's, and their gradients back.
    """
    factors, scalings = factors_of(adapters)
    y: Tensor = _apply(x, trainable, scalings, *factors)  # type: ignore[no-untyped-call]
    return y


def factors_of(adapters: Sequence[TrainedAdapter]) -> tuple[list[Tensor], list[float]]:
    """Return A, B of each adapter, one after the other, and the scalings."""
    return [factor for a, b, _ in adapters for factor in (a, b)], [scaling for *_, scaling in adapters]


def add_low_rank(y: Tensor, x: Tensor, factors: Sequence[Tensor], scalings: Sequence[float]) -> list[Tensor]:
    """Add each scaling * B (A x) to y (M, N), in place, for x (M, K).

    Args:
        factors: A (r, K), B (N, r) of each adapter.

    Returns:
        A, B and u = A x (M, r) of each adapter, in x's dtype.
    """
    used: list[Tensor] = []
    for a, b in zip(factors[::2], factors[1::2], strict=True):
        used += _inner(x, a, b)
    if len(scalings) > 1 and y.shape[0] >= MANY_ROWS:
        scaled = [b * scaling for b, scaling in zip(used[1::3], scalings, strict=True)]
        y.addmm_(torch.cat(used[2::3], 1), torch.cat(scaled, 1).mT)
    else:
        for b, u, scaling in zip(used[1::3], used[2::3], scalings, strict=True):
            y.addmm_(u, b.mT, alpha=scaling)
    return used


def _inner(x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A and B in x's dtype, and u."""
    if a.dtype != x.dtype or b.dtype != x.dtype:
        a, b = a.to(x.dtype), b.to(x.dtype)
    return a, b, torch.nn.functional.linear(x, a)


class _Differentiable(torch.autograd.Function):
    """A product and its adapters as one node; ``factors`` are A, B of each.

    Few tensors are saved, since each one costs the host as much as two launches where checkpointing sees it: where
    someone sees saved tensors it is x alone, in whatever pass. The rest is handed over or computed again. An x that was
    changed in place is told; in a checkpoint that is not reentrant, where torch does not look, only if something was
    handed over.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trainable: Trainable, scalings: Sequence[float], *factors: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()  # torch's message about a changed view is another
        repeating = torch._C._current_graph_task_id()
        decoded = trainable.decode() if repeating != _NO_PASS and ctx.needs_input_grad[0] else None
        y = trainable.multiply(rows, decoded)
        used = add_low_rank(y, rows, factors, scalings)
        ctx.trainable, ctx.scalings, ctx.factors, ctx.repeating = trainable, scalings, factors, repeating
        ctx.versions = [factor._version for factor in factors]
        saved = rows if factors else _NOTHING
        if repeating != _NO_PASS:
            ctx.save_for_backward(saved)
            _hand_over(ctx, saved, decoded, used)
        elif _hooks(False) is not None:
            ctx.save_for_backward(saved)
        else:
            ctx.save_for_backward(saved, *used)
        return y if x.ndim == 2 else y.contiguous().resize_(*x.shape[:-1], y.shape[1])  # a view could not be changed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        compute = _once if torch.is_grad_enabled() else _gradients
        kind = gradient.device.type
        if not torch.is_autocast_enabled(kind):
            return compute(ctx, gradient)
        torch.set_autocast_enabled(kind, False)
        try:
            return compute(ctx, gradient)
        finally:
            torch.set_autocast_enabled(kind, True)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of x and, by adapter, of A and B, where they are needed."""
    needs_x, _, _, *needs = ctx.needs_input_grad
    rows = gradient.reshape(-1, gradient.shape[-1])
    x, decoded, used = _from_forward(ctx)
    of_x: Tensor | None = None
    if needs_x:
        of_x = ctx.trainable.input_gradient(rows, ctx.trainable.decode() if decoded is None else decoded)
    found: list[Tensor | None] = [None] * len(needs)
    for i, scaling in enumerate(ctx.scalings):
        (a, b, u), needs_a, needs_b = used[3 * i : 3 * i + 3], needs[2 * i], needs[2 * i + 1]
        if needs_x or needs_a:
            of_u = rows @ b
        if of_x is not None:
            of_x.addmm_(of_u, a, alpha=scaling)
        if needs_a:
            found[2 * i] = torch.addmm(a, of_u.mT, x, beta=0, alpha=scaling)
        if needs_b:
            found[2 * i + 1] = torch.addmm(b, rows.mT, u, beta=0, alpha=scaling)
    if of_x is not None and gradient.ndim != 2:
        of_x = of_x.reshape(*gradient.shape[:-1], of_x.shape[1])
    return of_x, None, None, *found


# not Function.apply: it costs as much again, for torch.func, which does not come here
_apply = super(torch.autograd.Function, _Differentiable).apply
_once = torch.autograd.function.once_differentiable(_gradients)
#: who sees saved tensors; before torch 2.8 it cannot be told, and someone may
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
_NOTHING = torch.empty(0)
_NO_PASS = -1

#: A, B, u of each adapter
_Used = Sequence[Tensor]


@dataclass(eq=False, slots=True)
class _Call:
    """What a layer's forward pass, repeated in a backward pass, was given and found."""

    trainable: Trainable
    x: Tensor
    version: int
    factors: list[int]
    decoded: Tensor | None
    used: _Used

    def is_of(self, ctx: Any, x: Tensor) -> bool:
        """Tell whether a node's call was this one: checkpointing gives it tensors of the repeated one, no more.

        Raises:
            RuntimeError: x was changed since.
        """
        if self.x.data_ptr() != x.data_ptr() or self.x.shape != x.shape:
            return False
        if self.version != x._version:
            raise RuntimeError("the input of a packed layer was changed in place; compute a new tensor instead")
        return self.factors == [*map(id, ctx.factors)]


#: by backward pass, which alone holds its calls: they end with it, or where it fails
_handed_over: WeakValueDictionary[int, deque[_Call]] = WeakValueDictionary()


def _hand_over(ctx: Any, x: Tensor, decoded: Tensor | None, used: _Used) -> None:
    held = _handed_over.get(ctx.repeating)
    if held is None:
        held = _handed_over[ctx.repeating] = deque(maxlen=MOST_HELD)
        torch.autograd.Variable._execution_engine.queue_callback(held.clear)
    held.append(_Call(ctx.trainable, x, x._version, [*map(id, ctx.factors)], decoded, used))


def _taken(ctx: Any) -> _Call | None:
    """Take the newest call of a node's layer: gradients come in reverse order."""
    backward_pass = torch._C._current_graph_task_id() if ctx.repeating == _NO_PASS else ctx.repeating
    held = _handed_over.get(backward_pass)
    if held is None:
        return None
    for call in reversed(tuple(held)):
        if call.trainable is ctx.trainable:
            with contextlib.suppress(ValueError):  # the thread of another device pushed it out
                held.remove(call)
            return call
    return None


def _from_forward(ctx: Any) -> tuple[Tensor, Tensor | None, _Used]:
    """Return x (M, K), the decoded weight or None, and A, B, u of each adapter.

    Raises:
        RuntimeError: the factors are not those of the forward pass.
    """
    x, *used = ctx.saved_tensors  # here checkpointing repeats the forward pass
    if used:
        return x, None, used
    if ctx.versions != [factor._version for factor in ctx.factors]:
        raise RuntimeError("factors of an adapter were changed in place between the forward and the backward pass")
    call = _taken(ctx)
    if call is not None and call.is_of(ctx, x):
        return x, call.decoded, call.used
    pairs = zip(ctx.factors[::2], ctx.factors[1::2], strict=True)
    return x, None if call is None else call.decoded, [tensor for a, b in pairs for tensor in _inner(x, a, b)]
