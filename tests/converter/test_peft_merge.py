"""`unpack --merge` against peft itself: merge_and_unload of (pruned base + residual + LoRA)."""

from __future__ import annotations

import pytest
import torch

import salr

CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 11}},
}


def merged_by_peft(base, folders, tmp_path):
    """Return the state dict that peft gives for the unpacked base with all adapters merged."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    (first, *others) = folders
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folders[first], adapter_name=first)
    for name in others:
        model.load_adapter(folders[name], adapter_name=name)
    return model.merge_and_unload(adapter_names=list(folders)).state_dict()


def compare(source, folders, tmp_path, read_tensors):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), adapters=tuple(folders.items()), method="magnitude")
    salr.convert(source, tmp_path / "m.salr", options)
    salr.unpack(tmp_path / "m.salr", tmp_path / "base")
    salr.unpack(tmp_path / "m.salr", tmp_path / "merged", merge=True)
    expected = merged_by_peft(tmp_path / "base", folders, tmp_path)
    base, merged = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)
    changed = {name for name in merged if not torch.allclose(merged[name], base[name], rtol=0, atol=1e-4)}
    return {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in changed}


@pytest.mark.parametrize("case", CASES)
def test_a_merged_lora_equals_pefts(llama32, make_lora, read_tensors, tmp_path, case):
    folder = make_lora(llama32, 11, **CASES[case])
    assert compare(llama32, {"a": folder}, tmp_path, read_tensors) == {"q_proj", "down_proj"}


def test_two_merged_adapters_equal_pefts(llama32, make_lora, read_tensors, tmp_path):
    second = make_lora(llama32, 12, r=2, target_modules=["k_proj", "q_proj"], use_rslora=True)
    changed = compare(llama32, {"a": make_lora(llama32, 11), "b": second}, tmp_path, read_tensors)
    assert changed == {"q_proj", "k_proj", "down_proj"}


def test_a_merged_lora_on_conv1d_equals_pefts(gpt2, make_lora, read_tensors, tmp_path):
    folder = make_lora(gpt2, 13, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    assert compare(gpt2, {"a": folder}, tmp_path, read_tensors) == {"c_attn", "c_fc"}


def test_without_merge_the_adapter_leaves_the_weights_alone(llama32, lora, read_tensors, tmp_path):
    for name, adapters in (("plain", ()), ("adapted", (("a", lora),))):
        options = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), adapters=adapters, method="magnitude")
        salr.convert(llama32, tmp_path / f"{name}.salr", options)
        salr.unpack(tmp_path / f"{name}.salr", tmp_path / name)
    plain, adapted = read_tensors(tmp_path / "plain"), read_tensors(tmp_path / "adapted")
    assert all(torch.equal(plain[name], adapted[name]) for name in plain)
