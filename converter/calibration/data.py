"""Calibration tokens: a little text (or none) cut into windows of equal length.

Invariant: the same file, tokenizer, options and seed give the same tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ...formats.errors import CalibrationError
from ..options import SYNTHETIC, CalibrationOptions
from ..sources.checkpoint import Checkpoint, read_json

#: names of the number of positions in config.json
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
_PAIRS = (("question", "answer"), ("prompt", "completion"), ("instruction", "output"))


def calibration_tokens(options: CalibrationOptions, checkpoint: Checkpoint) -> torch.Tensor:
    """Return token ids (samples, length), int64.

    Raises:
        CalibrationError: the text is missing, empty or too short, a line has no text, or there is no tokenizer.
    """
    length = window_length(options, checkpoint)
    generator = torch.Generator().manual_seed(options.seed)
    if options.text == SYNTHETIC:
        return _synthetic_tokens(checkpoint, options.samples, length, generator)
    ids = _tokenize(Path(options.text), checkpoint)
    if len(ids) <= length:
        raise CalibrationError(
            f"{len(ids)} tokens of text",
            path=options.text,
            needed=f"more than {length}",
            fix="give more text, or a smaller --calibration-length",
        )
    starts = torch.randint(0, len(ids) - length, (options.samples,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


def window_length(options: CalibrationOptions, checkpoint: Checkpoint) -> int:
    """Return how many tokens a window has: as many as asked for, and as the model has positions."""
    limits = [config.get(name) for config in _configs(checkpoint) for name in _POSITIONS]
    return min([options.length, *(limit for limit in limits if isinstance(limit, int) and limit > 0)])


def _configs(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Return config.json, and what it says of the text of models that see, too."""
    text = checkpoint.config.get("text_config")
    return [checkpoint.config, *([text] if isinstance(text, dict) else [])]


def _synthetic_tokens(checkpoint: Checkpoint, samples: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return random tokens: with Zipf's frequencies, 1/(id + 30), where ids are ordered by frequency, else uniform.

    Vocabularies of byte-pair and unigram tokenizers are so ordered; special tokens are left out.
    """
    size = next((config["vocab_size"] for config in _configs(checkpoint) if config.get("vocab_size")), None)
    if not isinstance(size, int):
        raise CalibrationError(
            "no vocab_size in config.json", path=checkpoint.directory, fix="give a text with --calibration FILE"
        )
    path = checkpoint.folder / "tokenizer.json"
    tokenizer = read_json(path, "it orders the vocabulary") if path.is_file() else {}
    model = tokenizer.get("model")
    ordered = not (isinstance(model, dict) and model.get("type") == "WordPiece")
    weights = 1 / (torch.arange(size, dtype=torch.float64) + 30) if ordered else torch.ones(size, dtype=torch.float64)
    weights[_special_ids(tokenizer, size)] = 0
    return torch.multinomial(weights, samples * length, replacement=True, generator=generator).view(samples, length)


def _special_ids(tokenizer: dict[str, Any], size: int) -> list[int]:
    """Return the ids below ``size`` that a tokenizer.json calls special; what has another form is skipped."""
    added = tokenizer.get("added_tokens")
    tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    ids = [token.get("id") for token in tokens if token.get("special")]
    return [index for index in ids if type(index) is int and 0 <= index < size]


def _tokenize(path: Path, checkpoint: Checkpoint) -> torch.Tensor:
    """Return the text's token ids as one row."""
    tokenizer = load_tokenizer(checkpoint)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CalibrationError(f"cannot be read ({error.strerror})", path=path) from error
    except UnicodeDecodeError as error:
        raise CalibrationError("is no UTF-8 text", path=path, needed="a .txt or .jsonl file") from error
    if path.suffix == ".jsonl":
        content = "\n\n".join(_record_text(line, number, path, tokenizer) for number, line in _lines(content))
    return torch.tensor(tokenizer(content, verbose=False)["input_ids"], dtype=torch.int64)


def _lines(content: str) -> list[tuple[int, str]]:
    return [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _record_text(line: str, number: int, path: Path, tokenizer: Any) -> str:
    """Return the text of one JSONL record: text, chat messages (through the chat template), or a known pair."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"line {number} is not JSON ({error})", path=path) from error
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return str(record["text"])
        if isinstance(record.get("messages"), list):
            if not tokenizer.chat_template:
                raise CalibrationError(
                    f"line {number} holds chat messages", path=path, needed="a tokenizer with a chat template"
                )
            return str(tokenizer.apply_chat_template(record["messages"], tokenize=False))
        for pair in _PAIRS:
            if all(isinstance(record.get(key), str) for key in pair):
                return "\n".join(record[key] for key in pair)
    known = "text, messages, " + ", ".join("+".join(pair) for pair in _PAIRS)
    raise CalibrationError(f"line {number} has no text", path=path, needed=f"an object with one of: {known}")


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """Return the checkpoint's tokenizer.

    Raises:
        CalibrationError: there is none, or transformers cannot load it.
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types; all mean that there is no usable tokenizer
        raise CalibrationError(
            f"no usable tokenizer ({str(error).splitlines()[0][:120]})",
            path=checkpoint.directory,
            fix="copy the model's tokenizer files beside its weights",
        ) from error
