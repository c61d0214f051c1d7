"""One packed weight times any number of rows of x: which kernel multiplies how many.

At most 8 rows (16 of small weights), and up to 64: weight, adapters and bias in one launch (skinny.py, from compute
capability 9.0 on, and fused.py). From 33 on, 17 of large weights, on compute capability 9.0: weights decoded into
registers for asynchronous products (decoded.py). Many: the weight expanded to 16 bits, then cuBLAS (expanded.py).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .compilation import ASYNC_CAPABILITY
from .decoded import DecodedProduct, clusters_of, estimated_us
from .device_layout import BLOCK_ROWS, SLAB_COLUMNS, SlabWeight
from .fused import LARGEST_BATCH, FusedProduct
from .launching import ONE_AT_A_TIME, aligned, uncaptured
from .low_rank import Fragments, Matrices
from .semi_structured import LEAST_ROWS, SemiStructuredProduct, many_rows
from .skinny import LEAST_CAPABILITY as LEAST_SKINNY
from .skinny import NARROW, SkinnyProduct

# Measured on an H100; they choose on every GPU.
#: an expanded product: once (mostly what cuBLAS takes more than by its rates), and to expand one weight, microseconds
_EXPANDED_US, _EXPANSION_US = 13.0, 1.3e-6
#: cuBLAS: bytes and operations a microsecond
_BYTES, _OPERATIONS = 3e6, 8e8
#: a fused product of 33 to 64 rows: what is done once, and a weight of 16 bits or a quantized one, in microseconds
_FUSED_US, _FUSED_WEIGHT_US, _FUSED_QUANTIZED_US = 20.0, 0.48e-6, 0.8e-6
#: rounds of the fused product: with fewer, more rows of x are skinny's, whose fixed costs are less; with more, and
#: values of 16 bits, none are
_FEW_ROUNDS, _MOST_ROUNDS = 5, 40
#: rows of x from which a weight may be decoded: fewer where a thread block of the fused product would have many rounds
_FEWEST_DECODED, _FEWEST_OF_LARGE, _MANY_ROUNDS = 33, 17, 16


@dataclass(frozen=True)
class Facts:
    """What decides which kernel is fastest: of a weight and its adapters, and of the GPU.

    ``most_skinny`` and ``most_decoded``: rows of x that the skinny and the decoding kernel take, 0 where they are not;
    ``fewest_decoded``: from how many it may; ``is_fused``: whether the fused kernel takes the adapters.
    """

    n_row_blocks: int
    n_slabs: int
    clusters: int
    most_skinny: int = 0
    most_decoded: int = 0
    fewest_decoded: int = _FEWEST_DECODED
    is_fused: bool = True
    is_quantized: bool = False


class ProductByRows:
    """y = x W^T + adapters + bias for x (M, x_columns) of any M.

    Args:
        weight: the slabs.
        adapters: in fragment order, or as matrices where they have more ranks than the kernels take; None without.
        bias: (N,), or None.
    """

    def __init__(self, weight: SlabWeight, adapters: Fragments | Matrices | None, bias: torch.Tensor | None) -> None:
        order = adapters if isinstance(adapters, Fragments) else None
        self.weight, self._order = weight, order
        self._has_kernels = not isinstance(adapters, Matrices)
        self._float_bias = None if bias is None else bias.float().contiguous()
        self._fused = FusedProduct(weight, order, self._float_bias)
        self._skinny = SkinnyProduct(weight, order, self._float_bias)
        self.expanded = many_rows(weight, adapters, bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (M, N) of x (M, K) in its dtype."""
        x = aligned(self.weight.padded(x))
        with ONE_AT_A_TIME:
            match self._kernel(x.shape[0]):
                case "skinny":
                    return self._skinny(x)
                case "fused":
                    return self._fused(x)
                case "decoded":
                    return self._decoded(x)
                case _:
                    return self.expanded(x)

    @functools.cached_property
    def _kernel(self) -> Callable[[int], str]:
        return functools.cache(functools.partial(kernel_for, facts=self._facts()))

    def _facts(self) -> Facts:
        weight, device = self.weight, self.weight.slabs.device
        capability = torch.cuda.get_device_capability(device)
        most_skinny = most_decoded = 0
        if self._has_kernels and capability >= LEAST_SKINNY:
            most_skinny = self._most_skinny()
        if self._has_kernels and capability == ASYNC_CAPABILITY:
            most_decoded = LEAST_ROWS - 1 if isinstance(self.expanded, SemiStructuredProduct) else sys.maxsize
        return Facts(
            weight.n_row_blocks, weight.n_slabs, clusters_of(device), most_skinny, most_decoded,
            fewest_decoded=_FEWEST_OF_LARGE if self._fused.rounds >= _MANY_ROUNDS else _FEWEST_DECODED,
            is_fused=self._has_kernels and self._fused.most_rows > 0,
            is_quantized=not weight.encoding.endswith("16"),
        )  # fmt: skip

    def _most_skinny(self) -> int:
        rounds = self._fused.rounds
        if rounds >= _MOST_ROUNDS and self.weight.encoding.endswith("16"):
            return 0
        return self._skinny.most_rows if rounds < _FEW_ROUNDS else self._skinny.rows_of(NARROW)

    @functools.cached_property
    def _decoded(self) -> DecodedProduct:
        with uncaptured(self.weight.slabs.device):
            return DecodedProduct(self.weight, self._order, self._float_bias)


def kernel_for(batch: int, facts: Facts) -> str:
    """Return skinny, fused, decoded or expanded: what is estimated fastest for ``batch`` rows of x.

    Few rows are skinny's where it takes them; up to 64 others only fused, or, from ``fewest_decoded`` on, decoded.
    """
    if not facts.is_fused:
        return "expanded"
    if 0 < batch <= facts.most_skinny:
        return "skinny"
    is_few = batch <= LARGEST_BATCH
    may_decode = facts.fewest_decoded <= batch <= facts.most_decoded
    n_weights = facts.n_row_blocks * facts.n_slabs * BLOCK_ROWS * SLAB_COLUMNS
    dense_us = max(2 * n_weights / _BYTES, 2 * batch * n_weights / _OPERATIONS)
    fused_us = _FUSED_US + n_weights * (_FUSED_QUANTIZED_US if facts.is_quantized else _FUSED_WEIGHT_US)
    times = {"fused": -(-batch // LARGEST_BATCH) * fused_us}
    if not is_few:
        times["expanded"] = dense_us + n_weights * _EXPANSION_US + _EXPANDED_US
    if may_decode:
        times["decoded"] = estimated_us(batch, facts.n_row_blocks, facts.n_slabs, facts.clusters)
    return min(times, key=lambda name: times[name])
