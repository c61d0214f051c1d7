"""Each architecture: a loaded .salr file computes what its unpacked, dense twin computes, and generates."""

from __future__ import annotations

import pytest
import torch
import transformers

import salr
from salr.runtime.experts import SalrExperts, packed_modules
from salr.runtime.linear import SalrLinear

DECODERS = [
    "llama2", "llama3", "mistral", "qwen2", "qwen3", "gemma", "phi", "gpt2", "mixtral", "deepseek_v2",
]  # fmt: skip
IDS = torch.tensor([[3, 14, 15, 92, 65, 35], [8, 9, 7, 9, 3, 2]])


def dense_twin(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    return getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_the_output_is_that_of_the_unpacked_model(name, convert_random):
    path, unpacked = convert_random(name)
    model, dense = salr.load(path), dense_twin(unpacked)
    with torch.no_grad():
        found, expected = model(IDS)[0], dense(IDS)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not model.training


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_every_packed_module_of_the_file_stays_packed(name, convert_random):
    path, _ = convert_random(name)
    model, file = salr.load(path), salr.open(path)
    packed = dict(packed_modules(model))
    assert len(packed) == len(file.modules)
    assert sum(module.entry.nnz for module in packed.values()) == sum(entry.nnz for entry in file.modules.values())
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n]
    assert not [linear for linear in linears if type(linear).__name__ == "Linear"]


@pytest.mark.parametrize("name", DECODERS)
def test_generation_is_that_of_the_unpacked_model(name, convert_random):
    path, unpacked = convert_random(name)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = salr.load(path).generate(IDS, **options)
    assert found.tolist() == dense_twin(unpacked).generate(IDS, **options).tolist()
    assert found.shape == (2, 14)


def test_experts_are_one_module_in_memory_whatever_their_form_on_disk(moe, stacked_moe, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude")
    logits = []
    for name, source in (("single", moe), ("stacked", stacked_moe)):
        salr.convert(source, tmp_path / f"{name}.salr", options)
        salr.unpack(tmp_path / f"{name}.salr", tmp_path / name)
        model, dense = salr.load(tmp_path / f"{name}.salr"), dense_twin(tmp_path / name)
        experts = [module for module in model.modules() if isinstance(module, SalrExperts)]
        assert len(experts) == 2 and all((module.names is None) == (name == "stacked") for module in experts)
        with torch.no_grad():
            logits.append(model(IDS % 64).logits)
            torch.testing.assert_close(logits[-1], dense(IDS % 64).logits, rtol=1e-4, atol=1e-5)
    assert not torch.equal(*logits)


def test_experts_of_which_only_some_are_packed_are_loaded_dense(moe, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude", exclude=("*.0.*experts.3.w2",))
    salr.convert(moe, tmp_path / "m.salr", options)
    salr.unpack(tmp_path / "m.salr", tmp_path / "out")
    model = salr.load(tmp_path / "m.salr")
    assert [isinstance(layer.mlp.experts, SalrExperts) for layer in model.model.layers] == [False, True]
    with torch.no_grad():
        torch.testing.assert_close(model(IDS % 64).logits, dense_twin(tmp_path / "out")(IDS % 64).logits)


def test_a_tied_head_stays_tied_and_a_packed_embedding_is_loaded_dense(tied_llama, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude", include=("model.embed_tokens",))
    salr.convert(tied_llama, tmp_path / "m.salr", options)
    salr.unpack(tmp_path / "m.salr", tmp_path / "out", dtype="fp32")
    model = salr.load(tmp_path / "m.salr", dtype="fp32")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.model.layers[0].mlp.up_proj, SalrLinear)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, dense_twin(tmp_path / "out")(IDS).logits, rtol=1e-4, atol=1e-5)
