"""One packed weight times any number of rows of x: which kernel multiplies how many.

At most 8 rows (16 of small weights), and up to 64: weight, adapters and bias in one launch (skinny.py, from compute
capability 9.0 on, and fused.py). More, on compute capability 9.0: weights decoded into registers for asynchronous
products (decoded.py). Many: the weight expanded to 16 bits, then cuBLAS (expanded.py).
"""

from __future__ import annotations

import functools
import threading

import torch

from .beside import Factors
from .compilation import ASYNC_CAPABILITY
from .decoded import DecodedProduct, clusters_of, estimated_us
from .device_layout import BLOCK_ROWS, SLAB_COLUMNS, SlabWeight
from .fused import FEWEST_ROUNDS, LARGEST_BATCH, FusedProduct, rounds_of_block
from .launching import aligned, uncaptured
from .low_rank import Fragments
from .semi_structured import LEAST_ROWS, SemiStructuredProduct, many_rows
from .skinny import LARGEST_BATCH as LARGEST_SKINNY
from .skinny import LEAST_CAPABILITY as LEAST_SKINNY
from .skinny import SkinnyProduct

#: microseconds of an expanded product beside the products, of a weight's expansion, bytes and operations a microsecond
_EXPANDED_US, _EXPANSION_US, _BYTES, _OPERATIONS = 13.0, 1.3e-6, 3e6, 8e8
#: of a fused product of 33 to 64 rows, and of a weight in it, of 16 bits or quantized
_FUSED_US, _FUSED_WEIGHT_US, _FUSED_QUANTIZED_US = 20.0, 0.48e-6, 0.8e-6
#: rows of x that are skinny's however large the weight is; more only where a thread block of the fused product would
#: have few rounds: its fixed costs are what skinny saves
_SURELY_SKINNY = 8
#: rows of x from which a quantized weight may be decoded; others are fused up to 64
_FEWEST_DECODED = 33
#: arguments of launches and workspaces are shared, so that one thread at a time makes a product
_ONE_AT_A_TIME = threading.Lock()


class ProductByRows:
    """y = x W^T + adapters + bias for x (M, x_columns) of any M.

    Args:
        weight: the slabs.
        order: the adapters in fragment order; None where there are none, or more ranks than the kernels take.
        factors: the adapters for an expanded weight; None without.
        bias: (N,), or None.
    """

    def __init__(
        self, weight: SlabWeight, order: Fragments | None, factors: Factors | None, bias: torch.Tensor | None
    ) -> None:
        self.weight, self._order = weight, order
        self._float_bias = None if bias is None else bias.float().contiguous()
        has_kernels = order is not None or factors is None
        self._fused = FusedProduct(weight, order, self._float_bias) if has_kernels else None
        self.expanded = many_rows(weight, factors, bias)
        device = weight.slabs.device
        self._clusters = clusters_of(device)
        capability = torch.cuda.get_device_capability(device)
        may_be_skinny = has_kernels and capability >= LEAST_SKINNY
        self._skinny = SkinnyProduct(weight, order, self._float_bias) if may_be_skinny else None
        self._most_skinny = LARGEST_SKINNY if rounds_of_block(weight) < FEWEST_ROUNDS else _SURELY_SKINNY
        self._most_decoded = 0
        if has_kernels and capability == ASYNC_CAPABILITY:
            self._most_decoded = LEAST_ROWS - 1 if isinstance(self.expanded, SemiStructuredProduct) else 2**31

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (M, N) of x (M, K), contiguous, in its dtype."""
        x = aligned(self.weight.padded(x))
        with _ONE_AT_A_TIME:
            if self._fused is None:
                return self.expanded(x)
            skinny = self._skinny_for(x.shape[0])
            if skinny is not None:
                return skinny(x, x.new_empty(x.shape[0], self.weight.n_rows))
            kernel = self._kernel(x.shape[0])
            if kernel == "fused":
                return self._fused(x, x.new_empty(x.shape[0], self.weight.n_rows))
            return self._decoded(x) if kernel == "decoded" else self.expanded(x)

    def _skinny_for(self, batch: int) -> SkinnyProduct | None:
        found = self._skinny if 0 < batch <= self._most_skinny else None
        return found if found is not None and batch <= found.most_rows else None

    def _kernel(self, batch: int) -> str:
        weight, may_decode = self.weight, batch <= self._most_decoded
        is_quantized = not weight.encoding.endswith("16")
        return kernel_for(batch, weight.n_row_blocks, weight.n_slabs, self._clusters, may_decode, is_quantized)

    @functools.cached_property
    def _decoded(self) -> DecodedProduct:
        with uncaptured(self.weight.slabs.device):
            return DecodedProduct(self.weight, self._order, self._float_bias)


@functools.cache
def kernel_for(
    batch: int, n_row_blocks: int, n_slabs: int, clusters: int, may_decode: bool, is_quantized: bool = False
) -> str:
    """Return fused, decoded or expanded: what is estimated fastest for ``batch`` rows of x that are not skinny's.

    Up to 64 rows only fused; of quantized weights, also decoded from 33 on.
    """
    is_few = batch <= LARGEST_BATCH
    may_decode = may_decode and (not is_few or (is_quantized and batch >= _FEWEST_DECODED))
    n_weights = n_row_blocks * n_slabs * BLOCK_ROWS * SLAB_COLUMNS
    dense_us = max(2 * n_weights / _BYTES, 2 * batch * n_weights / _OPERATIONS)
    fused_us = _FUSED_US + n_weights * (_FUSED_QUANTIZED_US if is_quantized else _FUSED_WEIGHT_US)
    times = {"fused": -(-batch // LARGEST_BATCH) * fused_us}
    if not is_few:
        times["expanded"] = dense_us + n_weights * _EXPANSION_US + _EXPANDED_US
    if may_decode:
        times["decoded"] = estimated_us(batch, n_row_blocks, n_slabs, clusters)
    return min(times, key=lambda name: times[name])
