"""Settings of smaller values: presets, what is recorded, and what is refused by name before anything is written."""

from __future__ import annotations

import dataclasses
import json

import pytest
from salr.converter.module_options import ADAPTER_VALUES, PRESETS, VALUES, module_options, parse_override
from salr.formats.errors import OptionError, SourceError

import salr

GATE = "model.layers.0.mlp.gate_proj"


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_what_the_file_is_made_with(preset, block, quantize, complaints):
    wanted = PRESETS[preset]
    settings = dataclasses.asdict(module_options(preset, rank=3))
    file = quantize(block, **settings)
    assert file.manifest.options["rank"] == 3 and complaints(file, block) == []
    for name, entry in file.modules.items():
        assert entry.encoding == ("bf16" if wanted.values == "source" else wanted.values)
        assert entry.pattern == ("unstructured" if wanted.sparsity else "dense")
        assert entry.nnz == entry.n_weights - int(wanted.sparsity * entry.n_weights + 1e-9)
        dtype = "I8" if wanted.adapter_values == "int8" else "BF16"
        assert file.tensors[f"{name}.lora_A.residual"].dtype == dtype


def test_a_smaller_preset_is_smaller():
    bits = {"source": 16, "int8": 8, "nf4": 4}
    sizes = [(1 - p.sparsity) * bits[p.values] + (p.sparsity > 0) for p in (PRESETS[n] for n in PRESETS)]
    assert list(PRESETS) == ["exact", "balanced", "small"] and sizes == sorted(sizes, reverse=True)


def test_single_settings_win_over_a_preset_and_none_leaves_it():
    assert module_options("small", values="int8", rank=None) == dataclasses.replace(PRESETS["small"], values="int8")
    assert module_options() == salr.ModuleOptions() and module_options(sparsity=0.0).sparsity == 0.0
    with pytest.raises(OptionError, match="preset 'tiny', needed one of exact, balanced, small"):
        module_options("tiny")


def test_a_presets_rank_is_lowered_where_a_layer_is_smaller_and_one_that_was_asked_for_is_not(
    narrow_block, quantize, complaints, tmp_path
):
    small = dataclasses.asdict(module_options("small"))
    file = quantize(narrow_block, **small)
    ranks = {name.rpartition(".")[2]: entry.adapters[0].rank for name, entry in file.modules.items()}
    assert ranks == {name: 12 if name in ("k_proj", "v_proj") else 16 for name in ranks} and len(ranks) == 7
    assert complaints(file, narrow_block) == []
    with pytest.raises(OptionError, match=r"k_proj': rank 16, needed at most min\(N, K\) = 12"):
        quantize(narrow_block, "asked.salr", **{**small, "rank": 16})
    with pytest.raises(OptionError, match=r"v_proj': rank 13, needed at most min\(N, K\) = 12"):
        quantize(narrow_block, "set.salr", **small, overrides=(parse_override("*.v_proj rank=13"),))
    assert [path.name for path in tmp_path.iterdir()] == ["m.salr"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("values", v) for v in ("int4", "", "NF4", None, 8)] + [("adapter_values", v) for v in ("nf4", "bf16", None)],
)
def test_unknown_values_are_refused_with_the_known_ones(name, value):
    known = VALUES if name == "values" else ADAPTER_VALUES
    with pytest.raises(OptionError, match=f"{name} {value!r}, needed one of {', '.join(known)}"):
        salr.ModuleOptions(**{name: value})


@pytest.mark.parametrize("size", [0, -1, 1.5, 128.0, "128", True, None])
def test_a_group_size_is_an_integer_from_1(size):
    with pytest.raises(OptionError, match=r"group_size .*, needed an integer, 1 or more"):
        salr.ModuleOptions(values="int8", group_size=size)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("*.q_proj values=int5", "values 'int5'"), ("*.q_proj adapter_values=nf4", "adapter_values 'nf4'"),
        ("*.q_proj values=nf4,group_size=0", "group_size 0"), ("*.q_proj group_size=1.5", "group_size=1.5"),
        ("*.q_proj group=8", "unknown setting 'group'"),
    ],
)  # fmt: skip
def test_an_override_with_a_wrong_setting_is_refused_before_anything_is_written(text, found, block, tmp_path):
    with pytest.raises(OptionError, match=found):
        salr.convert(
            block, tmp_path / "m.salr", salr.ConvertOptions(overrides=(parse_override(text),), method="magnitude")
        )
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_records_values_groups_and_overrides(block, quantize):
    file = quantize(block, values="nf4", group_size=20, overrides=(parse_override("*.q_proj values=int8"),))
    recorded = json.loads(bytes(file.raw("salr.manifest")))["options"]
    found = {key: recorded[key] for key in ("values", "group_size", "adapter_values", "set")}
    wanted = {"values": "nf4", "group_size": 20, "adapter_values": "source", "set": [["*.q_proj", {"values": "int8"}]]}
    assert found == wanted


# --- weights that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["int8", "nf4"])
@pytest.mark.parametrize("factor", [1e9, 1e30, 1e-9, 1e-38], ids=["large", "huge", "small", "sub-normal"])
def test_weights_beyond_float16_scales_are_refused_by_name_with_a_fix_that_works(
    values, factor, block32, quantize, tmp_path, changed
):
    source = changed(block32, GATE, lambda weight: weight * factor)
    with pytest.raises(SourceError, match=f"sizes that {values} with float16 scales can hold") as error:
        quantize(source, values=values)
    assert error.value.tensor == f"{GATE}.weight" and not (tmp_path / "m.salr").exists()
    fix = parse_override(error.value.fix.removeprefix("--set ").strip("'"))
    if factor in (1e9, 1e-9):
        file = quantize(source, "fixed.salr", values=values, overrides=(fix,))
        assert {name for name, e in file.modules.items() if e.encoding == "fp32"} == {GATE}


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_weights_beyond_fp16_values_are_refused_by_name(sparsity, block32, quantize, tmp_path, changed):
    source = changed(block32, GATE, lambda weight: weight * 1e7)
    with pytest.raises(SourceError, match="fp16") as error:
        quantize(source, values="fp16", sparsity=sparsity)
    assert error.value.tensor == f"{GATE}.weight" and not (tmp_path / "m.salr").exists()


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_sub_normal_weights_in_the_sources_own_type_are_nobodys_business(
    sparsity, block32, quantize, changed, complaints
):
    source = changed(block32, GATE, lambda weight: weight * 1e-38)
    assert complaints(quantize(source, sparsity=sparsity), source) == []
