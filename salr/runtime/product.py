"""The packed product as one torch operator, ``salr::linear``, and the direct way past it.

Invariant: in eager mode without gradients the backend is called directly, because an operator costs some 20 us a call
on the host. Traced (torch.compile, torch.export, fake tensors) and with gradients the operator is called: it is opaque,
has a fake, and its backward decodes the weight anew, so that no dense copy outlives it.
"""

from __future__ import annotations

import torch

from . import reference
from .backends import backend_for
from .matrix import Matrix
from .packed import Adapters, PackedWeight

Tensor = torch.Tensor


def linear(x: Tensor, matrix: Matrix, bias: Tensor | None, backend: str | None = None) -> Tensor:
    """Return x W^T + adapters + bias (..., N) in x's dtype for x (..., K), by ``backend`` or the device's own.

    Gradients flow to x and to bias; weight and adapters are constants.
    """
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if wants_gradient or type(x) is not Tensor or torch.compiler.is_compiling():
        return traced(x, matrix.weight, matrix.adapters, bias, backend)
    rows = _rows(x, matrix.weight)
    if not rows.numel():
        return x.new_zeros((*x.shape[:-1], matrix.weight.n_rows))
    return matrix.product(x.device, x.dtype, bias, backend)(rows).view(*x.shape[:-1], matrix.weight.n_rows)


def traced(
    x: Tensor, weight: PackedWeight, adapters: Adapters | None, bias: Tensor | None, backend: str | None = None
) -> Tensor:
    """Return what ``linear`` returns, through the operator."""
    factors = (None, None, None) if adapters is None else (adapters.lora_A, adapters.lora_B, adapters.scaling)
    tensors = weight.values, weight.bitmap, weight.row_offsets, weight.scales, *factors
    facts = weight.n_rows, weight.n_columns, weight.nnz, weight.encoding, weight.pattern, weight.group_size
    y: Tensor = torch.ops.salr.linear(x, *tensors, *facts, backend)
    return y if bias is None else y + bias.to(y.dtype)


def _rows(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return x as (M, K), contiguous."""
    if x.shape[-1] != weight.n_columns:
        raise ValueError(f"x has {x.shape[-1]} columns, the weight {weight.n_columns}")
    return x.reshape(-1, weight.n_columns).contiguous()


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
    return chosen.product(weight, adapters, None, x.device, x.dtype)(rows).view(shape)


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
) -> Tensor:
    """Return gradient (..., N) times W + B A, (..., K): the weight is decoded, used and dropped."""
    facts = n_rows, n_columns, nnz, encoding, pattern
    weight = _packed(facts, values, bitmap, row_offsets, scales, group_size)
    wide = gradient.reshape(-1, n_rows).float()
    result = wide @ reference.dense(weight.to(gradient.device))
    adapters = _adapters(lora_A, lora_B, scaling)
    if adapters is not None:
        adapters = adapters.to(gradient.device)
        result += ((wide @ adapters.lora_B.float()) * adapters.scaling) @ adapters.lora_A.float()
    return result.to(gradient.dtype).view(*gradient.shape[:-1], n_columns)


@_input_gradient.register_fake
def _(gradient: Tensor, values: Tensor, *rest: object) -> Tensor:
    n_columns = rest[7]
    assert isinstance(n_columns, int)
    return gradient.new_empty((*gradient.shape[:-1], n_columns))


def _remember(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    _, *rest = inputs
    ctx.save_for_backward(*rest[:7])  # type: ignore[attr-defined]
    ctx.facts = rest[7:13]  # type: ignore[attr-defined]


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
