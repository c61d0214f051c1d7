"""PiSSA and OLoRA: the factors that were taken out of the base before training, made again from it.

Such an adapter was trained on W - s B0 A0, so its change of W is s (B A - B0 A0): a pair of twice the rank.
Invariant: W itself is not changed.
"""

from __future__ import annotations

import torch

from ..execution.threads import one_thread

#: factors A (r, K) and B (N, r) in float32
FactorPair = tuple[torch.Tensor, torch.Tensor]


def initial_factors(start: str, weight: torch.Tensor, rank: int, scaling: float) -> FactorPair:
    """Return A0 (r, K) and B0 (N, r) as PEFT made them, up to the signs that cancel in their product.

    Args:
        start: ``pissa``: the largest singular values of W, or ``olora``: the first columns of its QR decomposition.
        weight: W (N, K).
        rank: r.
        scaling: s.
    """
    with one_thread():
        matrix = weight.double()
        if start == "olora":
            lora_b = torch.linalg.qr(matrix[:, :rank]).Q
            return (lora_b.T @ matrix).float(), lora_b.float()
        is_tall = matrix.shape[0] > matrix.shape[1]
        gram = matrix.T @ matrix if is_tall else matrix @ matrix.T
        vectors = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)
        images = matrix @ vectors if is_tall else matrix.T @ vectors
        sizes = torch.linalg.vector_norm(images, dim=0).clamp_min(1e-300)
        root = (sizes / scaling).sqrt()
        left, right = (images / sizes, vectors) if is_tall else (vectors, images / sizes)
        return (right * root).T.float(), (left * root).float()


def difference(trained: FactorPair, first: FactorPair) -> FactorPair:
    """Return [A; A0] (2r, K) and [B, -B0] (N, 2r)."""
    (lora_a, lora_b), (first_a, first_b) = trained, first
    return torch.cat([lora_a, first_a]), torch.cat([lora_b, -first_b], 1)
