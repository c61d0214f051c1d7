"""The CUDA backend: y = x W^T + adapters + bias on packed weights.

Invariant: few rows of x go through the fused kernel, many through expanded parts and cuBLAS; what no kernel takes
(float32 activations, unusual groups) is refused by ``takes``, and the caller uses the reference.
"""

from __future__ import annotations

import functools

import torch

from .compilation import LEAST_CAPABILITY
from .device_layout import SlabWeight, Weight, lay_out, reason_not_slabs
from .expanded import ExpandedProduct
from .fused import LARGEST_BATCH, FusedProduct
from .low_rank import LARGEST_RANK, LowRank, fragments

#: up to here, rows go through the fused kernel 64 at a time; measured, docs/kernels.md
CROSSOVER = 256


class PreparedProduct:
    """One weight with its adapters and bias, laid out for products in one dtype."""

    def __init__(self, weight: Weight, adapters: LowRank | None, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.weight: SlabWeight = lay_out(weight, dtype)
        small = adapters is None or adapters.lora_A.shape[0] <= LARGEST_RANK
        order = None if adapters is None or not small else fragments(adapters, dtype)
        wide_bias = None if bias is None else bias.float().contiguous()
        self._fused = FusedProduct(self.weight, order, wide_bias) if small else None
        self._expanded = ExpandedProduct(self.weight, adapters, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (M, N) of x (M, K), contiguous, in its dtype."""
        missing = self.weight.padded_columns - x.shape[1]
        if missing:
            x = torch.nn.functional.pad(x, (0, missing))
        out = x.new_empty(x.shape[0], self.weight.n_rows)
        if self._fused is None or x.shape[0] > CROSSOVER:
            return self._expanded(x, out)
        for start in range(0, x.shape[0], LARGEST_BATCH):
            self._fused(x[start : start + LARGEST_BATCH], out[start : start + LARGEST_BATCH])
        return out


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
