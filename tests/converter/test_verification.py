"""`verify --against`: a file agrees with its own source, and whatever was changed afterwards is found."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from salr.converter.verification import compare_with_source
from salr.formats.bitmap import pack_bitmap
from salr.formats.errors import AdapterError, MismatchError, OptionError, SalrError, SourceError

import salr

NAME = "model.layers.0.mlp.up_proj"
OPTIONS = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude")


def problems(path, source, adapters=(), base=None):
    file = salr.open(path)
    assert [problem for _, problem in file.check_all() if problem] == []
    return {name: str(problem) for name, problem in compare_with_source(file, source, adapters, base) if problem}


@pytest.fixture
def edited(packed, open_draft, tmp_path):
    """Return the converted Llama taken apart, and a function that writes it with sound digests."""
    draft = open_draft(packed)
    return draft, lambda: draft.write(tmp_path / "edited.salr")


@pytest.mark.parametrize("model", ["llama", "llama16", "llama32", "tied_llama", "gpt2", "moe", "stacked_moe"])
@pytest.mark.parametrize("settings", [{}, {"scope": "row"}], ids=["layer", "row"])
def test_a_file_agrees_with_its_own_source(model, settings, request, tmp_path):
    source = request.getfixturevalue(model)
    salr.convert(
        source, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.6, 4), **settings, method="magnitude")
    )
    assert problems(tmp_path / "m.salr", source) == {}


def test_every_module_tensor_and_asset_is_compared(packed, llama):
    file = salr.open(packed)
    names = [name for name, _ in compare_with_source(file, llama)]
    assert sorted(names) == sorted(["ledger", *file.modules, *file.dense_tensors(), *file.assets])


def test_a_file_with_every_option_agrees_with_its_own_source(llama32, lora, tmp_path):
    options = salr.ConvertOptions(
        salr.ModuleOptions(0.3, 5),
        include=("lm_head",),
        exclude=("*.o_proj",),
        overrides=(("*.q_proj", {"sparsity": 0.0}), ("*.up_proj", {"rank": 0})),
        adapters=(("a", lora),),
        method="magnitude",
    )
    salr.convert(llama32, tmp_path / "m.salr", options)
    assert problems(tmp_path / "m.salr", llama32, (("a", lora),)) == {}


def test_scope_global_and_a_lora_source_agree_too(llama32, lora, tmp_path):
    salr.convert(
        llama32,
        tmp_path / "g.salr",
        salr.ConvertOptions(salr.ModuleOptions(0.4, 4), scope="global", method="magnitude"),
    )
    salr.convert(lora, tmp_path / "l.salr", OPTIONS)
    assert problems(tmp_path / "g.salr", llama32) == {} == problems(tmp_path / "l.salr", lora)
    assert problems(tmp_path / "l.salr", lora, base=llama32) == {}


def test_a_changed_weight_is_found(edited, llama):
    draft, write = edited
    values = draft.array(f"{NAME}.values")
    values[200] ^= 1
    draft.put(f"{NAME}.values", values)
    assert list(problems(write(), llama)) == [NAME]
    assert "kept values" in problems(write(), llama)[NAME]


def test_a_changed_mask_is_found(edited, llama, packed, read_tensors):
    draft, write = edited
    mask = salr.open(packed).module(NAME).mask().copy()
    kept, removed = np.flatnonzero(mask[0])[0], np.flatnonzero(~mask[0])[0]
    mask[0, [kept, removed]] = [False, True]
    weight = read_tensors(llama)[f"{NAME}.weight"].view(torch.int16).numpy()
    values = draft.array(f"{NAME}.values").view(np.int16)
    values[: mask.sum()] = weight[mask]
    draft.put(f"{NAME}.values", values)
    draft.put(f"{NAME}.bitmap", pack_bitmap(mask))
    assert "the mask differs from the one that the method chooses" in problems(write(), llama)[NAME]


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_a_changed_residual_is_found(edited, llama, factor):
    draft, write = edited
    data = draft.array(f"{NAME}.{factor}.residual")
    data[1::2] ^= 0x80
    draft.put(f"{NAME}.{factor}.residual", data)
    if factor == "lora_B":
        data = draft.array(f"{NAME}.lora_B.residual")
        data[1 : data.size // 2 : 2] ^= 0x80
        draft.put(f"{NAME}.lora_B.residual", data)
    assert "its residual error is" in problems(write(), llama)[NAME]


@pytest.mark.parametrize(("key", "value"), [("energy", 1.0), ("mask", 0.5), ("residual", 0.0), ("bound", 0.9)])
def test_a_changed_error_is_found(edited, llama, key, value):
    draft, write = edited
    draft.module(NAME)["error"][key] = value
    assert f"its {key} error is" in problems(write(), llama)[NAME]


@pytest.mark.parametrize(
    "change",
    [
        {"source_tensor": "other.weight"}, {"values_from": "refit"}, {"dtype": "F16"},
    ],
)  # fmt: skip
def test_a_changed_entry_is_found(edited, llama, change):
    draft, write = edited
    draft.module(NAME).update(change)
    assert "the manifest's entry is not what the source and the options give" in problems(write(), llama)[NAME]


def test_a_changed_scaling_is_found(edited, llama):
    draft, write = edited
    draft.module(NAME)["adapters"][0]["scaling"] = 2.0
    assert "the manifest's entry" in problems(write(), llama)[NAME]


def test_a_changed_kept_tensor_and_asset_are_found(edited, llama):
    draft, write = edited
    for name in ("model.norm.weight", "assets/tokenizer.json"):
        data = draft.array(name)
        data[0] ^= 1
        draft.put(name, data)
    found = problems(write(), llama)
    assert list(found) == ["model.norm.weight", "tokenizer.json"]
    assert "differs from the source's tensor" in found["model.norm.weight"]


def test_a_changed_ledger_is_found(edited, llama):
    draft, write = edited
    draft.manifest["ledger"].pop()
    assert list(problems(write(), llama)) == ["ledger"]


def test_a_tensor_that_the_source_does_not_have_is_found(edited, llama):
    draft, write = edited
    draft.put("model.layers.0.mlp.up_proj.bias", np.ones(4, np.uint8))
    assert "model.layers.0.mlp.up_proj.bias" in " ".join(problems(write(), llama).values())


def test_an_asset_that_the_source_does_not_have_is_found(edited, llama):
    draft, write = edited
    draft.put("assets/modeling_evil.json", np.ones(4, np.uint8))
    assert "modeling_evil.json" in " ".join(problems(write(), llama).values())


def test_an_asset_that_the_file_lacks_is_found(edited, llama):
    draft, write = edited
    draft.drop("assets/tokenizer.json")
    assert list(problems(write(), llama)) == ["tokenizer.json"]


def test_another_source_is_found(packed, llama, tmp_path):
    other = shutil.copytree(llama, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors[f"{NAME}.weight"] *= 2
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    assert sorted(problems(packed, other)) == [NAME, "model.norm.weight"]


def test_a_source_of_another_shape_is_found(packed, gpt2, moe):
    for other in (gpt2, moe):
        found = problems(packed, other)
        assert "ledger" in found and len(found) > 5


def test_an_adapter_that_was_not_given_is_asked_for(llama32, lora, tmp_path):
    salr.convert(llama32, tmp_path / "m.salr", salr.ConvertOptions(adapters=(("style", lora),), method="magnitude"))
    with pytest.raises(OptionError, match="the file holds adapter 'style'; give --adapter style=DIR"):
        problems(tmp_path / "m.salr", llama32)


def test_another_adapter_of_the_same_name_is_found(llama32, lora, make_lora, tmp_path):
    salr.convert(llama32, tmp_path / "m.salr", salr.ConvertOptions(adapters=(("style", lora),), method="magnitude"))
    found = problems(tmp_path / "m.salr", llama32, (("style", make_lora(llama32, 21)),))
    assert len(found) == 4 and all("differs from the trained factor" in problem for problem in found.values())


def test_a_missing_source_or_adapter_is_an_error_of_its_own(packed, llama, tmp_path):
    with pytest.raises(SourceError, match="no such directory"):
        problems(packed, tmp_path / "nowhere")
    with pytest.raises((SourceError, AdapterError)):
        problems(packed, llama, (("a", tmp_path / "nowhere"),))


@pytest.mark.parametrize("options", [{}, {"sparsity": "half"}, {"sparsity": 0.5, "rank": 8, "method": 3}, {"set": 5}])
def test_recorded_options_that_make_no_sense_give_a_clear_error(edited, llama, options):
    draft, write = edited
    draft.manifest["options"] = options
    with pytest.raises(SalrError):
        problems(write(), llama)


def test_what_is_found_is_a_mismatch_that_names_file_and_tensor(edited, llama):
    draft, write = edited
    data = draft.array("model.norm.weight")
    data[0] ^= 1
    draft.put("model.norm.weight", data)
    path = write()
    (problem,) = [problem for _, problem in compare_with_source(salr.open(path), llama) if problem]
    assert type(problem) is MismatchError and str(problem).startswith(f"{path}: tensor 'model.norm.weight': ")


@pytest.mark.parametrize("kind", ["source", "refit"])
def test_another_origin_of_alternatings_values_is_found(llama, open_draft, tmp_path, kind):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="alternating", rounds=2)
    salr.convert(llama, tmp_path / "m.salr", options)
    draft = open_draft(tmp_path / "m.salr")
    draft.module(NAME)["values_from"] = kind
    found = problems(draft.write(tmp_path / "edited.salr"), llama)
    assert "the manifest's entry is not what the source and the options give" in found[NAME]


def test_a_module_that_the_source_does_not_have_is_found(edited, llama):
    draft, write = edited
    draft.manifest["modules"]["extra"] = draft.module(NAME) | {"source_tensor": "extra.weight"}
    for name in [name for name in draft.tensors if name.startswith(NAME + ".")]:
        dtype, shape, _ = draft.tensors[name]
        draft.put(name.replace(NAME, "extra"), draft.array(name), dtype=dtype, shape=shape)
    assert {"extra.values", "extra.bitmap"} <= set(problems(write(), llama))


@pytest.mark.parametrize("change", [{"include": [5]}, {"set": [["*", 5]]}, {"rounds": "many"}, {"scope": [1]}], ids=str)
def test_a_recorded_option_of_a_wrong_type_gives_a_clear_error(edited, llama, change):
    draft, write = edited
    draft.manifest["options"] |= change
    with pytest.raises(SalrError, match=r"edited.salr: the recorded options make no sense|scope \[1\]"):
        problems(write(), llama)
