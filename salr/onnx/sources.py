"""Where the tensors of an exported graph come from: read when they are written, one at a time.

Invariant: shape and dtype of a source are those of what ``read`` returns; the sources of a packed module together
compute what the module computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..formats.manifest import RESIDUAL, AdapterEntry
from ..runtime import reference
from ..runtime.linear import SalrLinear
from ..runtime.matrix import concatenated


@dataclass(frozen=True)
class Source:
    """A tensor to be: an initializer of the graph."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> Source:
        """Return the source of a tensor that is there."""
        return Source(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def packed_sources(linear: SalrLinear, adapters: Iterable[AdapterEntry]) -> dict[str, Source]:
    """Return the inputs of the node that computes ``linear`` with ``adapters``, by role, without x."""
    tensors = {name: getattr(linear, name) for name in ("bitmap", "values", "row_offsets", "scales")}
    found = {role: Source.of(tensor) for role, tensor in tensors.items() if tensor is not None}
    chosen = list(adapters)
    return found | (_factor_sources(linear, chosen) if chosen else {})


def adapter_sources(linear: SalrLinear, adapters: Iterable[AdapterEntry], dtype: torch.dtype) -> dict[str, Source]:
    """Return adapter_A (K, R) and adapter_B (R, N) with y += (x A) B: transposed, and the scaling folded into B."""
    chosen = list(adapters)
    rank = sum(adapter.rank for adapter in chosen)

    def down() -> torch.Tensor:
        return _factor(linear, "factor_A", chosen).to(dtype).T.contiguous()

    def up() -> torch.Tensor:
        scaled = _factor(linear, "factor_B", chosen).float() * _scaling(linear, chosen)
        return scaled.T.contiguous().to(dtype)

    return {
        "adapter_A": Source((linear.in_features, rank), dtype, down),
        "adapter_B": Source((rank, linear.out_features), dtype, up),
    }


def dense_sources(linear: SalrLinear, adapters: Iterable[AdapterEntry], dtype: torch.dtype) -> dict[str, Source]:
    """Return weight (K, N), decoded with ``adapters`` added in float32 when it is read."""
    chosen = list(adapters)

    def weight() -> torch.Tensor:
        dense = reference.dense(linear.matrices()[0].weight)
        if chosen:
            scaled = _factor(linear, "factor_B", chosen).float() * _scaling(linear, chosen)
            dense += scaled @ _factor(linear, "factor_A", chosen).float()
        return dense.T.contiguous().to(dtype)

    return {"weight": Source((linear.in_features, linear.out_features), dtype, weight)}


def trained_adapters(linear: SalrLinear) -> list[AdapterEntry]:
    """Return a module's adapters but for the residual."""
    return [adapter for adapter in linear.entry.adapters if adapter.name != RESIDUAL]


def residual_adapters(linear: SalrLinear) -> list[AdapterEntry]:
    """Return the residual in a list, or none."""
    return [adapter for adapter in linear.entry.adapters if adapter.name == RESIDUAL]


def _factor_sources(linear: SalrLinear, chosen: list[AdapterEntry]) -> dict[str, Source]:
    """Return the low-rank inputs: one adapter as it is stored, several concatenated along the rank."""
    rank = sum(adapter.rank for adapter in chosen)
    dtypes = [_factor(linear, kind, chosen, meta=True).dtype for kind in ("factor_A", "factor_B")]
    scaling = _scaling(linear, chosen)
    return {
        "lora_A": Source((rank, linear.in_features), dtypes[0], lambda: _factor(linear, "factor_A", chosen)),
        "lora_B": Source((linear.out_features, rank), dtypes[1], lambda: _factor(linear, "factor_B", chosen)),
        "rank_scaling": Source.of(scaling),
    }


def _factor(linear: SalrLinear, kind: str, chosen: list[AdapterEntry], *, meta: bool = False) -> torch.Tensor:
    """Return a factor as it is stored, or several concatenated along the rank in their common float dtype."""
    stored = [linear.get_submodule(kind).get_buffer(adapter.name) for adapter in chosen]
    if meta:
        stored = [factor.to("meta") for factor in stored]
    return stored[0] if len(stored) == 1 else concatenated(stored, -2 if kind == "factor_A" else -1)


def _scaling(linear: SalrLinear, chosen: list[AdapterEntry]) -> torch.Tensor:
    """Return what multiplies each rank (R,) float32: the adapter's scaling, with the scales of int8 factors."""
    parts = []
    for adapter in chosen:
        own = torch.full((adapter.rank,), adapter.scaling)
        if linear.get_submodule("factor_A").get_buffer(adapter.name).dtype == torch.int8:
            own = own * linear.get_submodule("rank_scales").get_buffer(adapter.name)
        parts.append(own)
    return torch.cat(parts)
