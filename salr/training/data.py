"""Training examples from JSONL: what a file's lines are is recognised from the first, and held against all others.

Invariant: an example's labels are -100 (no loss) but for the tokens to be learned: answers where there is a prompt,
everything where there is text alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .errors import DataError

IGNORED = -100
#: fields of a line -> what it is called
FORMS = {
    ("messages",): "conversations",
    ("prompt", "completion"): "prompts with completions",
    ("question", "answer"): "questions with answers",
    ("text",): "texts",
}
_ROLES = ("system", "user", "assistant", "tool")


class Example(NamedTuple):
    """Token ids (T,) and labels (T,)."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class TrainingData:
    """Examples in the file's order, and how they came about.

    ``n_cut``: longer than the maximum, ``n_left_out``: without a token to learn (within the maximum).
    """

    examples: Sequence[Example]
    form: str
    through_template: bool
    n_cut: int
    n_left_out: int

    @property
    def n_tokens(self) -> int:
        """Tokens of all examples."""
        return sum(len(example.input_ids) for example in self.examples)

    @property
    def n_learned(self) -> int:
        """Tokens with a loss."""
        return sum(label != IGNORED for example in self.examples for label in example.labels[1:])

    def describe(self) -> str:
        """Return in one line what was recognised."""
        how = ", through the chat template" if self.through_template else ""
        what = "all tokens" if self.form == FORMS["text",] else "answers only"
        left = f"; {self.n_cut} cut" * bool(self.n_cut) + f"; {self.n_left_out} left out" * bool(self.n_left_out)
        count, learned = len(self.examples), f"{self.n_learned} of {self.n_tokens} tokens"
        return f"{count} {self.form}{how}; loss on {what} ({learned}){left}"


def read_training_data(path: str | Path, tokenizer: Any, max_length: int) -> TrainingData:
    """Return the examples of a JSONL file, cut at ``max_length`` tokens.

    A line is an object with ``messages`` (role and content, through the chat template; loss on what the assistant
    says), ``prompt`` and ``completion`` (as they are, then the end token), ``question`` and ``answer`` (through the
    chat template where there is one) or ``text``.

    Raises:
        DataError: the file cannot be read or is empty, a line lacks a field or has another form than the first, or no
            example has a token to learn.
    """
    path = Path(path)
    records = list(_records(path))
    if not records:
        raise DataError("holds no examples", path=path, needed="JSON objects, one a line")
    fields = _fields(path, *records[0])
    through_template = fields == ("messages",) or (fields == ("question", "answer") and bool(tokenizer.chat_template))
    if fields == ("messages",) and not tokenizer.chat_template:
        raise DataError("holds conversations", path=path, needed="a tokenizer with a chat template")
    whole = [_example(_Line(path, number, record), fields, tokenizer, through_template) for number, record in records]
    cut = [Example(example.input_ids[:max_length], example.labels[:max_length]) for example in whole]
    kept = [example for example in cut if _has_something_to_learn(example)]
    if not kept and any(map(_has_something_to_learn, whole)):
        found = f"no example has a token to learn within {max_length} tokens"
        raise DataError(found, path=path, fix="give a larger --max-length")
    if not kept:
        needed = "what an assistant says" if fields == ("messages",) else f"{fields[-1]}s that are not empty"
        raise DataError("no example has a token to learn", path=path, needed=needed)
    n_cut = sum(len(example.input_ids) > max_length for example in whole)
    return TrainingData(kept, FORMS[fields], through_template, n_cut, len(whole) - len(kept))


def collate(examples: Sequence[dict[str, list[int]]], padding: int = 0) -> dict[str, torch.Tensor]:
    """Return a batch: ``input_ids``, ``labels`` and ``attention_mask`` (S, T), padded on the right."""
    length = max(len(example["input_ids"]) for example in examples)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    ids = [list(example["input_ids"]) for example in examples]
    return {
        "input_ids": padded(ids, padding),
        "labels": padded([list(example["labels"]) for example in examples], IGNORED),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
    }


