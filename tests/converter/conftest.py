"""Small checkpoints and files: quantized ones and how they are judged, adapters to edit and what a refusal leaves."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import salr

MAGNITUDE = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude")


@pytest.fixture(scope="module")
def one_thread():
    """Compute with one thread, as conversions do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save_block(folder: Path, dtype: str, n_key_value_heads: int = 2) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=40, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=n_key_value_heads, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bfloat16 Llama of one block: 48 x 48, 24 x 48, 40 x 48 and 48 x 40 layers."""
    return save_block(tmp_path_factory.mktemp("block") / "tiny", "bfloat16")


@pytest.fixture(scope="session")
def block32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same in float32."""
    return save_block(tmp_path_factory.mktemp("block32") / "tiny", "float32")


@pytest.fixture(scope="session")
def narrow_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bfloat16 one with a single head of keys and values, whose layers are 12 x 48."""
    return save_block(tmp_path_factory.mktemp("narrow") / "tiny", "bfloat16", n_key_value_heads=1)


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a checkpoint with one module's weight changed."""

    def change(source: Path, module: str, function: Callable[[Any], Any]) -> Path:
        copy = shutil.copytree(source, tmp_path / "changed")
        tensors = load_file(copy / "model.safetensors")
        tensors[f"{module}.weight"] = function(tensors[f"{module}.weight"].clone()).contiguous()
        save_file(tensors, copy / "model.safetensors", {"format": "pt"})
        return copy

    return change


@pytest.fixture
def edited_model(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies a model directory to ``tmp_path/m`` and changes keys of its config.

    ``without`` leaves out the weights whose names a regular expression finds; a key that is None goes.
    """

    def edit(source: Path, without: str | None = None, **changes: Any) -> Path:
        folder = shutil.copytree(source, tmp_path / "m")
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(config))
        if without is not None:
            weights = load_file(folder / "model.safetensors")
            kept = {name: weight for name, weight in weights.items() if re.search(without, name) is None}
            save_file(kept, folder / "model.safetensors", {"format": "pt"})
        return folder

    return edit


@pytest.fixture(scope="session")
def options_of(calibration: Callable[..., Any]) -> Callable[..., salr.ConvertOptions]:
    """Return a function that makes quick options from settings of modules and of the conversion in one."""

    def make(method: str = "magnitude", sparsity: float = 0.5, rank: int | None = 4, **settings: Any) -> Any:
        names = [field.name for field in dataclasses.fields(salr.ModuleOptions)]
        module = salr.ModuleOptions(sparsity, rank, **{name: settings.pop(name) for name in names if name in settings})
        data = None if method == "magnitude" else calibration()
        return salr.ConvertOptions(**{"module": module, "method": method, "rounds": 4, "calibration": data, **settings})

    return make


@pytest.fixture
def quantize(options_of: Callable[..., Any], tmp_path: Path) -> Callable[..., salr.SalrFile]:
    """Return a function that converts with ``options_of`` and opens the file."""

    def run(source: Path, name: str = "m.salr", **settings: Any) -> salr.SalrFile:
        salr.convert(source, tmp_path / name, options_of(**settings))
        return salr.open(tmp_path / name)

    return run


@pytest.fixture(scope="session")
def complaints() -> Callable[..., list[str]]:
    """Return a function that lists what ``salr verify --against`` would complain about."""
    from salr.converter.verification import compare_with_source

    def compare(file: salr.SalrFile, source: Path, adapters: tuple[tuple[str, Path], ...] = ()) -> list[str]:
        found = [str(problem) for _, problem in file.check_all() if problem]
        return found + [str(problem) for _, problem in compare_with_source(file, source, adapters) if problem]

    return compare


@pytest.fixture(scope="session")
def oriented() -> Callable[..., np.ndarray]:
    """Return a function that reads the source's weight of a module as (N, K) in float64."""

    def read(source: Path, entry: Any) -> np.ndarray:
        weight = load_file(source / "model.safetensors")[entry.source_tensor].double().numpy()
        return weight.swapaxes(-1, -2) if entry.transposed else weight

    return read


@pytest.fixture(scope="session")
def check_errors(oriented: Callable[..., np.ndarray]) -> Callable[..., None]:
    """Return a function that compares every error of a manifest with the one of the file's weights, in float64."""

    def check(file: salr.SalrFile, source: Path) -> None:
        for name, entry in file.modules.items():
            weight = oriented(source, entry)
            energy = (weight**2).sum()
            removed = (weight[~file.module(name).mask()] ** 2).sum() / energy
            lost = ((weight - file.dense(name)) ** 2).sum() / energy
            assert 0 < lost < 1 or entry.pattern == "dense", name
            found = (entry.error.energy, entry.error.mask, entry.error.residual)
            np.testing.assert_allclose(found, (energy, removed, lost), rtol=2e-5, atol=1e-11, err_msg=name)

    return check


@pytest.fixture(scope="session")
def check_scales() -> Callable[..., dict[str, Any]]:
    """Return a function that checks a file's scales, float16 and 0 where nothing is kept, and returns such modules."""

    def check(file: salr.SalrFile) -> dict[str, Any]:
        quantized = {name: entry for name, entry in file.modules.items() if entry.group_size is not None}
        for name, entry in quantized.items():
            mask, scales = file.module(name).mask(), file.module(name).scales
            starts = range(0, entry.n_columns, entry.group_size)
            kept = np.stack([mask[..., at : at + entry.group_size].any(-1) for at in starts], -1)
            assert file.tensors[f"{name}.scales"].dtype == "F16" and scales.shape == kept.shape
            assert (scales >= 0).all() and np.isfinite(scales).all() and not scales[~kept].any()
            assert (scales[kept] > 0).mean() > 0.95
        return quantized

    return check


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
    salr.convert(llama32, out, dataclasses.replace(MAGNITUDE, adapters=(("a", lora),)))
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


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with a vision tower, whose language model has another name on disk than in the class."""
    import torch
    import transformers

    torch.manual_seed(8)
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    folder = tmp_path_factory.mktemp("llava") / "tiny-llava"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder
