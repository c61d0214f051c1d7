"""The plan: every input in the ledger once with a reason, and what cannot be done refused before a byte is written."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from salr.converter.pipeline import plan_conversion
from salr.formats.errors import OptionError, SourceError

import salr


def plan_of(source, sparsity=0.5, rank=8, **options):
    return plan_conversion(
        source, salr.ConvertOptions(salr.ModuleOptions(sparsity, rank), **options, method="magnitude")
    )


@pytest.mark.parametrize("model", ["llama", "tied_llama", "gpt2", "moe", "stacked_moe"])
def test_every_input_tensor_stands_in_the_ledger_once_with_a_reason(model, request):
    source = request.getfixturevalue(model)
    ledger = plan_of(source, rank=4).ledger
    assert sorted(line.key for line in ledger) == sorted(load_file(source / "model.safetensors"))
    assert {line.fate for line in ledger} == {"packed", "kept"} and all(line.reason for line in ledger)
    assert {line.file for line in ledger} == {"model.safetensors"}


def test_every_adapter_key_stands_in_the_ledger_under_its_adapter(llama32, lora):
    ledger = plan_of(llama32, adapters=(("one", lora), ("two", lora))).ledger
    keys = sorted(load_file(lora / "adapter_model.safetensors"))
    for name in ("one", "two"):
        assert sorted(line.key for line in ledger if line.file == f"{name}/adapter_model.safetensors") == keys


def test_the_planned_tensors_are_those_of_the_file(llama, packed):
    specs = {spec.name: (spec.dtype, spec.shape) for spec in plan_of(llama).specs()}
    file = salr.open(packed)
    assert specs == {name: (t.dtype, t.shape) for name, t in file.tensors.items() if name != "salr.manifest"}


def test_the_reasons_tell_blocks_from_what_lies_outside(llama):
    reasons = {line.key: (line.fate, line.reason) for line in plan_of(llama).ledger}
    assert reasons["model.layers.0.self_attn.q_proj.weight"] == ("packed", "Linear in a block")
    assert reasons["lm_head.weight"] == ("kept", "Linear outside the blocks")
    assert reasons["model.embed_tokens.weight"] == ("kept", "weight of Embedding")
    assert reasons["model.norm.weight"] == ("kept", "weight of LlamaRMSNorm")


def test_include_and_exclude_stand_in_the_reasons(llama):
    plan = plan_of(llama, include=("lm_head",), exclude=("*.q_proj",))
    reasons = {line.key: (line.fate, line.reason) for line in plan.ledger}
    assert reasons["lm_head.weight"] == ("packed", "included by --include")
    assert reasons["model.layers.1.self_attn.q_proj.weight"] == ("kept", "excluded by --exclude")


def test_an_exclude_beats_an_include(llama):
    plan = plan_of(llama, include=("lm_head",), exclude=("lm_head",))
    assert "lm_head" not in [module.name for module in plan.modules]


@pytest.mark.parametrize("option", ["include", "exclude", "overrides"])
def test_a_pattern_that_matches_no_module_is_refused(llama, option):
    value = (("nothing.*", {"rank": 1}),) if option == "overrides" else ("nothing.*",)
    with pytest.raises(OptionError, match=r"pattern 'nothing\.\*' matches no module; see the names with --dry-run"):
        plan_of(llama, **{option: value})


def test_excluding_everything_leaves_nothing_to_pack(llama):
    with pytest.raises(SourceError, match="nothing to pack, needed linear layers in numbered blocks"):
        plan_of(llama, exclude=("*",))


def test_a_rank_above_the_short_side_is_refused_with_a_way_out(llama):
    with pytest.raises(
        OptionError, match=r"k_proj': rank 33, needed at most min\(N, K\) = 32; lower --rank, or give --set"
    ):
        plan_of(llama, rank=33)


def test_including_a_vector_is_refused_or_leaves_it_dense(llama):
    plan = plan_of(llama, include=("model.norm",))
    assert "model.norm" not in [module.name for module in plan.modules]


def test_scope_global_with_overrides_is_refused(llama):
    with pytest.raises(OptionError, match="scope 'global', needed 2-D weights and no --set"):
        plan_of(llama, scope="global", overrides=(("*", {"sparsity": 0.1}),))


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "", "cuda", "cuda:7", "cuda:x"])
def test_a_device_that_is_not_here_is_refused(llama, tmp_path, device):
    import torch

    if device.startswith("cuda") and torch.cuda.is_available() and device != "cuda:x":
        pytest.skip("this machine has a GPU")
    with pytest.raises(OptionError, match=f"device '{device}'"):
        salr.convert(llama, tmp_path / "out.salr", salr.ConvertOptions(device=device, method="magnitude"))
    assert list(tmp_path.iterdir()) == []
