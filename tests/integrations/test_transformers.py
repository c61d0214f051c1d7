"""Packed models through from_pretrained and save_pretrained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from salr.converter.export.hf import WEIGHTS, export_hf
from salr.formats.errors import ChecksumError, FormatError
from transformers import AutoModelForCausalLM

import salr
from salr.integrations.quantizer import SalrQuantizer
from salr.runtime.experts import packed_modules

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])
OPTIONS = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="session")
def packed_file(tmp_path_factory, request):
    made = {}

    def convert(source):
        if source not in made:
            made[source] = tmp_path_factory.mktemp("files") / f"{source}.salr"
            salr.convert(request.getfixturevalue(source), made[source], OPTIONS)
        return made[source]

    return convert


@pytest.mark.parametrize("source", ["llama", "tied_llama", "llama16", "gpt2", "moe", "stacked_moe"])
def test_an_exported_directory_loads_packed_and_computes_the_same(source, packed_file, tmp_path):
    path = packed_file(source)
    model = AutoModelForCausalLM.from_pretrained(export_hf(path, tmp_path / "hf"))
    direct = salr.load(path)
    assert len(list(packed_modules(model))) == len(salr.open(path).modules) == len(list(packed_modules(direct)))
    assert torch.equal(logits(model), logits(direct))


@pytest.mark.parametrize("source", ["llama", "tied_llama", "gpt2", "moe", "stacked_moe"])
@pytest.mark.parametrize("shards", [False, True])
def test_a_saved_model_has_the_very_tensors_and_loads_again(source, shards, packed_file, tmp_path):
    path = packed_file(source)
    model = salr.load(path)
    model.save_pretrained(tmp_path / "saved", **({"max_shard_size": "20KB"} if shards else {}))
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 1) == shards
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    original = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("assets/")}
    assert saved.keys() == original.keys()
    for name in saved.keys() - {"salr.manifest"}:
        assert saved[name].dtype == original[name].dtype and saved[name].shape == original[name].shape
        assert saved[name].flatten().view(torch.uint8).equal(original[name].flatten().view(torch.uint8)), name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    # a last bit may differ: BLAS sums in another order where a weight lies at another alignment
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-6, atol=1e-7)
    again.save_pretrained(tmp_path / "twice", **({"max_shard_size": "20KB"} if shards else {}))
    for file in files:
        assert file.read_bytes() == (tmp_path / "twice" / file.name).read_bytes()


def test_without_salr_an_exported_directory_is_refused_with_what_to_do(packed_file, tmp_path):
    export_hf(packed_file("llama"), tmp_path / "hf")
    code = f"from transformers import AutoModelForCausalLM as A; A.from_pretrained({str(tmp_path / 'hf')!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0 and "add `import salr` before loading it" in done.stderr.splitlines()[-1]


def test_a_saved_model_is_refused_without_salr_too(packed_file, tmp_path):
    salr.load(packed_file("llama")).save_pretrained(tmp_path / "saved")
    assert "import salr" in json.loads((tmp_path / "saved" / "config.json").read_text())["transformers_weights"]


@pytest.mark.parametrize("order", ["import salr, transformers", "import transformers, salr"])
def test_registration_does_not_depend_on_who_is_imported_first(order, packed_file, tmp_path):
    export_hf(packed_file("llama"), tmp_path / "hf")
    code = f"""
import warnings; warnings.simplefilter("error")
{order}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "hf")!r})
print(type(model.model.layers[0].mlp.up_proj).__name__, type(model.hf_quantizer).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["SalrLinear", "SalrQuantizer"], done.stderr


@pytest.mark.parametrize("first", ["import salr; salr.SalrConfig()", "import salr.integrations.quantizer",
                                   "import salr, transformers.quantizers.auto"])  # fmt: skip
def test_config_and_quantizer_are_registered_whatever_is_imported_first(first):
    code = f"{first}\nfrom transformers.quantizers import auto\n" + (
        "print('salr' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING, 'salr' in auto.AUTO_QUANTIZER_MAPPING)"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_a_damaged_directory_never_becomes_a_model(packed_file, tmp_path):
    folder = export_hf(packed_file("llama"), tmp_path / "hf")
    data = bytearray((folder / WEIGHTS).read_bytes())
    stored = salr.open(folder / WEIGHTS).tensors["model.layers.1.mlp.up_proj.bitmap"]
    data[stored.begin] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(ChecksumError, match=r"weights.salr.safetensors: tensor 'model.layers.1.mlp.up_proj.bitmap'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_directory_without_a_manifest_is_refused(packed_file, tmp_path):
    folder = export_hf(packed_file("llama"), tmp_path / "hf")
    tensors = load_file(folder / WEIGHTS)
    del tensors["salr.manifest"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(FormatError, match=r"there is no salr.manifest among the weights.*salr export hf"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_module_that_could_not_stay_packed_is_refused_in_a_directory(tied_llama, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude", include=("model.embed_tokens",))
    salr.convert(tied_llama, tmp_path / "m.salr", options)
    with pytest.raises(FormatError, match=r"'model.embed_tokens': it cannot stay packed here: it is weight of Embedd"):
        AutoModelForCausalLM.from_pretrained(export_hf(tmp_path / "m.salr", tmp_path / "hf"))


def test_the_quantizer_says_that_adapters_can_be_trained(packed_file):
    model = salr.load(packed_file("llama"))
    assert isinstance(model.hf_quantizer, SalrQuantizer)
    assert model.hf_quantizer.is_trainable is True and model.hf_quantizer.is_serializable() is True
    assert model.is_quantized is True


def test_the_exported_file_is_the_salr_file_and_the_rest_is_the_models(packed_file, llama, tmp_path):
    path = packed_file("llama")
    folder = export_hf(path, tmp_path / "hf")
    assert (folder / WEIGHTS).read_bytes() == path.read_bytes()
    assert (folder / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    config, before = (json.loads((f / "config.json").read_text()) for f in (folder, llama))
    assert {key: value for key, value in config.items() if key in before} == before
    assert config.keys() - before.keys() == {"quantization_config", "transformers_weights"}
    shutil.rmtree(folder)
