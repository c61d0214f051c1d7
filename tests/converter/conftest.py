"""Files with adapters to edit, and what a refused edit must leave alone."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

import salr

MAGNITUDE = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude")


@pytest.fixture(scope="module")
def plain(llama32, tmp_path_factory):
    """Return ``llama32`` converted without a trained adapter."""
    out = tmp_path_factory.mktemp("plain") / "plain.salr"
    salr.convert(llama32, out, MAGNITUDE)
    return out


@pytest.fixture(scope="module")
def adapted(llama32, lora, tmp_path_factory):
    """Return ``llama32`` converted with the LoRA as adapter ``a``."""
    out = tmp_path_factory.mktemp("adapted") / "adapted.salr"
    salr.convert(llama32, out, replace(MAGNITUDE, adapters=(("a", lora),)))
    return out


@pytest.fixture
def mine(adapted, tmp_path):
    """Return a copy of ``adapted``, to be edited in place."""
    return shutil.copy(adapted, tmp_path / "mine.salr")


@pytest.fixture(scope="session")
def refuses():
    """Return a function that expects one line with ``words``, and neither the file nor its folder touched."""

    def run(path, kind, words, edit, *arguments, **options):
        before, names = path.read_bytes(), {p.name for p in path.parent.iterdir()}
        with pytest.raises(kind) as error:
            edit(path, *arguments, **options)
        assert "\n" not in str(error.value)
        for word in [words] if isinstance(words, str) else words:
            assert word in str(error.value)
        assert path.read_bytes() == before and {p.name for p in path.parent.iterdir()} == names

    return run
