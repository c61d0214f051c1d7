"""GSM8K as prompts and answers in token ids, and batches of them.

Invariant: batches depend on the seed only, so every variant sees the same examples in the same order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from salr.evaluation.protocol import EvalOptions, plan_windows

LONGEST_TRAINED = 384
#: batches whose examples are sorted by length together, so that little is padding
POOL = 8


class Example(NamedTuple):
    """One question: ids up to where the answer begins, the answer's ids with the end token, and the final number."""

    prompt: list[int]
    answer: list[int]
    number: str

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.prompt) + len(self.answer)


@dataclass(frozen=True)
class Data:
    """Examples trained on, kept aside from them to choose a rate, and tested; windows (n, T) of WikiText-2 test."""

    train: list[Example]
    held_out: list[Example]
    test: list[Example]
    windows: torch.Tensor
    end: int


def read_data(
    folder: Path, tokenizer: Any, style: str, n_held_out: int, n_test: int | None, n_windows: int | None
) -> Data:
    """Read GSM8K and WikiText-2; ``style`` is ``chat`` (the tokenizer's template) or ``plain`` (Question: ... Answer:).

    Training examples of more than 384 tokens are left out; the test's are all kept.
    """
    end = int(tokenizer.eos_token_id)
    train = examples(folder / "gsm8k_train.jsonl", tokenizer, style)
    train = [example for example in train if example.length <= LONGEST_TRAINED]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    test = examples(folder / "gsm8k_test.jsonl", tokenizer, style)[:n_test]
    ids = torch.tensor(tokenizer((folder / "wt2_test.txt").read_text(), verbose=False)["input_ids"])
    windows = plan_windows(len(ids), EvalOptions(max_windows=n_windows))
    return Data(
        [train[i] for i in order[n_held_out:]], [train[i] for i in order[:n_held_out]], test,
        torch.stack([ids[window.start : window.stop] for window in windows]), end,
    )  # fmt: skip


def examples(path: Path, tokenizer: Any, style: str) -> list[Example]:
    """Return the examples of one of GSM8K's files."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    if style == "chat":
        turns = [[{"role": "user", "content": record["question"]}] for record in records]
        prompts = [tokenizer.apply_chat_template(t, tokenize=False, add_generation_prompt=True) for t in turns]
    else:
        prompts = [f"Question: {record['question']}\nAnswer:" for record in records]
    space = "" if style == "chat" else " "
    asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answered = tokenizer([space + record["answer"] for record in records], add_special_tokens=False)["input_ids"]
    return [
        Example(prompt, [*answer, tokenizer.eos_token_id], final_number(record["answer"]) or "")
        for prompt, answer, record in zip(asked, answered, records, strict=True)
    ]


def final_number(text: str) -> str | None:
    """Return the number behind ``####``, without commas and trailing zeros; None where there is none."""
    found = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    if found is None:
        return None
    number = found[1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def batches(examples: Sequence[Example], size: int, seed: int) -> list[list[Example]]:
    """Return one epoch in full batches: shuffled, then sorted by length within pools of batches shuffled again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=generator).tolist()
    order = order[: len(order) // size * size]
    found = []
    for start in range(0, len(order), size * POOL):
        pool = sorted(order[start : start + size * POOL], key=lambda i: (examples[i].length, i))
        cut = [pool[i : i + size] for i in range(0, len(pool), size)]
        found += [cut[i] for i in torch.randperm(len(cut), generator=generator).tolist()]
    return [[examples[i] for i in batch] for batch in found]


def by_length(examples: Sequence[Example], most_tokens: int) -> list[list[Example]]:
    """Return all examples, longest first, in batches of at most ``most_tokens`` with padding."""
    ordered = sorted(examples, key=lambda example: -example.length)
    found: list[list[Example]] = []
    for example in ordered:
        if found and (len(found[-1]) + 1) * found[-1][0].length <= most_tokens:
            found[-1].append(example)
        else:
            found.append([example])
    return found


class Batch(NamedTuple):
    """Ids (n, T), and which positions of the n * T predict an answer's token (m,), with those tokens (m,)."""

    ids: torch.Tensor
    positions: torch.Tensor
    expected: torch.Tensor


def padded(batch: Sequence[Example], pad: int, device: torch.device) -> Batch:
    """Return examples padded on the right.

    In a causal model nothing before the padding depends on it, so no attention mask is needed.
    """
    width = -(-max(example.length for example in batch) // 8) * 8
    ids, positions, expected = torch.full((len(batch), width), pad), [], []
    for row, (prompt, answer, _) in enumerate(batch):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        first = row * width + len(prompt) - 1
        positions += range(first, first + len(answer))
        expected += answer
    return Batch(ids.to(device), torch.tensor(positions, device=device), torch.tensor(expected, device=device))
