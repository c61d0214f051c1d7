"""A Llama-like model as what it computes: norms, products and a static cache, without transformers' modules.

Invariant: the same code serves packed and dense products, kernels and their torch twins; numbers equal those of the
transformers model that it was made from, rounding for rounding but for attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import layer_operations

Tensor = torch.Tensor
Product = Callable[[Tensor], Tensor]
_PROMPT_ROWS = 16384  # of activations at once


@dataclass(frozen=True)
class DecoderLayer:
    """One layer: ``qkv`` (M, H) -> (M, (heads + 2 kv_heads) D), ``gate_up`` (M, H) -> (M, 2 I), both stacked."""

    input_norm: Tensor
    qkv: Product
    output: Product
    post_norm: Tensor
    gate_up: Product
    down: Product
    head_norms: tuple[Tensor, Tensor, float] | None = None
    window: int | None = None


@dataclass(frozen=True)
class Decoder:
    """A model; ``tables(n)``: cosines and sines (n, D / 2) of positions; ``operations``: as ``layer_operations``."""

    embedding: Tensor
    layers: Sequence[DecoderLayer]
    norm: Tensor
    head: Product
    epsilon: float
    n_heads: int
    n_kv_heads: int
    head_columns: int
    tables: Callable[[int], tuple[Tensor, Tensor]]
    operations: Any = layer_operations


@dataclass(frozen=True)
class StaticCache:
    """Keys and values (layers, S, kv_heads, capacity, D) and the tables of the positions that fit."""

    k: Tensor
    v: Tensor
    cosines: Tensor
    sines: Tensor

    @staticmethod
    def empty(decoder: Decoder, sequences: int, capacity: int) -> StaticCache:
        """Return a cache of zeros."""
        shape = len(decoder.layers), sequences, decoder.n_kv_heads, capacity, decoder.head_columns
        like = decoder.embedding
        return StaticCache(like.new_zeros(shape), like.new_zeros(shape), *decoder.tables(capacity))

    @property
    def capacity(self) -> int:
        """Slots of a sequence."""
        return self.k.shape[3]


@torch.no_grad()
def step(decoder: Decoder, cache: StaticCache, tokens: Tensor, slots: Tensor, starts: Tensor) -> Tensor:
    """Return the logits (S, V) after one new token a sequence, and write it to the cache.

    Args:
        tokens: (S,).
        slots: (S,) int32: where in the cache the tokens go.
        starts: (S,) int32: the first slot in use of each sequence.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        attention: Tensor = decoder.operations.attend(q, k, v, slots, starts, window)
        return attention

    x, residual = _layers(decoder, cache, tokens, slots, starts, attend)
    return _logits(decoder, x, residual)


@torch.no_grad()
def read_prompt(decoder: Decoder, cache: StaticCache, ids: Tensor, n_padding: Sequence[int] | None = None) -> Tensor:
    """Fill the cache with prompts and return the logits (S, V) after their last token.

    Args:
        ids: (S, T); token t goes to slot t.
        n_padding: of each sequence, on the left; None where none is padded.
    """
    sequences, length = ids.shape
    padding = [0] * sequences if n_padding is None else list(n_padding)
    at_once = max(1, _PROMPT_ROWS // length) if not any(padding) else 1
    logits = []
    for first in range(0, sequences, at_once):
        some, start = slice(first, min(first + at_once, sequences)), padding[first]
        part = StaticCache(cache.k[:, some], cache.v[:, some], cache.cosines, cache.sines)
        logits.append(_read_some(decoder, part, ids[some, start:], start))
    return torch.cat(logits)


def _read_some(decoder: Decoder, cache: StaticCache, ids: Tensor, start: int) -> Tensor:
    """Read prompts of one length whose first token goes to slot ``start``."""
    sequences, length = ids.shape
    starts = torch.full((sequences,), start, dtype=torch.int32, device=ids.device)

    def attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        return layer_operations.attend_prompt(q, k, v, start, window)

    x, residual = _layers(decoder, cache, ids.reshape(-1), starts, starts, attend)
    last = slice(length - 1, None, length)
    return _logits(decoder, x[last], residual[last])


def _layers(
    decoder: Decoder,
    cache: StaticCache,
    tokens: Tensor,
    slots: Tensor,
    starts: Tensor,
    attend: Callable[[Tensor, Tensor, Tensor, int | None], Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the last layer's output (M, H) and what is to be added to it."""
    operations, epsilon = decoder.operations, decoder.epsilon
    x, residual = torch.nn.functional.embedding(tokens, decoder.embedding), None
    for layer, k, v in zip(decoder.layers, cache.k, cache.v, strict=True):
        residual, x = operations.add_norm(x, residual, layer.input_norm, epsilon)
        qkv = layer.qkv(x)
        q = operations.rotary(qkv, cache.cosines, cache.sines, k, v, slots, starts, layer.head_norms)
        x = layer.output(attend(q, k, v, layer.window))
        residual, x = operations.add_norm(x, residual, layer.post_norm, epsilon)
        x = layer.down(operations.gated(layer.gate_up(x)))
    assert residual is not None
    return x, residual


def _logits(decoder: Decoder, x: Tensor, residual: Tensor) -> Tensor:
    _, x = decoder.operations.add_norm(x, residual, decoder.norm, decoder.epsilon)
    return decoder.head(x)
