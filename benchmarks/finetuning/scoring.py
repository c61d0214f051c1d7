"""What is measured of a tuned model's predictions: answer NLL and WikiText-2 perplexity.

Invariant: arithmetic is that of training: bf16 autocast on a GPU, float32 on a CPU. Only positions that count reach the
output layer, some at a time, so that no logits of a whole batch are held.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .data import Batch, Example, by_length, padded

_ROWS = 2048
_TOKENS = 8192
#: nats a token, beyond which a model that fell apart counts as that bad
_LARGEST = 100.0


def arithmetic(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the autocast of training and scoring."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def causal(model: Any) -> Any:
    """Return transformers' model below PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def summed_nll(model: Any, batch: Batch) -> torch.Tensor:
    """Return the summed negative log-likelihood in nats of the tokens expected."""
    inner = causal(model)
    hidden = inner.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    rows = hidden.flatten(0, 1).index_select(0, batch.positions)
    total = torch.zeros((), device=batch.ids.device)
    for start in range(0, len(batch.expected), _ROWS):
        piece = rows[start : start + _ROWS], batch.expected[start : start + _ROWS]
        total = total + checkpoint(_piece_nll, inner.lm_head, *piece, use_reentrant=False, preserve_rng_state=False)
    return total


def _piece_nll(head: Any, rows: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    logits = head(rows).float()
    return torch.nn.functional.cross_entropy(logits, expected, reduction="sum")


@torch.no_grad()
def answer_nll(model: Any, examples: Sequence[Example], pad: int) -> float:
    """Return the mean negative log-likelihood of an answer's token in nats."""
    device = causal(model).device
    with arithmetic(device):
        sums = [summed_nll(model, padded(batch, pad, device)) for batch in by_length(examples, _TOKENS)]
    return sum(float(part) for part in sums) / sum(len(example.answer) for example in examples)


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """Return the perplexity over windows (n, T), each scored alone: `salr eval`'s windows, several at a time."""
    device, size = causal(model).device, max(1, _TOKENS // windows.shape[1])
    sums = []
    with arithmetic(device):
        for start in range(0, len(windows), size):
            ids = windows[start : start + size].to(device)
            positions = torch.arange(ids.numel(), device=device).view(ids.shape)[:, :-1].flatten()
            sums.append(summed_nll(model, Batch(ids, positions, ids[:, 1:].flatten())))
    return math.exp(min(_LARGEST, sum(float(part) for part in sums) / (windows.numel() - len(windows))))
