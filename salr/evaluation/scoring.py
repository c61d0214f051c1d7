"""Running one model over the windows of a text and adding up what it predicts.

Invariant: sums are float64; logits beyond one window are never held, and log-probabilities only some rows at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .errors import EvaluationError
from .protocol import Window
from .spool import Spool, rounded

_PIECE_ELEMENTS = 1 << 23
_PROBE_TOKENS = 8
_PROBE_TOLERANCE = 1e-4


@dataclass
class Scores:
    """Sums over scored predictions: negative log-likelihood and KL(reference || model) in nats, agreeing choices."""

    nll: float = 0.0
    n_scored: int = 0
    n_agreeing: int = 0
    kl: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """The reference's spool, and whether this run fills it (the reference) or reads it (any other model)."""

    spool: Spool
    fills: bool


def score(
    model: Any,
    ids: torch.Tensor,
    windows: Sequence[Window],
    device: torch.device,
    comparison: Comparison | None,
    step: Callable[[], None],
) -> Scores:
    """Return the sums of ``model`` over ``windows`` of the token ids (n,), int64; ``step`` is called a window.

    Raises:
        EvaluationError: the model sees later tokens, the logits are not numbers, or their width is not the reference's.
    """
    scores = Scores()
    with torch.inference_mode():
        _check_causal(model, ids[:_PROBE_TOKENS].to(device))
    with torch.inference_mode(), _arithmetic(device):
        for window in windows:
            tokens = ids[window.start : window.stop].to(device)
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
            _score_window(scores, logits[window.first : -1], tokens[window.first + 1 :], comparison)
            step()
    return scores


def _check_causal(model: Any, tokens: torch.Tensor) -> None:
    """Refuse a model whose logits change with a later token (BERT's language-model head, say): class names do not tell.

    ``tokens`` (n,) are a few of the text's. In float32, where a causal model's earlier logits change by rounding only.
    """
    changed = tokens.clone()
    changed[-1] = tokens[0] if tokens[-1] != tokens[0] else (tokens[0] + 1) % model.config.get_text_config().vocab_size
    one, other = (model(input_ids=each[None], use_cache=False).logits[0, :-1].float() for each in (tokens, changed))
    if (one - other).abs().max() > _PROBE_TOLERANCE * one.abs().max():
        raise EvaluationError(
            f"{type(model).__name__} has no perplexity: its logits depend on later tokens",
            needed="a causal language model",
        )


def _arithmetic(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def _score_window(scores: Scores, logits: torch.Tensor, targets: torch.Tensor, comparison: Comparison | None) -> None:
    """Add one window: ``logits`` (predictions, vocabulary), ``targets`` (predictions,)."""
    n_rows = max(1, _PIECE_ELEMENTS // logits.shape[-1])
    for start in range(0, logits.shape[0], n_rows):
        log_probs = logits[start : start + n_rows].float().log_softmax(-1)
        expected = targets[start : start + n_rows]
        nll = -log_probs.gather(1, expected[:, None]).double().sum().item()
        if nll != nll:
            raise EvaluationError("the logits are not numbers", needed="finite logits", fix="check the model's weights")
        if comparison is not None:
            _compare(scores, log_probs, comparison)
        scores.nll += nll
        scores.n_scored += expected.shape[0]


def _compare(scores: Scores, log_probs: torch.Tensor, comparison: Comparison) -> None:
    """Hold rows of log-probabilities (rows, vocabulary) against the reference's, or store them as the reference's."""
    spool, start, stop = comparison.spool, scores.n_scored, scores.n_scored + log_probs.shape[0]
    if log_probs.shape[1] != spool.n_vocabulary:
        raise EvaluationError(f"{log_probs.shape[1]} logits", needed=f"the reference's {spool.n_vocabulary}")
    if comparison.fills:
        spool.put(start, log_probs)
        scores.n_agreeing += log_probs.shape[0]
        return
    reference, found = spool.log_probs(start, stop, log_probs.device), rounded(log_probs)
    scores.kl += (reference.exp() * (reference - found)).sum(-1).double().sum().item()
    scores.n_agreeing += int((log_probs.argmax(-1) == spool.top(start, stop, log_probs.device)).sum())
