"""Fixtures for every test: the golden file, files with one thing wrong, tiny models and adapters."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from salr.formats.container import Container, TensorSpec, plan_layout
from salr.formats.manifest import MANIFEST_NAME, canonical_json
from salr.formats.validation import ZERO_DIGEST, digest, header_digest

DATA = Path(__file__).parent / "data"

hypothesis.settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    for marker in (
        "fuzz: the long versions of tests; runs where SALR_FUZZ=1",
        "gpu: runs where torch finds a CUDA device and CuPy is installed",
        "emulated: a gpu test that is emulated elsewhere, with these values of parameters; others are fuzz",
        "large: a gpu test that takes too long to emulate",
    ):
        config.addinivalue_line("markers", marker)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _reason_without_gpu() if any(item.get_closest_marker("gpu") for item in items) else None
    for item in items:
        if reason is not None and item.get_closest_marker("gpu") and not _is_emulated(item):
            if item.get_closest_marker("emulated") is None or item.get_closest_marker("large"):
                item.add_marker(pytest.mark.skip(reason=reason))
                continue
            item.add_marker(pytest.mark.fuzz)  # emulated with the other values of its parameters
        if os.environ.get("SALR_FUZZ") != "1" and item.get_closest_marker("fuzz"):
            item.add_marker(pytest.mark.skip(reason="a long version: set SALR_FUZZ=1"))


def _is_emulated(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("emulated")
    parameters = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return marker is not None and all(parameters[name] in values for name, values in marker.kwargs.items())


def _reason_without_gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return None if importlib.util.find_spec("cupy") else "CuPy is not installed"


@dataclass
class Draft:
    """A .salr file taken apart, to be changed and written again with whatever digests the change needs.

    ``tensors`` maps names to (dtype, shape, bytes); ``manifest`` is plain JSON; ``metadata`` overrides the header's.
    """

    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]
    manifest: Any
    metadata: dict[str, str | None] = field(default_factory=dict)
    manifest_bytes: bytes | None = None
    manifest_dtype: str = "U8"

    def array(self, name: str) -> np.ndarray:
        """Return a tensor's bytes as a writable uint8 array, to be given back with ``put``."""
        return np.frombuffer(self.tensors[name][2], np.uint8).copy()

    def put(
        self, name: str, data: np.ndarray, *, dtype: str | None = None, shape: tuple[int, ...] | None = None
    ) -> None:
        """Replace a tensor's bytes and recompute its digest; dtype and shape stay unless given."""
        old_dtype, old_shape = self.tensors[name][:2] if name in self.tensors else ("U8", data.shape)
        raw = data.tobytes()
        self.tensors[name] = (dtype or old_dtype, old_shape if shape is None else shape, raw)
        self.manifest["checksums"][name] = digest(raw)

    def drop(self, name: str) -> None:
        """Remove a tensor and its digest."""
        del self.tensors[name], self.manifest["checksums"][name]

    def module(self, name: str) -> dict[str, Any]:
        return self.manifest["modules"][name]

    def write(self, path: Path) -> Path:
        """Write the file with sound header and manifest digests, except where ``metadata`` overrides them."""
        data = self.manifest_bytes if self.manifest_bytes is not None else canonical_json(self.manifest)
        metadata = {
            "format": "pt",
            "salr_version": "1",
            "salr_manifest_xxh3": digest(data),
            "salr_header_xxh3": ZERO_DIGEST,
        }
        for key, value in self.metadata.items():
            metadata.pop(key, None)
            metadata |= {} if value is None else {key: value}
        specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape, _) in self.tensors.items()]
        layout = plan_layout(specs, metadata, last=MANIFEST_NAME)
        header = layout.header(metadata, len(data))
        if self.manifest_dtype != "U8":
            header = header.replace(b'"salr.manifest":{"dtype":"U8"', b'"salr.manifest":{"dtype":"I8"')
        if "salr_header_xxh3" not in self.metadata:
            sealed = header_digest(header, ZERO_DIGEST).encode()
            header = header.replace(b'_header_xxh3":"' + ZERO_DIGEST.encode(), b'_header_xxh3":"' + sealed, 1)
        body = bytearray(layout.last_begin - layout.data_start) + data
        for name, (_, _, raw) in self.tensors.items():
            begin = layout.tensors[name].begin - layout.data_start
            body[begin : begin + len(raw)] = raw
        path.write_bytes(layout.prefix() + header + bytes(body))
        return path


def take_apart(path: Path) -> Draft:
    container = Container(path)
    manifest = json.loads(bytes(container.raw(MANIFEST_NAME)))
    tensors = {
        t.name: (t.dtype, t.shape, bytes(container.raw(t.name)))
        for t in container.tensors.values()
        if t.name != MANIFEST_NAME
    }
    return Draft(tensors, manifest)


