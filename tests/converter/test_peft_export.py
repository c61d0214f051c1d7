"""Leaving for PEFT: base + residual + adapters, loaded by peft itself, have the logits of the file."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from salr.converter.adapters.editing import add_adapter, remove_adapter, scale_adapter
from salr.converter.adapters.merging import merge_adapters
from salr.converter.export.peft import export_peft
from salr.converter.export.peft_config import PeftModule, adapter_config, lora_alpha
from salr.formats.errors import AdapterError, FormatError, OptionError, OutputError, SalrError
from salr.formats.reader import SalrFile
from salr.formats.values import encode_quantized, pad_values

import salr

INPUT = torch.arange(12).reshape(2, 6)
TARGETS = {"llama32": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}


def logits(model):
    with torch.no_grad():
        return model.eval()(INPUT).logits


def with_peft(folder, names):
    """Return base + adapters as peft loads them, the adapters ``names`` active together."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    first, *others = names
    model = PeftModel.from_pretrained(base, folder / "adapters" / first, adapter_name=first)
    for name in others:
        model.load_adapter(folder / "adapters" / name, adapter_name=name)
    model.base_model.set_adapter(list(names))
    return model


def unpacked(path, out, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(salr.unpack(path, out, **options))


@pytest.fixture(scope="module", params=["llama32", "gpt2"])
def adapted(request, make_lora, tmp_path_factory):
    """Return a .salr file with a residual of mixed ranks and two adapters with patterns and rslora."""
    source = request.getfixturevalue(request.param)
    first, second = TARGETS[request.param]
    is_conv1d = request.param == "gpt2"
    patterns = {"rank_pattern": {first: 3}, "alpha_pattern": {second: 7}}
    folders = (
        ("a", make_lora(source, 41, target_modules=[first, second], fan_in_fan_out=is_conv1d, **patterns)),
        ("b", make_lora(source, 42, target_modules=[first], fan_in_fan_out=is_conv1d, r=5, use_rslora=True)),
    )
    out = tmp_path_factory.mktemp("adapted") / "m.salr"
    overrides = ((f"*.{first}", {"rank": 2}), (f"*.{second}", {"rank": 0}))
    options = salr.ConvertOptions(
        salr.ModuleOptions(0.5, 8), adapters=folders, overrides=overrides, calibration=salr.CalibrationOptions("none"),
        rounds=2,
    )  # fmt: skip
    salr.convert(source, out, options)
    return out


@pytest.mark.parametrize("names", [["residual"], ["residual", "a"], ["residual", "b"], ["residual", "a", "b"]])
def test_base_residual_and_adapters_have_the_logits_of_the_file(adapted, names, tmp_path):
    export_peft(adapted, tmp_path / "out")
    for other in {"a", "b"} - set(names):
        adapted = shutil.copy(adapted, tmp_path / f"without-{other}.salr")
        remove_adapter(adapted, other)
    found = logits(with_peft(tmp_path / "out", names))
    torch.testing.assert_close(found, logits(unpacked(adapted, tmp_path / "merged", merge=True)), rtol=0, atol=2e-6)
    base = with_peft(tmp_path / "out", names)
    with base.disable_adapter():
        assert not torch.allclose(logits(base), found, atol=1e-4)


@pytest.mark.parametrize("name", ["a", "b"])
def test_with_residual_one_adapter_alone_has_the_logits_of_the_file(adapted, name, tmp_path):
    export_peft(adapted, tmp_path / "out", with_residual=True)
    other = "b" if name == "a" else "a"
    remove_adapter(adapted, other, salr.Destination(tmp_path / "one.salr"))
    found = logits(with_peft(tmp_path / "out", [name]))
    expected = logits(unpacked(tmp_path / "one.salr", tmp_path / "merged", merge=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_trained_factors_and_scalings_come_back_as_they_went_in(adapted, tmp_path):
    export_peft(adapted, tmp_path / "out")
    file = SalrFile(adapted)
    for name in ("a", "b", "residual"):
        tensors = load_file(tmp_path / "out" / "adapters" / name / "adapter_model.safetensors")
        layers = with_peft(tmp_path / "out", [name]).base_model.model
        uses = {m: x for m, entry in file.modules.items() for x in entry.adapters if x.name == name}
        assert len(tensors) == 2 * len(uses) > 0
        for module, entry in uses.items():
            for factor in ("lora_A", "lora_B"):
                key = f"base_model.model.{module}.{factor}.weight"
                assert tensors[key].numpy().tobytes() == bytes(file.raw(f"{module}.{factor}.{name}"))
            layer = layers.get_submodule(module)
            assert (layer.scaling[name], layer.r[name]) == (entry.scaling, entry.rank)


def test_the_export_of_an_adapter_converts_to_the_same_file(llama32, lora, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude")
    salr.convert(llama32, tmp_path / "plain.salr", options)
    add_adapter(tmp_path / "plain.salr", lora, "a", salr.Destination(tmp_path / "with.salr"))
    exported = export_peft(tmp_path / "with.salr", tmp_path / "out").adapters["a"]
    add_adapter(tmp_path / "plain.salr", exported, "a", salr.Destination(tmp_path / "again.salr"))
    before, after = SalrFile(tmp_path / "with.salr").manifest, SalrFile(tmp_path / "again.salr").manifest
    assert (before.modules, before.checksums, before.ledger) == (after.modules, after.checksums, after.ledger)


def test_the_base_is_the_pruned_model_with_all_its_files(adapted, read_tensors, tmp_path):
    export = export_peft(adapted, tmp_path / "out")
    file, tensors = SalrFile(adapted), read_tensors(tmp_path / "out" / "base")
    for module, entry in file.modules.items():
        weight = file.dense(module, residual=False)
        np.testing.assert_array_equal(tensors[entry.source_tensor].numpy(), weight.T if entry.transposed else weight)
    names = {path.name for path in (tmp_path / "out" / "base").iterdir()}
    assert names == {"model.safetensors", *file.assets}
    assert export.folded == () and sorted(export.adapters) == ["a", "b", "residual"]
    with safe_open(export.adapters["residual"] / "adapter_model.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_scaled_and_merged_adapters_leave_with_what_the_file_says(adapted, tmp_path):
    out = shutil.copy(adapted, tmp_path / "m.salr")
    scale_adapter(out, "a", factor=0.7)
    merge_adapters(out, ["b", "a"], "m")
    export_peft(out, tmp_path / "out")
    found = logits(with_peft(tmp_path / "out", ["residual", "m"]))
    torch.testing.assert_close(found, logits(unpacked(out, tmp_path / "merged", merge=True)), rtol=0, atol=2e-6)


def quantize_residual(draft, rng):
    """Replace every residual of a draft by an int8 one near it."""
    for module, entry in draft.manifest["modules"].items():
        if not any(adapter["name"] == "residual" for adapter in entry["adapters"]):
            continue
        name_a, name_b = f"{module}.lora_A.residual", f"{module}.lora_B.residual"
        lora_a, lora_b = (draft.array(n).view(np.float32).reshape(draft.tensors[n][1]) for n in (name_a, name_b))
        size_a, size_b = np.abs(lora_a).max(1) / 127, np.abs(lora_b).max(0) / 127
        draft.put(name_a, np.rint(lora_a / size_a[:, None]).astype(np.int8), dtype="I8")
        draft.put(name_b, np.rint(lora_b / size_b).astype(np.int8), dtype="I8")
        sign = rng.choice([-1.0, 1.0], size_a.size).astype(np.float32)
        draft.put(f"{module}.rank_scales.residual", size_a * size_b * sign, dtype="F32", shape=size_a.shape)


def quantize_values(draft, encoding, group_size):
    """Replace the values of every sparse float32 module of a draft by quantized ones."""
    for module, entry in draft.manifest["modules"].items():
        (n_rows, n_columns), nnz = entry["shape"], entry["nnz"]
        values = draft.array(f"{module}.values").view(np.float32)[:nnz]
        scales = np.full((n_rows, -(-n_columns // group_size)), np.abs(values).max() / 100, np.float32)
        each = np.full(nnz, scales[0, 0], np.float32)
        codes = encode_quantized(values, each, encoding)
        padded = pad_values(codes, encoding, nnz)
        draft.put(f"{module}.values", padded, dtype="U8", shape=padded.shape)
        draft.put(f"{module}.scales", scales, dtype="F32", shape=scales.shape)
        entry.update(encoding=encoding, group_size=group_size)


@pytest.mark.parametrize("options", [{}, {"with_residual": True}])
def test_an_int8_residual_becomes_float_factors_with_the_same_logits(adapted, options, open_draft, tmp_path):
    draft = open_draft(adapted)
    quantize_residual(draft, np.random.default_rng(0))
    path = draft.write(tmp_path / "int8.salr")
    remove_adapter(path, "b")
    export_peft(path, tmp_path / "out", **options)
    names = ["a"] if options else ["residual", "a"]
    found = logits(with_peft(tmp_path / "out", names))
    torch.testing.assert_close(found, logits(unpacked(path, tmp_path / "merged", merge=True)), rtol=0, atol=2e-6)
    assert not torch.allclose(found, logits(unpacked(adapted, tmp_path / "float", merge=True)), atol=1e-4)


@pytest.mark.parametrize("encoding", ["int8", "nf4"])
def test_quantized_values_are_exact_in_a_float32_base(adapted, encoding, open_draft, tmp_path):
    draft = open_draft(adapted)
    quantize_values(draft, encoding, 16)
    path = draft.write(tmp_path / "quantized.salr")
    export_peft(path, tmp_path / "out", dtype="fp32")
    found = logits(with_peft(tmp_path / "out", ["residual", "a", "b"]))
    expected = logits(unpacked(path, tmp_path / "merged", merge=True, dtype="fp32"))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("model", ["moe", "stacked_moe"])
def test_residuals_of_experts_are_added_to_the_base(model, request, tmp_path):
    source = request.getfixturevalue(model)
    salr.convert(source, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude"))
    export = export_peft(tmp_path / "m.salr", tmp_path / "out")
    assert export.folded and all("experts" in module for module in export.folded)
    found = logits(with_peft(tmp_path / "out", ["residual"]))
    torch.testing.assert_close(found, logits(unpacked(tmp_path / "m.salr", tmp_path / "merged")), rtol=0, atol=2e-6)


def test_an_adapter_on_experts_is_refused(stacked_moe, open_draft, tmp_path):
    salr.convert(stacked_moe, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude"))
    draft = open_draft(tmp_path / "m.salr")
    module = next(name for name, entry in draft.manifest["modules"].items() if len(entry["shape"]) == 3)
    for factor in ("lora_A", "lora_B"):
        dtype, shape, raw = draft.tensors[f"{module}.{factor}.residual"]
        draft.put(f"{module}.{factor}.x", np.frombuffer(raw, np.uint8), dtype=dtype, shape=shape)
    draft.module(module)["adapters"].append({**draft.module(module)["adapters"][0], "name": "x"})
    with pytest.raises(AdapterError, match=r"adapter 'x' stands on what is no linear layer.*use unpack --merge"):
        export_peft(draft.write(tmp_path / "x.salr"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_checkpoints_without_the_base_models_prefix_leave_under_the_models_names(gpt2, tmp_path):
    from safetensors.torch import save_file

    bare = shutil.copytree(gpt2, tmp_path / "bare")
    tensors = load_file(bare / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, bare / "model.safetensors")
    salr.convert(bare, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude"))
    export_peft(tmp_path / "m.salr", tmp_path / "out")
    found = logits(with_peft(tmp_path / "out", ["residual"]))
    torch.testing.assert_close(found, logits(unpacked(tmp_path / "m.salr", tmp_path / "merged")), rtol=0, atol=2e-6)


def test_without_any_adapter_the_base_stands_alone(llama, read_tensors, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 0), method="magnitude")
    salr.convert(llama, tmp_path / "m.salr", options)
    assert export_peft(tmp_path / "m.salr", tmp_path / "out").adapters == {}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["base"]


small = st.integers(1, 300)


@given(small, st.floats(-1e6, 1e6, allow_nan=False))
def test_peft_divides_a_trained_alpha_to_the_very_scaling(rank, alpha):
    for trained in (alpha, None):
        module = PeftModule(rank, alpha / rank, trained)
        assert lora_alpha(module) / rank == module.scaling
    config = adapter_config(
        {"m": PeftModule(rank, alpha / math.sqrt(rank), alpha)}, base="b", is_causal_lm=True, fan_in_fan_out=False
    )
    root = math.sqrt(rank) if config["use_rslora"] else rank
    assert config["lora_alpha"] / root == alpha / math.sqrt(rank)


@given(small, st.floats(-1e6, 1e6, allow_nan=False))
def test_any_other_scaling_comes_back_within_one_unit_in_the_last_place(rank, scaling):
    found = lora_alpha(PeftModule(rank, scaling)) / rank
    assert abs(found - scaling) <= math.ulp(scaling)


names = st.lists(st.sampled_from(["h.0.a", "h.1.a", "h.11.a", "h.1.b", "x.h.1.a", "a"]), unique=True, min_size=1)


@given(names, st.data())
def test_patterns_resolve_to_each_modules_own_rank_and_alpha(found, data):
    from peft.utils.other import get_pattern_key

    modules = {
        name: PeftModule(data.draw(st.integers(1, 4)), float(data.draw(st.integers(1, 4))), None) for name in found
    }
    config = json.loads(json.dumps(adapter_config(modules, base="b", is_causal_lm=True, fan_in_fan_out=False)))
    for name, module in modules.items():
        rank = config["rank_pattern"].get(get_pattern_key(config["rank_pattern"], name), config["r"])
        alpha = config["alpha_pattern"].get(get_pattern_key(config["alpha_pattern"], name), config["lora_alpha"])
        assert (rank, alpha / rank) == (module.rank, module.scaling)


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_rank_scales_that_are_not_finite_are_refused(adapted, open_draft, tmp_path, scale):
    draft = open_draft(adapted)
    quantize_residual(draft, np.random.default_rng(0))
    name = next(name for name in draft.tensors if ".rank_scales." in name)
    data = draft.array(name)
    data[:4] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    draft.put(name, data)
    with pytest.raises(FormatError, match="not finite in float32, needed finite scaling and rank_scales"):
        export_peft(draft.write(tmp_path / "bad.salr"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_output_a_wrong_dtype_and_a_missing_file_are_refused(adapted, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="the output exists already"):
        export_peft(adapted, tmp_path / "out")
    with pytest.raises(OptionError, match="dtype 'int8'"):
        export_peft(adapted, tmp_path / "new", dtype="int8")
    with pytest.raises(FormatError, match="no such file"):
        export_peft(tmp_path / "nowhere.salr", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("config", [None, b"[]", b'{"architectures": ["LlamaForCausalLM"], "hidden_size": "x"}'])
def test_a_file_without_a_usable_config_is_refused_and_leaves_nothing(adapted, open_draft, tmp_path, config):
    draft = open_draft(adapted)
    if config is None:
        draft.drop("assets/config.json")
    else:
        draft.put("assets/config.json", np.frombuffer(config, np.uint8), shape=(len(config),))
    with pytest.raises(SalrError):
        export_peft(draft.write(tmp_path / "m.salr"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.salr"]
