"""What is packed follows the model class: Conv1D, experts in two forms, routers, or no known class at all."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from salr.converter.module_options import ModuleOptions
from salr.converter.options import ConvertOptions
from salr.converter.pipeline import plan_conversion
from salr.formats.errors import OptionError, SourceError
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

import salr

OPTIONS = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude")


def test_a_conv1d_weight_is_stored_transposed(gpt2, read_tensors, tmp_path):
    salr.convert(gpt2, tmp_path / "m.salr", OPTIONS)
    file, tensors = salr.open(tmp_path / "m.salr"), read_tensors(gpt2)
    assert len(file.modules) == 8
    for name, entry in file.modules.items():
        weight = tensors[entry.source_tensor]
        assert entry.transposed and entry.shape == tuple(reversed(weight.shape)) == tuple(reversed(entry.source_shape))
        mask = file.module(name).mask()
        np.testing.assert_array_equal(file.dense(name, residual=False), np.where(mask, weight.T.numpy(), 0))
    assert not [name for name in file.modules if name.rsplit(".", 1)[-1] in ("wte", "wpe", "lm_head")]


def test_experts_on_disk_are_a_module_each_and_the_router_stays_dense(moe, read_tensors, tmp_path):
    salr.convert(moe, tmp_path / "m.salr", OPTIONS)
    file = salr.open(tmp_path / "m.salr")
    experts = [name for name in file.modules if ".experts." in name]
    assert len(experts) == 2 * 4 * 3 and all(len(file.modules[name].shape) == 2 for name in experts)
    routers = [name for name in read_tensors(moe) if name.endswith("gate.weight")]
    assert len(routers) == 2 and set(routers) <= set(file.dense_tensors())
    reasons = {line.key: line.reason for line in file.manifest.ledger}
    assert {reasons[name] for name in routers} == {"router"}


@pytest.mark.parametrize("scope", ["layer", "row"])
def test_stacked_experts_are_one_module_pruned_expert_by_expert(stacked_moe, read_tensors, tmp_path, scope):
    salr.convert(
        stacked_moe, tmp_path / "m.salr", ConvertOptions(ModuleOptions(0.5, 4), scope=scope, method="magnitude")
    )
    file, tensors = salr.open(tmp_path / "m.salr"), read_tensors(stacked_moe)
    stacked = {name: entry for name, entry in file.modules.items() if len(entry.shape) == 3}
    assert sorted(stacked) == [
        f"model.layers.{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("down_proj", "gate_up_proj")
    ]
    for name, entry in stacked.items():
        weight, mask = tensors[name], file.module(name).mask()
        assert entry.shape == tuple(weight.shape) and entry.source_tensor == name
        assert mask.sum((1, 2)).tolist() == [weight[0].numel() // 2] * 4
        np.testing.assert_array_equal(file.dense(name, residual=False), np.where(mask, weight.numpy(), 0))
        assert file.tensors[f"{name}.lora_A.residual"].shape == (4, 4, entry.n_columns)
        assert entry.error.residual < entry.error.mask
    assert "model.layers.0.mlp.gate.weight" in file.dense_tensors()


def test_both_forms_of_the_experts_give_the_same_numbers(moe, stacked_moe, tmp_path):
    for name, source in (("single", moe), ("stacked", stacked_moe)):
        salr.convert(source, tmp_path / f"{name}.salr", OPTIONS)
    single, stacked = salr.open(tmp_path / "single.salr"), salr.open(tmp_path / "stacked.salr")
    whole = stacked.dense("model.layers.0.mlp.experts.down_proj", residual=False)
    for index in range(4):
        one = single.dense(f"model.layers.0.block_sparse_moe.experts.{index}.w2", residual=False)
        np.testing.assert_array_equal(whole[index], one)


def test_stacked_experts_refuse_the_global_scope(stacked_moe, tmp_path):
    with pytest.raises(OptionError, match="scope 'global', needed 2-D weights and no --set; use --scope layer"):
        salr.convert(stacked_moe, tmp_path / "m.salr", ConvertOptions(scope="global", method="magnitude"))


@pytest.mark.parametrize("architectures", [None, ["NobodysModel"], []])
def test_without_a_known_class_2d_weights_of_numbered_blocks_are_packed(llama, edited_model, architectures):
    source = edited_model(llama, architectures=architectures, model_type="nobodys")
    plan = plan_conversion(source, OPTIONS)
    known = plan_conversion(llama, OPTIONS)
    assert plan.class_name is None and known.class_name == "LlamaForCausalLM"
    assert [module.name for module in plan.modules] == [module.name for module in known.modules]
    assert {module.reason for module in plan.modules} == {"2-D weight of a numbered block (no model class)"}


@pytest.mark.parametrize("name", ["LlamaConfig", "AutoTokenizer", "PreTrainedTokenizerFast"])
def test_a_class_that_is_no_model_gives_a_clear_error_or_counts_as_unknown(llama, edited_model, name):
    source = edited_model(llama, architectures=[name])
    try:
        assert plan_conversion(source, OPTIONS).class_name is None
    except SourceError as error:
        assert name in str(error) and "config.json" in str(error)


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", {"a": 1}, 5, [7]])
def test_architectures_of_a_wrong_type_give_a_clear_error_or_count_as_unknown(llama, edited_model, architectures):
    source = edited_model(llama, architectures=architectures)
    try:
        assert len(plan_conversion(source, OPTIONS).modules) == 14
    except SourceError as error:
        assert "config.json" in str(error)


def test_a_config_that_the_class_refuses_is_named(llama, edited_model):
    source = edited_model(llama, num_attention_heads="many")
    with pytest.raises(SourceError, match=r"m/config.json: transformers cannot build LlamaForCausalLM from it \("):
        plan_conversion(source, OPTIONS)


def test_the_reason_of_a_config_that_the_class_refuses_is_told(llama, edited_model):
    with pytest.raises(SourceError, match=r"The hidden size \(66\) is not a multiple of .* attention\s?heads") as error:
        plan_conversion(edited_model(llama, hidden_size=66), OPTIONS)
    assert "\n" not in str(error.value)


def test_experts_that_transformers_turns_while_it_loads_can_only_be_kept(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    text = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    vision = sizes | {"depth": 1, "out_hidden_size": 32, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]}
    model = Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    tensors = {name: t.transpose(1, 2) if "experts" in name else t for name, t in model.state_dict().items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, tmp_path / "model.safetensors")
    words = (
        r"experts.down_proj': shape \[4, 24, 32\], needed \[4, 32, 24\] as its class has it; keep it dense: --exclude"
    )
    with pytest.raises(SourceError, match=words):
        plan_conversion(tmp_path, OPTIONS)
    plan = plan_conversion(tmp_path, replace(OPTIONS, exclude=("*.experts.*",)))
    assert len([tensor for tensor in plan.kept if "experts" in tensor.name]) == 2


def test_planning_runs_no_code_and_reads_no_weight_of_the_checkpoint(llama, edited_model):
    source = edited_model(llama, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (source / "evil.py").write_text("raise SystemExit('ran')")
    plan = plan_conversion(source, OPTIONS)
    assert len(plan.modules) == 14 and torch.get_default_device() == torch.device("cpu")