@pytest.fixture(scope="session")
def golden() -> Path:
    """Return the version 1 file that every release has to read."""
    return DATA / "golden_v1.salr"


@pytest.fixture
def draft(golden: Path) -> Draft:
    """Return the golden file taken apart."""
    return take_apart(golden)


@pytest.fixture(scope="session")
def open_draft() -> Callable[[Path], Draft]:
    """Return the function that takes a .salr file apart."""
    return take_apart


# --- tiny models, made once a session ---------------------------------------------------------------------------------


def save_llama(folder: Path, dtype: str = "bfloat16", seed: int = 0, **config: Any) -> Path:
    """Save a Llama of 2 blocks, hidden size 64, with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**settings | config)).to(getattr(torch, dtype)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bfloat16 Llama directory."""
    return save_llama(tmp_path_factory.mktemp("llama") / "tiny-llama")


@pytest.fixture(scope="session")
def llama32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a float32 Llama directory."""
    return save_llama(tmp_path_factory.mktemp("llama32") / "tiny-llama", "float32", seed=1)


@pytest.fixture(scope="session")
def llama16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a float16 Llama directory."""
    return save_llama(tmp_path_factory.mktemp("llama16") / "tiny-llama", "float16", seed=2)


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama directory whose lm_head is its embedding."""
    return save_llama(tmp_path_factory.mktemp("tied") / "tiny-llama", seed=3, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GPT-2 directory, whose linear layers are Conv1D: (K, N) on disk."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(4)
    folder = tmp_path_factory.mktemp("gpt2") / "tiny-gpt2"
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32)).save_pretrained(folder)
    return folder


def mixtral() -> Any:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(5)
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=32,
    )  # fmt: skip
    return MixtralForCausalLM(config)


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Mixtral directory with one tensor an expert on disk."""
    folder = tmp_path_factory.mktemp("moe") / "tiny-mixtral"
    mixtral().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stacked_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Mixtral directory whose experts are 3-D tensors, as transformers holds them in memory."""
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("stacked") / "tiny-mixtral"
    model = mixtral()
    folder.mkdir()
    model.config.architectures = ["MixtralForCausalLM"]
    model.config.save_pretrained(folder)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def make_lora(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that trains nothing but saves a random LoRA of a model, made with the peft library."""

    def make(base: Path, seed: int = 0, save_embedding_layers: str | bool = "auto", **config: Any) -> Path:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**settings | config))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        folder = tmp_path_factory.mktemp("lora") / f"lora{seed}"
        model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
        return folder

    return make


@pytest.fixture(scope="session")
def lora(llama32: Path, make_lora: Callable[..., Path]) -> Path:
    """Return a plain LoRA of ``llama32``: rank 4, alpha 6, on q_proj and down_proj."""
    return make_lora(llama32)


@pytest.fixture(scope="session")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return ``llama`` converted at 50 %, rank 8."""
    import salr

    out = tmp_path_factory.mktemp("packed") / "llama.salr"
    salr.convert(llama, out, salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude"))
    return out


@pytest.fixture(scope="session")
def export_command(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return what ``salr export onnx`` of ``packed`` came to (typer's Result) and the directory, for reading only."""
    from typer.testing import CliRunner

    from salr.cli import app

    folder = tmp_path_factory.mktemp("export") / "llama"
    return CliRunner().invoke(app, ["export", "onnx", str(packed), str(folder)]), folder


@pytest.fixture(scope="session")
def read_tensors() -> Callable[[Path], dict[str, Any]]:
    """Return a function that reads the safetensors files of a directory into torch tensors."""

    def read(folder: Path) -> dict[str, Any]:
        from safetensors.torch import load_file

        return {
            name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()
        }

    return read


@pytest.fixture(scope="session")
def calibration() -> Callable[..., Any]:
    """Return a function that makes small calibration options: random tokens, unless a text is given."""
    from salr.converter.options import CalibrationOptions

    def make(text: str | Path = "synthetic", **settings: int) -> CalibrationOptions:
        return CalibrationOptions(str(text), **{"samples": 3, "length": 24} | settings)

    return make


@pytest.fixture(scope="session")
def speaker(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return ``llama`` with a tokenizer of the words w0, w1 ... and a chat template, as a .salr file."""
    import shutil

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    import salr

    folder = shutil.copytree(llama, tmp_path_factory.mktemp("speaker") / "tiny-speaker")
    (folder / "tokenizer.json").unlink()
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(128)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}w{{ 100 + m.role|length }} {{ m.content }} {% endfor %}w99"
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", chat_template=template).save_pretrained(folder)
    out = folder.parent / "speaker.salr"
    salr.convert(folder, out, salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude"))
    return out
