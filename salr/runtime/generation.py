"""Generating text with a loaded model, piece by piece.

Invariant: what is streamed, joined, is the text that is returned; times are measured around ``model.generate`` alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.errors import OptionError

Message = dict[str, str]
#: what logits can be divided by and stay finite
_LEAST_TEMPERATURE = 1e-6
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class GenerateOptions:
    """How text is generated.

    Args:
        max_tokens: generated at most.
        temperature: 0 for the likeliest token each time; None for the model's own generation config.
        seed: of sampling; None for another text each time.
        raw: continue the prompt as it is, without the model's chat template.
    """

    max_tokens: int = 256
    temperature: float | None = None
    seed: int | None = None
    raw: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise OptionError(f"--max-tokens {self.max_tokens}", needed="1 or more")
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise OptionError(f"--temperature {self.temperature}", needed="a number, 0 or more")
        if self.temperature and self.temperature < _LEAST_TEMPERATURE:
            fix = "give 0 for the likeliest token each time"
            raise OptionError(f"--temperature {self.temperature}", needed=f"{_LEAST_TEMPERATURE} or more", fix=fix)
        if self.seed is not None and abs(self.seed) > _LARGEST_SEED:
            raise OptionError(f"--seed {self.seed}", needed=f"at most {_LARGEST_SEED}")

    def settings(self) -> dict[str, Any]:
        """Return the arguments of ``model.generate``."""
        chosen: dict[str, Any] = {"max_new_tokens": self.max_tokens}
        if self.temperature is None:
            return chosen
        if self.temperature == 0:
            return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return chosen | {"do_sample": True, "temperature": self.temperature}


@dataclass(frozen=True)
class Generated:
    """A text with its cost: tokens read and written, seconds until the first token and in all.

    ``is_cut``: it ends where the model's positions do.
    """

    text: str
    n_prompt_tokens: int
    n_new_tokens: int
    first_token_seconds: float
    seconds: float
    is_cut: bool = False

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second after the first one; 0 where there is only one."""
        spent = self.seconds - self.first_token_seconds
        return (self.n_new_tokens - 1) / spent if self.n_new_tokens > 1 and spent > 0 else 0.0


def has_chat_template(tokenizer: Any) -> bool:
    """Tell whether the tokenizer knows how the model wants a conversation written."""
    return bool(getattr(tokenizer, "chat_template", None))


def generate(
    model: Any,
    tokenizer: Any,
    messages: Sequence[Message],
    options: GenerateOptions,
    on_text: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Answer the last of ``messages`` (each with ``role`` and ``content``), and give each piece of text to ``on_text``.

    Without a chat template, or where ``options.raw`` asks for it, the last message's content is continued. The text
    ends where the model's positions do.

    Raises:
        OptionError: the model cannot generate, or the prompt is empty, no text, or fills the model's positions.
    """
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise OptionError(f"{type(model).__name__} does not generate text", needed="a language model")
    _check_text(messages)
    inputs = _inputs(tokenizer, messages, options).to(model.device)
    n_prompt = inputs["input_ids"].shape[1]
    room = _room(model, n_prompt)
    settings = options.settings() | {"max_new_tokens": min(options.max_tokens, room)}
    if options.seed is not None:
        torch.manual_seed(options.seed)
    streamer = _streamer(tokenizer, on_text)
    start = time.perf_counter()
    output = model.generate(**inputs, **settings, streamer=streamer)
    stop = time.perf_counter()
    n_new = output.shape[1] - n_prompt
    return Generated(
        text="".join(streamer.pieces),
        n_prompt_tokens=n_prompt,
        n_new_tokens=n_new,
        first_token_seconds=(streamer.first or stop) - start,
        seconds=stop - start,
        is_cut=n_new == room < options.max_tokens,
    )


def _check_text(messages: Sequence[Message]) -> None:
    """Refuse what came from bytes that are no UTF-8: no tokenizer takes it."""
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise OptionError("a prompt that is no UTF-8 text", fix="convert it to UTF-8") from error


def positions_of(config: Any) -> float:
    """Return how many tokens a model takes, prompt and answer together; infinity where its config tells no limit."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    return math.inf if most is None else int(most)


def _room(model: Any, n_prompt: int) -> float:
    """Return how many tokens fit behind a prompt of ``n_prompt``."""
    if n_prompt == 0:
        raise OptionError("a prompt without a token", fix="give some text")
    most = positions_of(model.config)
    if n_prompt >= most:
        fix = "shorten it, or begin another conversation"
        raise OptionError(f"a prompt of {n_prompt} tokens", needed=f"fewer than the model's {most} positions", fix=fix)
    return most - n_prompt


def _inputs(tokenizer: Any, messages: Sequence[Message], options: GenerateOptions) -> Any:
    if has_chat_template(tokenizer) and not options.raw:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return tokenizer(messages[-1]["content"], return_tensors="pt", return_token_type_ids=False)


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    """Return a streamer of transformers that notes when the first token came, and collects the text."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.pieces: list[str] = []
            self.first: float | None = None

        def put(self, value: torch.Tensor) -> None:
            if not self.next_tokens_are_prompt and self.first is None:
                self.first = time.perf_counter()
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.pieces.append(text)
            on_text(text)

    return Streamer()
