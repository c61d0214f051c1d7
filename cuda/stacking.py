"""Several layers with the same input as one launch: q, k and v, or gate and up.

Invariant: layers are stacked along N where each but the last ends at a whole row block; each keeps its own ranks, so
that a row is multiplied with its own layer's adapters only. The layers' slabs become views of the stacked ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .by_rows import ProductByRows
from .device_layout import BLOCK_ROWS, SlabWeight
from .low_rank import LARGEST_RANK, RANKS_OF_TILE, Fragments, LowRank, fragments


@dataclass(frozen=True)
class Layer:
    """One of the stacked layers: its slabs, its adapters or None, its bias (N,) or None, all on one GPU."""

    weight: SlabWeight
    adapters: LowRank | None = None
    bias: torch.Tensor | None = None


@dataclass
class Ranks:
    """Adapters of one layer (see ``low_rank.LowRank``), padded with ranks of zeros."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: torch.Tensor


def reason_not_stacked(layers: Sequence[Layer]) -> str | None:
    """Return why layers cannot share a launch, None where they can."""
    first = layers[0].weight
    if any(layer.weight.n_rows % BLOCK_ROWS for layer in layers[:-1]):
        return f"rows {[layer.weight.n_rows for layer in layers]} (multiples of {BLOCK_ROWS} are stacked)"
    for name in ("n_columns", "encoding", "dtype", "pattern"):
        if any(getattr(layer.weight, name) != getattr(first, name) for layer in layers):
            return f"layers that differ in {name}"
    rank = len(layers) * rank_tiles(layers) * RANKS_OF_TILE
    return f"{rank} ranks in all (at most {LARGEST_RANK})" if rank > LARGEST_RANK else None


def rank_tiles(layers: Sequence[Layer]) -> int:
    """Return the tiles of 16 ranks that each layer gets: those of the largest rank."""
    return max(-(-layer.adapters.lora_A.shape[0] // RANKS_OF_TILE) if layer.adapters else 0 for layer in layers)


def stack_slabs(weights: Sequence[SlabWeight]) -> SlabWeight:
    """Return the slabs of all weights, one after the other."""
    offsets, before = [], 0
    for weight in weights:
        offsets.append(weight.offsets[:-1] + before)
        before += weight.slabs.numel() // 16
    end = weights[0].offsets.new_tensor([before])
    return SlabWeight(
        n_rows=sum(weight.n_rows for weight in weights),
        n_columns=weights[0].n_columns,
        encoding=weights[0].encoding,
        dtype=weights[0].dtype,
        slabs=torch.cat([weight.slabs for weight in weights]),
        offsets=torch.cat([*offsets, end]).to(torch.int32),
        largest_slab_bytes=max(weight.largest_slab_bytes for weight in weights),
        pattern=weights[0].pattern,
    )


def split_slabs(stacked: SlabWeight, n_rows: Sequence[int]) -> list[SlabWeight]:
    """Return the weights that were stacked, of so many rows each, as views of the stacked slabs."""
    parts, first_block = [], 0
    for rows in n_rows:
        last_block = first_block + -(-rows // BLOCK_ROWS)
        offsets = stacked.offsets[first_block * stacked.n_slabs : last_block * stacked.n_slabs + 1]
        start, stop = 16 * int(offsets[0]), 16 * int(offsets[-1])
        parts.append(
            SlabWeight(
                rows, stacked.n_columns, stacked.encoding, stacked.dtype, stacked.slabs[start:stop],
                offsets - offsets[0], stacked.largest_slab_bytes, stacked.pattern,
            )
        )  # fmt: skip
        first_block = last_block
    return parts


def padded_ranks(layer: Layer, n_tiles: int) -> Ranks:
    """Return a layer's adapters with ranks of zeros up to ``n_tiles`` tiles; all zeros where it has none."""
    weight, rank = layer.weight, n_tiles * RANKS_OF_TILE
    if layer.adapters is None:
        like = {"dtype": weight.dtype, "device": weight.slabs.device}
        return Ranks(
            torch.zeros(rank, weight.n_columns, **like),  # type: ignore[call-overload]
            torch.zeros(weight.n_rows, rank, **like),  # type: ignore[call-overload]
            torch.zeros(rank, device=weight.slabs.device),
        )
    missing = rank - layer.adapters.lora_A.shape[0]
    pad = torch.nn.functional.pad
    adapters = layer.adapters
    return Ranks(
        pad(adapters.lora_A, (0, 0, 0, missing)),
        pad(adapters.lora_B, (0, missing)),
        pad(adapters.scaling, (0, missing)),
    )


def stack_ranks(layers: Sequence[Layer]) -> Fragments | None:
    """Return all layers' adapters in fragment order, as many tiles of ranks each; None if none has any."""
    n_tiles = rank_tiles(layers)
    if not n_tiles:
        return None
    parts = [fragments(padded_ranks(layer, n_tiles), layer.weight.dtype) for layer in layers]
    n_slabs = layers[0].weight.n_slabs
    return Fragments(
        n_tiles=len(layers) * n_tiles,
        block_tiles=n_tiles,
        lora_A=torch.cat([part.lora_A.view(n_slabs, -1) for part in parts], 1).reshape(-1),
        lora_B=torch.cat([part.lora_B for part in parts]),
        scaling=torch.cat([part.scaling for part in parts]),
        first_tile=torch.cat([part.first_tile + i * n_tiles for i, part in enumerate(parts)]),
    )


class StackedProduct(ProductByRows):
    """[x W_0^T | x W_1^T | ...] with each layer's adapters and bias: one launch for few rows of x.

    Args:
        layers: as ``reason_not_stacked`` accepts; their weights views of ``stacked``.
        stacked: the slabs of all.
    """

    def __init__(self, layers: Sequence[Layer], stacked: SlabWeight) -> None:
        ranks = stack_ranks(layers)
        biases = [
            torch.zeros(layer.weight.n_rows, device=stacked.slabs.device) if layer.bias is None else layer.bias.float()
            for layer in layers
        ]
        bias = None if all(layer.bias is None for layer in layers) else torch.cat(biases).contiguous()
        super().__init__(stacked, ranks, bias)
