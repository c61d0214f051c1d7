"""Packed experts of a mixture: what transformers holds as two fused 3-D parameters, computed expert by expert.

Invariant: an expert is down(act(gate x) * up x), each product packed. On disk an expert's weights are modules of their
own (gate, up and down under the expert's number) or all experts are stacked; both are loaded under their own names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import product
from .packed_module import PackedModule


class SalrStack(PackedModule):
    """The stacked weight of all experts, (E, N, K)."""

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """Return W[expert] x (..., N) for x (..., K)."""
        return product.linear(x, self.matrices()[expert], None, self.backend)


@dataclass(frozen=True)
class ExpertNames:
    """What the modules below an expert's number are called."""

    gate: str
    up: str
    down: str


class SalrExperts(torch.nn.Module):
    """Replaces the ``experts`` module of a transformers mixture; stacks or single experts are added by name.

    Args:
        n_experts: E.
        activation: of the gate.
        names: of single experts' modules; None for the stacks ``gate_up_proj`` and ``down_proj``.
    """

    def __init__(
        self,
        n_experts: int,
        activation: Callable[[torch.Tensor], torch.Tensor],
        names: ExpertNames | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = n_experts
        self.act_fn = activation
        self.names = names

    def add(self, path: Iterable[str], module: PackedModule) -> None:
        """Put a packed module at its place: ("gate_up_proj",) for a stack, ("3", "w1") for a single expert's."""
        *numbers, leaf = path
        owner: torch.nn.Module = self
        for number in numbers:
            if number not in owner._modules:
                owner.add_module(number, torch.nn.Module())
            owner = owner.get_submodule(number)
        owner.add_module(leaf, module)

    def forward(self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Return the experts' weighted sum (T, H) for hidden (T, H), top_k_index and top_k_weights (T, top_k)."""
        result = torch.zeros_like(hidden)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.num_experts:  # transformers marks a token that another device serves so
                continue
            token, place = torch.where(top_k_index == expert)
            y = self._expert(hidden[token], expert) * top_k_weights[token, place, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result

    def _expert(self, x: torch.Tensor, expert: int) -> Any:
        if self.names is None:
            gate_up, down = self.get_submodule("gate_up_proj"), self.get_submodule("down_proj")
            gate, up = gate_up(x, expert).chunk(2, dim=-1)
            return down(self.act_fn(gate) * up, expert)
        parts: Any = self.get_submodule(str(expert))._modules
        gate, up = parts[self.names.gate](x), parts[self.names.up](x)
        return parts[self.names.down](self.act_fn(gate) * up)

    def extra_repr(self) -> str:
        """Return the number of experts."""
        return f"num_experts={self.num_experts}"


def packed_modules(model: torch.nn.Module) -> Iterable[tuple[str, PackedModule]]:
    """Yield every packed module of a model with its name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedModule))
