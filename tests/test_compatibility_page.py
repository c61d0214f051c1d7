"""docs/compatibility.md: every row names a test that exists, and every form, type and refusal has a row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


def rows() -> list[str]:
    """Return the rows of all tables, without heads and rules."""
    lines = PAGE.splitlines()
    rules = {number for number, line in enumerate(lines) if re.fullmatch(r"\|(-+\|)+", line)}
    heads = {number - 1 for number in rules}
    return [line for number, line in enumerate(lines) if line.startswith("|") and number not in rules | heads]


def test_the_page_has_tables():
    assert len(rows()) > 60


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[2:40])
def test_every_row_names_a_test_that_exists(row):
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
    assert named, "the row names no test"
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), f"{path}::{name}"


def test_every_refusal_stands_on_the_page_with_its_reason():
    from salr.converter.adapters import refusals

    for kind, reason in refusals.TYPES.items():
        assert [row for row in rows() if re.search(rf"\b{kind}\b", row) and reason in row], kind
    for setting, reason in (refusals.SETTINGS | refusals.STARTS).items():
        assert [row for row in rows() if f"`{setting}`" in row and reason in row], setting


@pytest.mark.parametrize(
    "word",
    ["rsLoRA", "rank_pattern", "fan_in_fan_out", "lora_bias", 'bias="all"', "lora_only", "modules_to_save",
     "trainable_token_indices", "embedding", "target_parameters", "several adapters", "layer_replication", "DoRA",
     "PiSSA", "OLoRA", "tied", "qkv", "vision", "GGUF", "8-bit", "hub id", "shards", "licence"],
)  # fmt: skip
def test_every_form_and_layout_has_a_row(word):
    assert [row for row in rows() if word in row]
