"""A linear layer that computes on packed weights.

Invariant: y = W_hat x + adapters + bias, as the file stores them, for any leading batch shape; the weight is never
dense in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.modules.module import _has_any_global_hook

from . import product
from .gradients import TrainedAdapter
from .layout import ModuleLayout
from .packed import PackedWeight
from .packed_module import PackedModule


def is_hooked(module: torch.nn.Module) -> bool:
    """Tell whether a call does more than ``forward``: there are hooks on the module or on all, or accelerate's."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own or "_hf_hook" in vars(module) or _has_any_global_hook())  # type: ignore[no-untyped-call]


class SalrLinear(PackedModule):
    """Replaces a torch.nn.Linear or a transformers Conv1D; ``forward`` takes x (..., K) and returns (..., N).

    Args:
        layout: of a 2-D module.
        bias: a parameter (N,), kept as it is; None without.
        device: of the empty packed tensors.
    """

    bias: torch.nn.Parameter | None

    def __init__(
        self,
        layout: ModuleLayout,
        bias: torch.nn.Parameter | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        super().__init__(layout, device)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor, trained: Sequence[TrainedAdapter] = ()) -> torch.Tensor:
        """Return W x + bias (..., N) in x's dtype, with adapters that are trained and no part of the module."""
        if product.is_transformed():
            y = product.traced(x, self._traced_weight(), self.stacked_adapters(), self.bias, self.backend)
            return product.with_adapters(y, x, trained)
        return product.linear(x, self.matrices()[0], self.bias, self.backend, trained)

    def _traced_weight(self) -> PackedWeight:
        """Return the buffers themselves, so that a traced graph refers to them and not to copies of them."""
        entry = self.entry
        return PackedWeight(
            entry.n_rows, entry.n_columns, entry.nnz, entry.encoding, entry.pattern, self.values, self.bitmap,
            self.row_offsets, self.scales, entry.group_size,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return shape, sparsity, rank, encoding and whether there is a bias."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"
