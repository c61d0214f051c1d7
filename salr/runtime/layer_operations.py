"""What a Llama-like model computes between its linear layers, in torch: the twin of the CUDA backend's kernels.

Invariant: each equals transformers' own modules bit for bit in 16-bit dtypes, attention within rounding; shapes are
those of ``salr.cuda.operations``.
"""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor
Norms = tuple[Tensor, Tensor, float]


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Return x + residual (M, H) and its RMSNorm times ``weight`` (H,); without a residual, x itself and its norm."""
    summed = x if residual is None else residual + x
    return summed, _norm(summed, weight, epsilon)


def gated(gate_up: Tensor) -> Tensor:
    """Return SiLU(gate) * up (M, I) of a stacked product (M, gate | up)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def rotary(
    qkv: Tensor,
    cosines: Tensor,
    sines: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    starts: Tensor,
    norms: Norms | None = None,
) -> Tensor:
    """Return q (M, heads, D), rotated, and write k and v (S, kv_heads, capacity, D) of each row into the cache.

    qkv is (M, (heads + 2 kv_heads) D), M / S rows of each of S sequences; the first of them goes to slot ``slots``
    (S,), and position 0 is at slot ``starts`` (S,). cosines and sines are (positions, D / 2).
    """
    sequences, n_kv_heads, _, columns = k.shape
    heads = qkv.view(sequences, qkv.shape[0] // sequences, -1, columns)
    n_heads = heads.shape[2] - 2 * n_kv_heads
    q, new_k, new_v = torch.split(heads, [n_heads, n_kv_heads, n_kv_heads], dim=2)
    if norms is not None:
        q, new_k = _norm(q, norms[0], norms[2]), _norm(new_k, norms[1], norms[2])
    at = slots[:, None].long() + torch.arange(heads.shape[1], device=qkv.device)
    positions = (at - starts[:, None].long()).clamp(0, cosines.shape[0] - 1)
    cos, sin = (torch.cat([table[positions]] * 2, -1)[:, :, None] for table in (cosines, sines))
    index = at[:, None, :, None].expand(-1, n_kv_heads, -1, columns)
    k.scatter_(2, index, _rotated(new_k, cos, sin).transpose(1, 2))
    v.scatter_(2, index, new_v.transpose(1, 2))
    return _rotated(q, cos, sin).reshape(qkv.shape[0], n_heads, columns)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    starts: Tensor,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the attention (M, heads D) of rows of q (M, heads, D), M / S of each of S sequences, over the cache.

    A row at slot i attends the slots from ``starts`` to i, the last ``window`` of them; ``slots`` is of each sequence's
    first row.
    """
    sequences, _, capacity, _ = k.shape
    rows = q.shape[0] // sequences
    at = slots[:, None].long() + torch.arange(rows, device=q.device)
    used = torch.arange(capacity, device=q.device)
    mask = (used <= at[..., None]) & (used >= starts[:, None, None])
    if window is not None:
        mask &= used > at[..., None] - window
    mask |= used == at[..., None]  # a row of padding attends itself, so that nothing is NaN
    return _attention(q, k, v, mask[:, None], scale, is_causal=False)


def attend_prompt(
    q: Tensor, k: Tensor, v: Tensor, first_slot: int, window: int | None = None, scale: float | None = None
) -> Tensor:
    """Return the attention (M, heads D) among prompts' own rows, which fill the cache from ``first_slot`` on."""
    rows = q.shape[0] // k.shape[0]
    k, v = (cache[:, :, first_slot : first_slot + rows] for cache in (k, v))
    if window is None or rows <= window:
        return _attention(q, k, v, None, scale, is_causal=True)
    zeros = torch.zeros(k.shape[0], dtype=torch.int32, device=q.device)
    return attend(q, k, v, zeros, zeros, window, scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, is_causal: bool) -> Tensor:
    sequences, n_kv_heads, _, columns = k.shape
    heads = q.view(sequences, -1, q.shape[1], columns).transpose(1, 2)
    group = q.shape[1] // n_kv_heads
    y = torch.nn.functional.scaled_dot_product_attention(
        heads, k, v, attn_mask=mask, is_causal=is_causal, scale=scale or 1 / math.sqrt(columns), enable_gqa=group > 1
    )
    return y.transpose(1, 2).reshape(q.shape[0], -1)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """LlamaRMSNorm: float32 inside, rounded before the weight."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rotary_pos_emb`` of x (S, rows, heads, D)."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], -1) * sin
