"""The packed product as one torch operator, ``salr::linear``, and the direct way past it.

Invariant: in eager mode the backend is called directly, because an operator costs some 20 us a call on the host. Traced
(torch.compile, torch.export, fake tensors) the operator is called: it is opaque, has a fake, and its backward decodes
the weight anew. Under autocast x is cast as torch.nn.functional.linear casts it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .backends import backend_for
from .gradients import TrainedAdapter, add_low_rank, differentiable, factors_of
from .matrix import Matrix
from .packed import Adapters, PackedWeight

Tensor = torch.Tensor
_AUTOCAST = ("cpu", "cuda")


def linear(
    x: Tensor, matrix: Matrix, bias: Tensor | None, backend: str | None = None, trained: Sequence[TrainedAdapter] = ()
) -> Tensor:
    """Return x W^T + adapters + bias (..., N) in x's dtype for x (..., K), by ``backend`` or the device's own.

    Gradients flow to x, to bias and to the factors of ``trained``; weight and adapters of the matrix are constants.
    """
    if type(x) is not Tensor or is_transformed():
        return with_adapters(traced(x, matrix.weight, matrix.adapters, bias, backend), x, trained)
    kind = x.device.type
    if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
        torch.set_autocast_enabled(kind, False)  # a context manager costs as much as a product
        try:
            return linear(x.to(torch.get_autocast_dtype(kind)), matrix, bias, backend, trained)
        finally:
            torch.set_autocast_enabled(kind, True)
    has_gradients = torch.is_grad_enabled()
    if has_gradients and bias is not None and bias.requires_grad:
        y = linear(x, matrix, None, backend, trained)
        return y + bias.to(y.dtype)
    weight = matrix.weight
    if x.shape[-1] != weight.n_columns:
        raise _wrong_columns(x, weight)
    if not x.numel():
        return with_adapters(x @ x.new_zeros(()).expand(weight.n_columns, weight.n_rows), x, trained)
    product = matrix.product(x.device, x.dtype, bias, backend)
    if has_gradients and (x.requires_grad or any(a.requires_grad or b.requires_grad for a, b, _ in trained)):
        return differentiable(x, product.trainable(), trained)
    rows = x.reshape(-1, weight.n_columns).contiguous()
    y = product.run(rows)
    if trained:
        add_low_rank(y, rows, *factors_of(trained))
    return y.view(*x.shape[:-1], weight.n_rows)


def is_transformed() -> bool:
    """Tell whether torch.compile or torch.func sees what is computed, so that nothing of it may be kept.

    Raises:
        NotImplementedError: a forward-mode derivative is wanted, of which the operator would know nothing.
    """
    if torch.compiler.is_compiling():
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    transforms = torch._C._functorch
    if any(level.key() == transforms.TransformType.Jvp for level in transforms.get_interpreter_stack()):
        raise NotImplementedError(
            "packed products have no forward-mode derivative; use reverse mode (torch.autograd.grad)"
        )
    return True


def with_adapters(y: Tensor, x: Tensor, adapters: Sequence[TrainedAdapter]) -> Tensor:
    """Return y (..., N) + B (A x) of all adapters in y's dtype for x (..., K), in torch's own operations.

    All adapters are two products, concatenated along the rank, in x's dtype, as peft's own layers under autocast.
    """
    if not adapters:
        return y
    lora_a = _joined([a for a, _, _ in adapters], 0).to(x.dtype)
    lora_b = _joined([b if scaling == 1 else b * scaling for _, b, scaling in adapters], 1).to(x.dtype)
    inner = torch.nn.functional.linear(x, lora_a)
    if torch.is_autocast_enabled(x.device.type) or y.dtype != x.dtype:
        return y + torch.nn.functional.linear(inner, lora_b).to(y.dtype)
    rows = y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1])
    return torch.addmm(*rows, lora_b.mT).view(y.shape)


def _joined(factors: list[Tensor], dim: int) -> Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(factors, dim)


def autocast(x: Tensor) -> Tensor:
    """Return x in the dtype that autocast asks for."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if kind in _AUTOCAST and torch.is_autocast_enabled(kind) else x


def traced(
    x: Tensor, weight: PackedWeight, adapters: Adapters | None, bias: Tensor | None, backend: str | None = None
) -> Tensor:
    """Return what ``linear`` returns, through the operator."""
    x = autocast(x)
    factors = (None, None, None) if adapters is None else (adapters.lora_A, adapters.lora_B, adapters.scaling)
    tensors = weight.values, weight.bitmap, weight.row_offsets, weight.scales, *factors
    facts = weight.n_rows, weight.n_columns, weight.nnz, weight.encoding, weight.pattern, weight.group_size
    y: Tensor = torch.ops.salr.linear(x, *tensors, *facts, backend)
    return y if bias is None else y + bias.to(y.dtype)


