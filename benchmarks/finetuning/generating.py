"""Exact match of final numbers by greedy generation.

Invariant: every variant generates through the same plain transformers model in its own dtype, filled with the effective
weight of each layer (base, residual and adapters, as the layer itself computes them), so that speed does not depend on
the variant. Tokens are those of transformers' own greedy loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .data import Example, final_number
from .scoring import arithmetic, causal

_COMPACT_EVERY = 16
NEW_TOKENS = 320


@torch.no_grad()
def merge_into(dense: Any, model: Any) -> None:
    """Fill ``dense``, a plain transformers model, with the effective weights of ``model``.

    Column k of one is the layer's own answer to the k-th unit vector, so that all kinds of layers are asked alike.
    """
    inner = causal(model)
    for name, linear in dense.model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            layer = inner.model.get_submodule(name)
            units = torch.eye(linear.in_features, dtype=linear.weight.dtype, device=linear.weight.device)
            with arithmetic(units.device):
                linear.weight.copy_(layer(units).T)


def exact_match(dense: Any, tokenizer: Any, examples: Sequence[Example], batch: int, most: int = NEW_TOKENS) -> float:
    """Return the share of questions whose greedy answer of at most ``most`` tokens ends in the right number."""
    ordered = sorted(examples, key=lambda example: -len(example.prompt))
    right = 0
    for start in range(0, len(ordered), batch):
        asked = ordered[start : start + batch]
        answers = greedy(dense, [example.prompt for example in asked], tokenizer.eos_token_id, most)
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right += sum(final_number(text) == example.number for text, example in zip(texts, asked, strict=True))
    return right / len(ordered)


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Sequence[int]], end: int, most: int) -> list[list[int]]:
    """Return each prompt's likeliest tokens one by one, before ``end``; who has ended leaves the batch."""
    device, width = model.device, max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[end] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    positions = (seen.cumsum(1) - 1).clamp_min(0)
    written = torch.full((len(prompts), most), end, device=device)
    rows, cache = torch.arange(len(prompts), device=device), None
    for step in range(most):
        out = model(input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache,
                    use_cache=True, logits_to_keep=1)  # fmt: skip
        ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
        written[rows, step] = ids[:, 0]
        seen, positions = torch.cat([seen, torch.ones_like(ids)], 1), positions[:, -1:] + 1
        if step % _COMPACT_EVERY == _COMPACT_EVERY - 1:
            going = (written[rows, : step + 1] != end).all(1).nonzero()[:, 0]
            if not len(going):
                break
            cache.batch_select_indices(going)
            rows, ids, seen, positions = rows[going], ids[going], seen[going], positions[going]
    return [answer[: answer.index(end)] if end in answer else answer for answer in written.tolist()]
