"""Perplexity of models on a text, and how far each is from a reference.

Invariant: one model at a time is in memory; the reference runs first and leaves what is needed of it on disk.
Everything that can be refused (text, tokenizers, classes, vocabularies) is checked before the first weight is read.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..formats.errors import OptionError
from ..runtime.devices import usable_device
from .errors import EvaluationError
from .models import ModelSource, open_model
from .protocol import EvalOptions, Text, Window, n_scored, plan_windows, read_text
from .results import EvalResult
from .scoring import Comparison, Scores, score
from .spool import open_spool


@dataclass(frozen=True)
class _Job:
    """A model that has passed every check that needs no weights; ``ids`` (n_tokens,) int64."""

    source: ModelSource
    ids: torch.Tensor
    windows: list[Window]
    is_reference: bool


def evaluate(
    models: Sequence[str | Path] | str | Path,
    text: str | Path,
    reference: str | Path | None = None,
    options: EvalOptions | None = None,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[EvalResult]:
    """Return perplexity a model, and against ``reference`` agreement and KL; the reference's result comes first.

    Args:
        models: dense Hugging Face directories or .salr files, in any mix.
        text: the text itself (str), or the file that holds it (Path).
        reference: the model that the others are compared with.
        options: window, stride, number of windows and device.
        progress: called with windows done and windows in all.

    Raises:
        SalrError: a text or model is missing, damaged or unfit, or its vocabulary is not the reference's.
    """
    options, content = options or EvalOptions(), read_text(text)
    device = usable_device(options.device)
    paths = [models] if isinstance(models, (str, Path)) else list(models)
    if not paths and reference is None:
        raise OptionError("no model to evaluate", needed="at least one")
    with ExitStack() as stack:
        wanted = [(path, False) for path in paths]
        if reference is not None:
            wanted.insert(0, (reference, True))
        jobs = [_plan(stack.enter_context(open_model(path)), content, options, first) for path, first in wanted]
        spool = None
        if reference is not None:
            for job in jobs[1:]:
                _check_vocabulary(job, jobs[0])
            spool = stack.enter_context(open_spool(n_scored(jobs[0].windows), jobs[0].source.config.vocab_size))
        total, done, results = sum(len(job.windows) for job in jobs), 0, list[EvalResult]()

        def step() -> None:
            nonlocal done
            done += 1
            progress(done, total)

        progress(0, total)
        for job in jobs:
            comparison = Comparison(spool, fills=job.is_reference) if spool is not None else None
            found = _run(job, device, comparison, step)
            results.append(replace(found, ratio=_ratio(found, results[0] if results else found)) if spool else found)
    return results


def _plan(source: ModelSource, text: Text, options: EvalOptions, is_reference: bool) -> _Job:
    """Check what can be checked without weights, and tokenize.

    Raises:
        EvaluationError: the model predicts no next token, has no tokenizer, or does not fit window or text.
    """
    _check_causal(source)
    longest = getattr(source.config, "max_position_embeddings", None)
    if isinstance(longest, int) and longest < options.window:
        raise EvaluationError(
            f"a window of {options.window} tokens",
            path=source.path,
            needed=f"at most its {longest} positions",
            fix=f"give --window {longest}",
        )
    ids = torch.tensor(source.tokenizer()(text.content, verbose=False)["input_ids"], dtype=torch.int64)
    windows = plan_windows(ids.numel(), options)
    if not windows:
        raise EvaluationError(
            f"{text.name!r} has {ids.numel()} tokens for its tokenizer",
            path=source.path,
            needed=f"at least one window of {options.window}",
            fix="give more text, or a smaller --window",
        )
    if int(ids.max()) >= source.config.vocab_size:
        raise EvaluationError(
            f"its tokenizer gives token {int(ids.max())}",
            path=source.path,
            needed=f"ids below its vocabulary of {source.config.vocab_size}",
        )
    return _Job(source, ids, windows, is_reference)


def _check_causal(source: ModelSource) -> None:
    if getattr(source.config, "is_encoder_decoder", False) or not source.model_class().can_generate():
        raise EvaluationError(
            f"{source.architecture} has no perplexity: it predicts no next token",
            path=source.path,
            needed="a causal language model (a class that ends in ForCausalLM or LMHeadModel)",
        )


def _check_vocabulary(job: _Job, reference: _Job) -> None:
    """Refuse a comparison position by position where the tokens are not the same."""
    sizes = [int(each.source.config.vocab_size) for each in (job, reference)]
    if sizes[0] != sizes[1] or not torch.equal(job.ids, reference.ids):
        found = f"a vocabulary of {sizes[0]}" if sizes[0] != sizes[1] else "other tokens for this text"
        raise EvaluationError(
            f"{found} than the reference's {reference.source.path}",
            path=job.source.path,
            needed="the same tokenizer and vocabulary",
            fix="leave --reference out, or evaluate them one by one",
        )


def _run(job: _Job, device: torch.device, comparison: Comparison | None, step: Callable[[], None]) -> EvalResult:
    """Load, score and free one model."""
    start = time.perf_counter()
    try:
        with _naming(job.source.path):
            scores = score(job.source.load(device, torch.float32), job.ids, job.windows, device, comparison, step)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return _result(job, scores, comparison is not None, time.perf_counter() - start)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say in which model something went wrong."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fix = "give a smaller --window, or --device cpu"
        raise EvaluationError("does not fit into the device's memory", path=path, fix=fix) from error
    except EvaluationError as error:
        if error.path is not None:
            raise
        raise EvaluationError(error.found, path=path, needed=error.needed, fix=error.fix) from error


def _result(job: _Job, scores: Scores, compared: bool, seconds: float) -> EvalResult:
    nll = scores.nll / scores.n_scored
    return EvalResult(
        model=str(job.source.path),
        architecture=job.source.architecture,
        is_reference=job.is_reference,
        perplexity=_exp(nll),
        nll=nll,
        n_scored=scores.n_scored,
        n_windows=len(job.windows),
        n_tokens=job.ids.numel(),
        n_bytes=job.source.n_bytes,
        bits_per_weight=job.source.bits_per_weight,
        seconds=seconds,
        agreement=scores.n_agreeing / scores.n_scored if compared else None,
        kl=scores.kl / scores.n_scored if compared else None,
    )


def _ratio(result: EvalResult, reference: EvalResult) -> float:
    return _exp(result.nll - reference.nll)


def _exp(nats: float) -> float:
    """Return e^nats, at most the largest float: a broken model's perplexity is still a number."""
    return math.exp(min(nats, 700.0))
