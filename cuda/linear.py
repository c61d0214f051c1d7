"""The CUDA backend: y = x W^T + adapters + bias on packed weights.

Invariant: what no kernel takes (float32 activations, unusual groups) is refused by ``takes``, and the caller uses the
reference. Products of one device must not run on two streams at the same time: thread blocks of a launch wait for each
other, and need all multiprocessors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .by_rows import ProductByRows
from .compilation import LEAST_CAPABILITY
from .device_layout import SlabWeight, Weight, lay_out, reason_not_slabs
from .expanded import ExpandedProduct
from .launching import uncaptured
from .layouts import remember, slabs_of
from .low_rank import LARGEST_RANK, LowRank, fragments, matrices
from .stacking import Layer, Ranks, StackedProduct, reason_not_stacked, split_slabs, stack_slabs


class PreparedProduct(ProductByRows):
    """One weight with its adapters and bias, laid out for products in one dtype."""

    def __init__(
        self, weight: Weight | SlabWeight, adapters: LowRank | None, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        slabs = weight if isinstance(weight, SlabWeight) else lay_out(weight, dtype)
        rank = 0 if adapters is None else adapters.lora_A.shape[0]
        ordered = (fragments if rank <= LARGEST_RANK else matrices)(adapters, dtype) if adapters and rank else None
        super().__init__(slabs, ordered, bias)


@functools.cache
def reason_unusable() -> str | None:
    """Return why no kernel can run on this machine, None where they can."""
    import cupy  # noqa: F401  # its absence is told by the caller

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        name, least = torch.cuda.get_device_name(), ".".join(map(str, LEAST_CAPABILITY))
        return f"{name} has compute capability {capability[0]}.{capability[1]}, the kernels need {least}"
    return None


def takes(weight: Weight, dtype: torch.dtype) -> str | None:
    """Return why a weight cannot be multiplied here in ``dtype``, None where it can."""
    return reason_not_slabs(weight, dtype)


#: the packed tensors may stay in host memory: only their layout is needed on the GPU
KEEPS_PACKED_ON_HOST = True


@dataclass(frozen=True)
class Prepared:
    """A matrix whose products are made ready for each device and dtype when they are first asked for."""

    weight: Weight
    adapters: LowRank | None
    bias: torch.Tensor | None
    _products: dict[tuple[torch.device, torch.dtype], PreparedProduct]

    def product(self, device: torch.device, dtype: torch.dtype) -> PreparedProduct:
        """Return the product for x on a device in a dtype."""
        found = self._products.get((device, dtype))
        if found is None:
            with uncaptured(device):
                layer = _layer(self.weight, self.adapters, self.bias, dtype, device)
                found = PreparedProduct(layer.weight, layer.adapters, layer.bias, dtype)
            self._products[device, dtype] = found
        return found


def prepare(weight: Weight, adapters: LowRank | None, bias: torch.Tensor | None) -> Prepared:
    """Return a matrix for ``apply``; nothing is laid out before the first x comes."""
    return Prepared(weight, adapters, bias, {})


def apply(prepared: Prepared, x: torch.Tensor) -> torch.Tensor:
    """Return x W^T + adapters + bias (M, N) in x's dtype for x (M, K), contiguous."""
    return prepared.product(x.device, x.dtype)(x)


def train(prepared: Prepared, device: torch.device, dtype: torch.dtype) -> ExpandedProduct:
    """Return what gradients flow through, for x on a device in a dtype."""
    return prepared.product(device, dtype).expanded


def linear(
    x: torch.Tensor, weight: Weight, adapters: LowRank | None = None, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return x W^T + adapters + bias (M, N) in x's dtype for x (M, K); the weight is laid out once."""
    return apply(prepare(weight, adapters, bias), x.contiguous())


@torch.no_grad()
def stack(
    weights: Sequence[Weight],
    adapters: Sequence[LowRank | None],
    biases: Sequence[torch.Tensor | None],
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return the product of x (M, K) with all weights, (M, N_0 + N_1 + ...), or None where they cannot be stacked.

    Each weight's own products use its part of the stacked layout from then on.
    """
    if any(takes(weight, dtype) for weight in weights):
        return None
    layers = [
        _layer(weight, own, bias, dtype, device) for weight, own, bias in zip(weights, adapters, biases, strict=True)
    ]
    if reason_not_stacked(layers):
        return None
    stacked = stack_slabs([layer.weight for layer in layers])
    parts = split_slabs(stacked, [layer.weight.n_rows for layer in layers])
    for weight, part in zip(weights, parts, strict=True):
        remember(weight, part)
    layers = [Layer(part, layer.adapters, layer.bias) for part, layer in zip(parts, layers, strict=True)]
    return StackedProduct(layers, stacked)


def _layer(
    weight: Weight, adapters: LowRank | None, bias: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> Layer:
    """Return a matrix laid out on a device, with its adapters and bias there."""
    if adapters is not None:
        adapters = Ranks(adapters.lora_A.to(device), adapters.lora_B.to(device), adapters.scaling.to(device))
    return Layer(slabs_of(weight, dtype, device), adapters, None if bias is None else bias.detach().to(device))