class _Line(NamedTuple):
    path: Path
    number: int
    record: dict[str, Any]

    def error(self, found: str, needed: str | None = None) -> DataError:
        return DataError(f"line {self.number} {found}", path=self.path, needed=needed)

    def text(self, field: str) -> str:
        """Return a field that must be text."""
        if field not in self.record:
            raise self.error(f"has no field '{field}'", "the fields of the first line")
        value = self.record[field]
        if not isinstance(value, str):
            raise self.error(f"has a field '{field}' that is {type(value).__name__}", "text")
        self._check_unicode(value)
        return value

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages, each with a role and a content."""
        found = self.record.get("messages")
        if found is None:
            raise self.error("has no field 'messages'", "the fields of the first line")
        if not isinstance(found, list) or not found:
            raise self.error("has a field 'messages' that is no list, or empty", "a list of messages")
        for message in found:
            for key in ("role", "content"):
                if not isinstance(message, dict) or key not in message:
                    raise self.error(f"has a message without a field '{key}'", "text")
                if not isinstance(message[key], str):
                    raise self.error(f"has a message whose '{key}' is {type(message[key]).__name__}", "text")
                self._check_unicode(message[key])
            if message["role"] not in _ROLES:
                raise self.error(f"has a message of role {message['role']!r}", "one of " + ", ".join(_ROLES))
        return found

    def _check_unicode(self, text: str) -> None:
        """Refuse half of a surrogate pair, which JSON can spell and no tokenizer takes."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise self.error(f"holds half a character (\\u{ord(text[error.start]):04x})", "Unicode text") from error


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", path=path, fix="check the path") from error
    except UnicodeDecodeError as error:
        raise DataError("is no UTF-8 text", path=path, needed="a .jsonl file") from error
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"line {number} is not JSON ({reason})", path=path, needed="a JSON object") from error
        if not isinstance(record, dict):
            raise DataError(f"line {number} is {type(record).__name__}", path=path, needed="a JSON object")
        yield number, record


def _has_something_to_learn(example: Example) -> bool:
    return any(label != IGNORED for label in example.labels[1:])


def _fields(path: Path, number: int, record: dict[str, Any]) -> tuple[str, ...]:
    """Return which form the first line has."""
    for fields in FORMS:
        if all(field in record for field in fields):
            return fields
    held = f"the fields {', '.join(sorted(record))}" if record else "no fields"
    forms = "; or ".join(" and ".join(fields) for fields in FORMS)
    raise DataError(f"line {number} has {held}", path=path, needed=forms)


def _example(line: _Line, fields: tuple[str, ...], tokenizer: Any, through_template: bool) -> Example:
    if fields == ("text",):
        ids = _tokens(tokenizer, line.text("text"), is_end=True)
        return Example(ids, list(ids))
    if fields == ("messages",):
        return _conversation(line, line.messages(), tokenizer)
    prompt, answer = (line.text(field) for field in fields)
    if through_template:
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return _conversation(line, messages, tokenizer)
    if fields == ("question", "answer"):
        prompt += "\n"
    ids = _tokens(tokenizer, prompt + answer, is_end=True)
    n_prompt = _common(ids, _tokens(tokenizer, prompt))
    return Example(ids, [IGNORED] * n_prompt + ids[n_prompt:])


def _conversation(line: _Line, messages: list[dict[str, Any]], tokenizer: Any) -> Example:
    """Return a conversation in the model's chat format, with a loss on what the assistant says."""

    def spoken(part: list[dict[str, Any]], is_open: bool = False) -> list[int]:
        text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=is_open)
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    try:
        ids = spoken(messages)
        labels = [IGNORED] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = _common(ids, spoken(messages[:index], is_open=True)) if index else 0
            end = _common(ids, spoken(messages[: index + 1]))
            labels[begin:end] = ids[begin:end]
    except Exception as error:  # a template is a program of the model's, and raises what it likes
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise line.error(f"does not fit the chat template ({reason})") from error
    return Example(ids, labels)


def _tokens(tokenizer: Any, text: str, *, is_end: bool = False) -> list[int]:
    """Return a text's tokens with those that the tokenizer adds at a beginning, and the end token if asked."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    end = tokenizer.eos_token_id
    if end is None:
        return ids
    ids = ids[:-1] if ids and ids[-1] == end else ids
    return [*ids, end] if is_end else ids


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens both begin with: one that spans the border belongs to the answer."""
    pairs = zip(first, second, strict=False)
    return next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
