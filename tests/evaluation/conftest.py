"""Tiny models that can read: a word-level tokenizer, a text, and the Llama of tests/conftest.py with both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import salr

N_WORDS = 120


def add_tokenizer(folder: Path, n_words: int = N_WORDS) -> Path:
    """Give a model directory a tokenizer of the words w0, w1 ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(n_words)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    (folder / "tokenizer.json").unlink(missing_ok=True)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    return folder


def sharpen(folder: Path, factor: float = 12.0) -> Path:
    """Scale the output layer, so that the random model has opinions: perplexities differ and choices are clear."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = "lm_head.weight"
    tensors[name] = (tensors[name].float() * factor).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def text() -> str:
    """Return 205 words; 60 of them are ids up to 59, so that smaller vocabularies know them too."""
    return " ".join(f"w{number}" for number in np.random.default_rng(0).integers(0, 60, 205))


@pytest.fixture(scope="session")
def text_file(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the text in a file."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(text)
    return path


@pytest.fixture(scope="session")
def reader(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bfloat16 Llama directory with a tokenizer."""
    return sharpen(add_tokenizer(shutil.copytree(llama, tmp_path_factory.mktemp("reader") / "tiny-reader")))


@pytest.fixture(scope="session")
def reader_salr(reader: Path, make_lora: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return ``reader`` at 50 %, rank 8, with a trained adapter."""
    out = tmp_path_factory.mktemp("packed") / "reader.salr"
    adapters = (("style", make_lora(reader, seed=7)),)
    salr.convert(reader, out, salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude", adapters=adapters))
    return out


@pytest.fixture(scope="session")
def readers() -> Callable[[Path, Path], Path]:
    """Return a function that copies a model of tests/conftest.py and gives it a tokenizer."""
    return lambda source, out: add_tokenizer(shutil.copytree(source, out), 60)


@pytest.fixture
def edit_config() -> Callable[..., Path]:
    """Return a function that changes keys of a directory's config.json."""

    def edit(folder: Path, **values: Any) -> Path:
        config = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return edit