def _rows(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return x as (M, K), contiguous."""
    if x.shape[-1] != weight.n_columns:
        raise _wrong_columns(x, weight)
    return x.reshape(-1, weight.n_columns).contiguous()


def _wrong_columns(x: Tensor, weight: PackedWeight) -> ValueError:
    return ValueError(f"x has {x.shape[-1]} columns, the weight {weight.n_columns}")


@torch.library.custom_op("salr::linear", mutates_args=())
def _linear(
    x: Tensor,
    values: Tensor,
    bitmap: Tensor | None,
    row_offsets: Tensor | None,
    scales: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: Tensor | None,
    n_rows: int,
    n_columns: int,
    nnz: int,
    encoding: str,
    pattern: str,
    group_size: int | None,
    backend: str | None,
) -> Tensor:
    facts = n_rows, n_columns, nnz, encoding, pattern
    weight = _packed(facts, values, bitmap, row_offsets, scales, group_size)
    rows, shape = _rows(x, weight), (*x.shape[:-1], n_rows)
    if not rows.numel():
        return x.new_zeros(shape)
    chosen, adapters = backend_for(x.device.type, backend), _adapters(lora_A, lora_B, scaling)
    if chosen.takes is None and weight.values.device == x.device:
        return chosen.linear(rows, weight, adapters, None).view(shape)
    return chosen.product(weight, adapters, None, x.device, x.dtype).run(rows).view(shape)


@_linear.register_fake
def _(x: Tensor, values: Tensor, *rest: object) -> Tensor:
    n_rows = rest[6]
    assert isinstance(n_rows, int)
    return x.new_empty((*x.shape[:-1], n_rows))


@torch.library.custom_op("salr::input_gradient", mutates_args=())
def _input_gradient(
    gradient: Tensor,
    values: Tensor,
    bitmap: Tensor | None,
    row_offsets: Tensor | None,
    scales: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: Tensor | None,
    n_rows: int,
    n_columns: int,
    nnz: int,
    encoding: str,
    pattern: str,
    group_size: int | None,
    backend: str | None,
) -> Tensor:
    """Return gradient (..., N) times W + B A, (..., K): the weight is decoded, used and dropped."""
    facts = n_rows, n_columns, nnz, encoding, pattern
    weight, rows = _packed(facts, values, bitmap, row_offsets, scales, group_size), gradient.reshape(-1, n_rows)
    shape = (*gradient.shape[:-1], n_columns)
    if not rows.numel():
        return gradient.new_zeros(shape)
    adapters = _adapters(lora_A, lora_B, scaling)
    product = backend_for(gradient.device.type, backend).product(
        weight, adapters, None, gradient.device, gradient.dtype
    )
    trainable = product.trainable()
    return trainable.input_gradient(rows.contiguous(), trainable.decode()).contiguous().view(shape)


@_input_gradient.register_fake
def _(gradient: Tensor, values: Tensor, *rest: object) -> Tensor:
    n_columns = rest[7]
    assert isinstance(n_columns, int)
    return gradient.new_empty((*gradient.shape[:-1], n_columns))


def _remember(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    _, *rest = inputs
    ctx.save_for_backward(*rest[:7])  # type: ignore[attr-defined]
    ctx.facts = rest[7:14]  # type: ignore[attr-defined]


def _backward(ctx: object, gradient: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    return torch.ops.salr.input_gradient(gradient, *saved, *ctx.facts), *(None,) * 14  # type: ignore[attr-defined]


_linear.register_autograd(_backward, setup_context=_remember)


def _adapters(lora_a: Tensor | None, lora_b: Tensor | None, scaling: Tensor | None) -> Adapters | None:
    return None if lora_a is None or lora_b is None or scaling is None else Adapters(lora_a, lora_b, scaling)


def _packed(
    facts: tuple[int, int, int, str, str],
    values: Tensor,
    bitmap: Tensor | None,
    row_offsets: Tensor | None,
    scales: Tensor | None,
    group_size: int | None,
) -> PackedWeight:
    """Wrap stored tensors: the file's uint64 offsets are viewed as the int64 that kernels index with."""
    offsets = None if row_offsets is None else row_offsets.view(torch.int64)
    return PackedWeight(*facts, values, bitmap, offsets, None if scales is None else scales.float(), group_size)
