"""Generating with a static cache and a step that is captured once as a CUDA graph.

Invariant: tokens are those that transformers' own loop chooses from the same logits: its processors, criteria and
streamers are used as they are. Everything that this does not serve goes to transformers' loop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from . import decoder as decoding
from .decoder import Decoder, StaticCache
from .experts import packed_modules
from .llama import read_model, reason_not_read
from .matrix import Matrix

Tensor = torch.Tensor
_CAPACITY_STEP = 256
LARGEST_BATCH = 64
DEVICES = ("cuda",)
#: arguments of ``model.generate`` that mean the same here as there
_SERVED = {
    "inputs", "input_ids", "attention_mask", "max_new_tokens", "max_length", "min_new_tokens", "min_length",
    "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size",
    "eos_token_id", "pad_token_id", "bos_token_id", "streamer", "stopping_criteria", "logits_processor", "use_cache",
    "generation_config", "stop_strings", "tokenizer", "bad_words_ids", "suppress_tokens", "num_return_sequences",
    "prefix_allowed_tokens_fn",
}  # fmt: skip


class Session:
    """One batch that is decoded: its cache, its next tokens, and the captured step.

    Args:
        decoder: the model.
        sequences: S.
        capacity: slots of each sequence.
    """

    def __init__(self, decoder: Decoder, sequences: int, capacity: int) -> None:
        self.decoder, self.cache = decoder, StaticCache.empty(decoder, sequences, capacity)
        device = decoder.embedding.device
        self.tokens = torch.zeros(sequences, dtype=torch.long, device=device)
        self.slots = torch.zeros(sequences, dtype=torch.int32, device=device)
        self.starts = torch.zeros(sequences, dtype=torch.int32, device=device)
        self.logits: Tensor | None = None
        self._graph = self._captured() if device.type == "cuda" else None

    def read(self, ids: Tensor, n_padding: Sequence[int] | None = None) -> Tensor:
        """Read prompts (S, T), padded on the left, and return the logits (S, V) after them."""
        self.slots.fill_(ids.shape[1])
        self.starts.copy_(torch.tensor(n_padding or [0] * ids.shape[0], dtype=torch.int32))
        logits = decoding.read_prompt(self.decoder, self.cache, ids, n_padding)
        self.tokens.copy_(logits.argmax(-1))
        return logits

    def step(self) -> Tensor:
        """Append ``tokens``, put the likeliest next ones there, and return the logits (S, V), overwritten each time."""
        if self._graph is None:
            return self._step()
        self._graph.replay()
        assert self.logits is not None
        return self.logits

    @torch.no_grad()
    def _step(self) -> Tensor:
        logits = decoding.step(self.decoder, self.cache, self.tokens, self.slots, self.starts)
        self.tokens.copy_(logits.argmax(-1))
        self.slots += 1
        return logits

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Capture a step; it runs before on the same stream, so that workspaces and counters exist already."""
        device = self.tokens.device
        stream, graph = _stream(device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            for _ in range(2):
                self._step()
            self.slots.zero_()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                self.logits = self._step()
        self.slots.zero_()
        torch.cuda.current_stream(device).wait_stream(stream)
        return graph


class GraphDecoder:
    """A loaded model's decoder and its last session, kept for the next call of the same batch size."""

    def __init__(self, model: Any) -> None:
        self._basis = basis(model)
        self.decoder = read_model(model)
        self._session: Session | None = None

    def fits(self, model: Any) -> bool:
        """Tell whether the model's weights and adapters are still those that this was made from."""
        (matrices, dense), (known_matrices, known_dense) = basis(model), self._basis
        return dense == known_dense and [*map(id, matrices)] == [*map(id, known_matrices)]

    def session(self, sequences: int, n_slots: int) -> Session:
        """Return a session with at least ``n_slots`` slots for each of so many sequences."""
        last = self._session
        if last is None or last.tokens.shape[0] != sequences or last.cache.capacity < n_slots:
            self._session = last = None  # its memory is free before more is taken
            capacity = -(-n_slots // _CAPACITY_STEP) * _CAPACITY_STEP
            self._session = last = Session(self.decoder, sequences, capacity)
        return last


def basis(model: Any) -> tuple[list[Matrix], list[tuple[int, int]]]:
    """Return what a decoder holds on to: matrices with their adapters, address and version of what is dense."""
    matrices = [module.matrices()[0] for _, module in packed_modules(model)]
    return matrices, [(parameter.data_ptr(), parameter._version) for parameter in model.parameters()]


def decoder_of(model: Any) -> GraphDecoder | None:
    """Return the decoder of a model, made anew where the model has changed; None where it has none."""
    if model.training or model.device.type not in DEVICES or reason_not_read(model) is not None:
        return None
    known: GraphDecoder | None = model.__dict__.get("_salr_decoder")
    if known is None or not known.fits(model):
        model.__dict__["_salr_decoder"] = None
        known = model.__dict__["_salr_decoder"] = GraphDecoder(model)
    return known


def forget_decoder(model: Any) -> None:
    """Give back what a model's decoder holds: weights laid out for decoding, its cache and its captured step."""
    model.__dict__.pop("_salr_decoder", None)


def generate(model: Any, inputs: Tensor | None = None, **options: Any) -> Any:
    """Do what ``model.generate`` of transformers does, decoding with a captured step where that serves."""
    own = type(model).generate
    if inputs is not None:
        options["inputs"] = inputs
    if not _is_served(model, options):
        return own(model, **options)
    # transformers gives a streamer to its own loops only
    loop = functools.partial(_decode, given_streamer=options.get("streamer"))
    return own(model, custom_generate=loop, **options)


def _is_served(model: Any, options: dict[str, Any]) -> bool:
    if set(options) - _SERVED or options.get("use_cache") is False:
        return False
    config = options.get("generation_config") or model.generation_config
    simple = (config.num_beams or 1) == 1 and not config.return_dict_in_generate and not config.cache_implementation
    return simple and config.use_cache is not False and decoder_of(model) is not None


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    given_streamer: Any = None,
    **options: Any,
) -> Tensor:
    """Stand in for ``GenerationMixin._sample``: the same choice of tokens from a session's logits."""
    graph = decoder_of(model)
    padding = n_left_padding(options.get("attention_mask"))
    n_slots, batch = stopping_criteria.max_length, input_ids.shape[0]
    if graph is None or padding is None or n_slots is None or batch > LARGEST_BATCH or input_ids.shape[1] < 1:
        own: Tensor = type(model)._sample(
            model, input_ids, logits_processor, stopping_criteria, generation_config, streamer=given_streamer, **options
        )
        return own
    session = graph.session(batch, n_slots)
    chooser = _Chooser(logits_processor, stopping_criteria, generation_config, input_ids)
    logits = session.read(input_ids, padding if any(padding) else None)
    while True:
        tokens, report = chooser.choose(logits)
        session.tokens.copy_(tokens)
        if chooser.ids.shape[1] < n_slots:
            logits = session.step()  # begins before anybody knows whether the last token was the end
        chosen, is_running = report()
        if given_streamer is not None:
            given_streamer.put(chosen)
        if not is_running:
            break
    if given_streamer is not None:
        given_streamer.end()
    return chooser.ids


class _Chooser:
    """Chooses tokens as transformers' loop does, and tells them to the host without stopping the device."""

    def __init__(self, processors: Any, criteria: Any, config: Any, ids: Tensor) -> None:
        self.ids = ids
        self._processors, self._criteria, self._samples = processors, criteria, bool(config.do_sample)
        self._unfinished = torch.ones(ids.shape[0], dtype=torch.long, device=ids.device)
        has_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self._padding = config._pad_token_tensor.to(ids.device) if has_end else None

    def choose(self, logits: Tensor) -> tuple[Tensor, Any]:
        """Return the next tokens (S,) and a function that waits for them: (tokens on the host, whether to go on)."""
        scores = self._processors(self.ids, logits.to(torch.float32, copy=True))
        if self._samples:
            tokens = torch.multinomial(torch.nn.functional.softmax(scores, dim=-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if self._padding is not None:
            tokens = tokens * self._unfinished + self._padding * (1 - self._unfinished)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=-1)
        self._unfinished = self._unfinished & ~self._criteria(self.ids, None)
        return tokens, _on_host(torch.stack([tokens, self._unfinished]))


def _on_host(found: Tensor) -> Any:
    """Start a copy to the host, and return the function that waits for it alone."""
    if found.device.type != "cuda":
        return lambda: (found[0], bool(found[1].any()))
    there = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
    there.copy_(found, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()

    def wait() -> tuple[Tensor, bool]:
        event.synchronize()
        return there[0], bool(there[1].any())

    return wait


def n_left_padding(mask: Tensor | None) -> list[int] | None:
    """Return how many tokens are masked on the left of each sequence, None where others are masked too."""
    if mask is None:
        return []
    if mask.ndim != 2:
        return None
    kept = mask.to(torch.bool)
    counts = (~kept).sum(1)
    is_left = torch.arange(mask.shape[1], device=mask.device) >= counts[:, None]
    if not torch.equal(is_left, kept) or int(counts.max()) >= mask.shape[1]:
        return None
    return [int(count) for count in counts.tolist()]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
