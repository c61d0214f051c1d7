"""Random weights in the shape of Llama-3-8B, dense and packed, made on the device; and what they take there."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch

from salr.runtime.packed import Adapters, PackedWeight
from salr.runtime.packing import pack

RANK = 64


@dataclass(frozen=True)
class Sizes:
    """A model's shape; the defaults are Llama-3-8B's."""

    hidden: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    head_columns: int = 128
    intermediate: int = 14336
    words: int = 128256

    @property
    def qkv(self) -> list[int]:
        """Rows of q, k and v."""
        return [self.heads * self.head_columns, *[self.kv_heads * self.head_columns] * 2]

    def cache_bytes(self, batch: int, context: int) -> int:
        """Bytes of keys and values that one step reads."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_columns * batch * context


def random_weight(n_rows: int, n_columns: int, device: torch.device) -> torch.Tensor:
    """Return a dense bf16 matrix whose outputs keep the size of its inputs."""
    return torch.randn(n_rows, n_columns, device=device, dtype=torch.bfloat16) * n_columns**-0.5


def random_packed(n_rows: int, n_columns: int, device: torch.device, values: str) -> PackedWeight:
    """Return a random matrix of which half the weights are kept."""
    kept = torch.rand(n_rows, n_columns, device=device) < 0.5
    return pack(random_weight(n_rows, n_columns, device), kept, values)


def random_residual(n_rows: int, n_columns: int, device: torch.device) -> Adapters:
    """Return random factors of rank 64, a tenth of a weight in size."""
    lora_a = random_weight(RANK, n_columns, device)
    return Adapters(lora_a, random_weight(n_rows, RANK, device) * 0.1, torch.ones(RANK, device=device))


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Free what nobody uses, and begin to watch memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    """Return the most memory that torch had allocated."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
