"""PEFT directories: every key understood or refused with the reason, factors and scaling as PEFT resolves them."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from salr.converter.adapters.source import Adapter, is_adapter_directory
from salr.formats.errors import AdapterError, OptionError, SalrError, SourceError

import salr

Q = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}.lora_A.weight"


@pytest.fixture
def broken(lora, tmp_path):
    """Return a copy of the LoRA, to be damaged."""
    return shutil.copytree(lora, tmp_path / "adapter")


def edit_config(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not ...}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def edit_weights(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def refused(llama32, folder, tmp_path, *words, kind=AdapterError):
    """Convert with the adapter; expect an error with ``words`` in one line and no output."""
    with pytest.raises(kind) as error:
        salr.convert(llama32, tmp_path / "out.salr", salr.ConvertOptions(adapters=(("a", folder),), method="magnitude"))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "out.salr").exists() and not (tmp_path / "out.salr.partial").exists()


def test_every_factor_of_an_adapter_is_found_with_rank_alpha_and_scaling(lora):
    adapter = Adapter(lora, "a")
    assert sorted(adapter.pairs) == [
        f"model.layers.{i}.{leaf}" for i in (0, 1) for leaf in ("mlp.down_proj", "self_attn.q_proj")
    ]
    assert {(pair.rank, pair.alpha, pair.scaling) for pair in adapter.pairs.values()} == {(4, 6, 1.5)}
    tensors = load_file(lora / "adapter_model.safetensors")
    assert set(adapter.keys) == set(tensors)
    for key, tensor in tensors.items():
        assert bytes(adapter.raw(key)) == tensor.numpy().tobytes()


@pytest.mark.parametrize("use_rslora", [False, True])
def test_patterns_and_rslora_give_the_scaling_that_peft_uses(llama32, make_lora, use_rslora):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    patterns = {
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "down_proj": 8},
        "alpha_pattern": {"^.*q_proj": 3, "down_proj": 5},
    }
    folder = make_lora(llama32, 7, use_rslora=use_rslora, **patterns)
    pairs = Adapter(folder, "a").pairs
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama32), folder).base_model.model
    for name, pair in pairs.items():
        layer = model.get_submodule(name)
        assert (pair.rank, pair.alpha) == (layer.r["default"], layer.lora_alpha["default"])
        assert math.isclose(pair.scaling, layer.scaling["default"], rel_tol=1e-12)
    assert {pair.rank for pair in pairs.values()} == {2, 4, 8}


def test_factors_in_the_file_are_the_trained_bits_in_their_own_dtype(llama, lora, tmp_path):
    half = shutil.copytree(lora, tmp_path / "half")
    edit_weights(half, lambda tensors: tensors.update({key: tensor.half() for key, tensor in tensors.items()}))
    salr.convert(
        llama, tmp_path / "m.salr", salr.ConvertOptions(adapters=(("a", lora), ("b", half)), method="magnitude")
    )
    file = salr.open(tmp_path / "m.salr")
    for name, folder, dtype in (("a", lora, "F32"), ("b", half, "F16")):
        tensors = load_file(folder / "adapter_model.safetensors")
        for factor in ("lora_A", "lora_B"):
            stored = file.tensors[f"{Q}.{factor}.{name}"]
            assert stored.dtype == dtype
            assert bytes(file.raw(stored.name)) == tensors[f"base_model.model.{Q}.{factor}.weight"].numpy().tobytes()
    assert [(a.name, a.rank, a.alpha, a.scaling) for a in file.modules[Q].adapters[1:]] == [
        ("a", 4, 6, 1.5),
        ("b", 4, 6, 1.5),
    ]


def test_the_concatenated_adapters_equal_the_sum_of_the_pairs(llama32, lora, make_lora, tmp_path):
    second = make_lora(llama32, 1, r=2, use_rslora=True, target_modules=["q_proj"])
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), adapters=(("a", lora), ("b", second)), method="magnitude")
    salr.convert(llama32, tmp_path / "m.salr", options)
    file = salr.open(tmp_path / "m.salr")
    expected = file.adapters(Q, ["residual"]).product().astype(np.float64)
    for folder, scaling in ((lora, 1.5), (second, 6 / math.sqrt(2))):
        tensors = load_file(folder / "adapter_model.safetensors")
        expected += scaling * (tensors[KEY.replace("_A", "_B")].double() @ tensors[KEY].double()).numpy()
    stack = file.adapters(Q)
    assert stack.ranks == {"residual": slice(0, 8), "a": slice(8, 12), "b": slice(12, 14)}
    np.testing.assert_allclose(stack.product(), expected, atol=1e-6)


def test_an_adapter_directory_as_source_brings_its_own_base(llama32, lora, tmp_path):
    salr.convert(lora, tmp_path / "own.salr", salr.ConvertOptions(method="magnitude"))
    salr.convert(lora, tmp_path / "given.salr", salr.ConvertOptions(base=llama32, method="magnitude"))
    assert (tmp_path / "own.salr").read_bytes() == (tmp_path / "given.salr").read_bytes()
    file = salr.open(tmp_path / "own.salr")
    assert [adapter.name for adapter in file.modules[Q].adapters] == ["residual", "default"]
    assert {line.file for line in file.manifest.ledger if ".lora_" in line.key} == {"default/adapter_model.safetensors"}
    assert "adapter_config.json" not in file.assets and is_adapter_directory(lora) and not is_adapter_directory(llama32)


def test_a_bin_adapter_reads_like_its_safetensors(llama32, broken, lora, tmp_path):
    torch.save(load_file(broken / "adapter_model.safetensors"), broken / "adapter_model.bin")
    (broken / "adapter_model.safetensors").unlink()
    first, second = Adapter(lora, "a"), Adapter(broken, "a")
    assert list(first.pairs) == list(second.pairs)
    assert all(first.raw(key) == second.raw(key) for key in first.keys)


@pytest.mark.parametrize("base", [None, "meta-llama/Llama-3-8B", "/nowhere"])
def test_a_base_that_is_not_here_is_named(broken, tmp_path, base):
    edit_config(broken, base_model_name_or_path=base)
    with pytest.raises(SourceError, match="is not on this machine; give --base DIR") as error:
        salr.convert(broken, tmp_path / "out.salr")
    assert base is None or f"'{base}'" in str(error.value)


def test_a_base_with_a_model_as_source_is_refused(llama, tmp_path):
    with pytest.raises(OptionError, match="--base, needed an adapter directory as source; drop --base"):
        salr.convert(llama, tmp_path / "out.salr", salr.ConvertOptions(base=llama, method="magnitude"))


def test_an_adapter_for_another_architecture_is_refused(llama32, gpt2, make_lora, tmp_path):
    other = make_lora(gpt2, 2, target_modules=["c_attn"], fan_in_fan_out=True)
    refused(llama32, other, tmp_path, "transformer.h.0.attn.c_attn", "has no such module", "trained on another model?")


def test_an_adapter_for_another_size_is_refused_with_both_shapes(llama32, broken, tmp_path):
    edit_weights(broken, lambda tensors: tensors.update({KEY: torch.zeros(4, 32)}))
    refused(llama32, broken, tmp_path, f"tensor '{Q}': factors for a 64 x 32 weight, needed 64 x 64")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("base_model.model.lm_head.weight", "[4, 64], needed [128, 64]"),
        ("base_model.model.lm_head.wait", "has no such module or tensor as lm_head.wait"),
        (f"base_model.model.{Q}.lora_embedding_A", f"'{Q}': lora_B is missing"),
        (f"base_model.model.{Q}.lora_magnitude_vector", "[4, 64], needed a vector"),
        (f"base_model.model.{Q}.lora_A.bias", "is no key of a LoRA that this version knows"),
        ("junk", "is no key of a LoRA that this version knows"),
    ],
)
def test_an_unmatched_adapter_key_is_named(llama32, broken, tmp_path, key, words):
    edit_weights(broken, lambda tensors: tensors.update({key: torch.zeros(4, 64)}))
    refused(llama32, broken, tmp_path, f"tensor '{key}'" if words[0] != "'" else Q, words)


def test_a_factor_without_its_partner_is_named(llama32, broken, tmp_path):
    edit_weights(broken, lambda tensors: tensors.pop(KEY))
    refused(llama32, broken, tmp_path, f"tensor '{Q}': lora_A is missing")


def test_a_rank_that_the_config_does_not_give_is_refused(llama32, broken, tmp_path):
    edit_config(broken, r=8)
    refused(llama32, broken, tmp_path, "lora_A [4, ", "needed rank 8, which adapter_config.json gives")


def test_a_factor_of_integers_is_refused(llama32, broken, tmp_path):
    edit_weights(broken, lambda tensors: tensors.update({KEY: torch.zeros(4, 64, dtype=torch.int8)}))
    refused(llama32, broken, tmp_path, f"tensor '{KEY}': I8 [4, 64], needed a float tensor")


def test_an_adapter_on_an_embedding_is_refused(llama32, broken, tmp_path):
    a, b = "base_model.model.model.embed_tokens.lora_A.weight", "base_model.model.model.embed_tokens.lora_B.weight"
    edit_weights(broken, lambda tensors: tensors.update({a: torch.zeros(4, 64), b: torch.zeros(128, 4)}))
    refused(llama32, broken, tmp_path, "model.embed_tokens", "needed a linear layer")


def test_an_adapter_on_a_layer_outside_the_blocks_stores_it_unpruned(llama32, make_lora, read_tensors, tmp_path):
    head = make_lora(llama32, 3, target_modules=["lm_head"], save_embedding_layers=False)
    salr.convert(llama32, tmp_path / "m.salr", salr.ConvertOptions(adapters=(("head", head),), method="magnitude"))
    file = salr.open(tmp_path / "m.salr")
    entry = file.modules["lm_head"]
    assert (entry.pattern, [adapter.name for adapter in entry.adapters]) == ("dense", ["head"])
    np.testing.assert_array_equal(file.dense("lm_head"), read_tensors(llama32)["lm_head.weight"].numpy())
    assert any(line.key == "lm_head.weight" and "an adapter targets it" in line.reason for line in file.manifest.ledger)


@pytest.mark.parametrize(
    ("setting", "word"),
    [
        ({"peft_type": "IA3"}, "PEFT type IA3 is not a LoRA"), ({"peft_type": ...}, "PEFT type None"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"), ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
    ],
)  # fmt: skip
def test_a_feature_without_an_exact_form_is_refused_with_a_way_out(llama32, broken, tmp_path, setting, word):
    edit_config(broken, **setting)
    refused(llama32, broken, tmp_path, word, "merge it into its base with peft's merge_and_unload")


@pytest.mark.parametrize(
    "setting",
    [
        {"r": ...}, {"lora_alpha": ...}, {"r": "four"}, {"r": None}, {"lora_alpha": "big"},
        {"lora_alpha": float("nan")},
        {"rank_pattern": ["q_proj"]}, {"rank_pattern": {"(": 4}}, {"rank_pattern": {"q_proj": [4]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_with_senseless_values_gives_a_clear_error(llama32, broken, tmp_path, setting):
    edit_config(broken, **setting)
    refused(llama32, broken, tmp_path, kind=SalrError)


def test_factors_in_two_dtypes_are_refused(llama32, broken, tmp_path):
    edit_weights(broken, lambda tensors: tensors.update({KEY: tensors[KEY].half()}))
    refused(llama32, broken, tmp_path, f"tensor '{Q}': lora_A F16, lora_B F32, needed one dtype for both")


def test_rank_zero_is_refused(llama32, broken, tmp_path):
    edit_config(broken, r=0)

    def empty(tensors):
        tensors.update(
            {key: tensor[:0] if "lora_A" in key else tensor[:, :0].contiguous() for key, tensor in tensors.items()}
        )

    edit_weights(broken, empty)
    refused(llama32, broken, tmp_path, kind=SalrError)


@pytest.mark.parametrize("name", ["residual", "", "a b", "a.b", "../a"])
def test_a_bad_adapter_name_is_refused(lora, name):
    with pytest.raises(AdapterError, match="give another one: --adapter NAME=DIR"):
        Adapter(lora, name)


@pytest.mark.parametrize(
    ("file", "kind"), [("adapter_config.json", SourceError), ("adapter_model.safetensors", SourceError)]
)
def test_a_missing_file_of_an_adapter_is_named(llama32, broken, tmp_path, file, kind):
    (broken / file).unlink()
    refused(llama32, broken, tmp_path, str(broken), kind=kind)


def test_two_adapters_of_one_name_are_refused(lora):
    with pytest.raises(OptionError, match="two adapters have one name; name them: --adapter NAME=DIR"):
        salr.ConvertOptions(adapters=(("a", lora), ("a", lora)), method="magnitude")


def test_the_name_default_is_taken_when_the_source_is_an_adapter(lora, tmp_path):
    with pytest.raises(SalrError, match="default"):
        salr.convert(
            lora, tmp_path / "out.salr", salr.ConvertOptions(adapters=(("default", lora),), method="magnitude")
        )
    assert not (tmp_path / "out.salr").exists()
