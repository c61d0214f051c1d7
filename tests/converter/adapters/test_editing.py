"""Adapters edited in a finished file: the base keeps its bytes, adding equals converting with it, every refusal."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from salr.converter.adapters.editing import add_adapter, remove_adapter, scale_adapter
from salr.converter.adapters.summary import list_adapters
from salr.converter.verification import compare_with_source
from salr.formats.errors import AdapterError, ChecksumError, FormatError, OutputError, SalrError
from salr.formats.reader import SalrFile
from salr.formats.rewriting import Destination
from salr.formats.writer import SalrWriter

import salr

Q = "model.layers.0.self_attn.q_proj"
MAGNITUDE = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude")


def sound(path):
    """Return the file, every digest and structure of it checked."""
    file = salr.open(path)
    assert [problem for _, problem in file.check_all() if problem] == []
    return file


def differences(path, source, adapters=()):
    return {name: str(found) for name, found in compare_with_source(sound(path), source, adapters) if found}


def unchanged(before, after):
    """Check that every tensor in both files, except the manifest, has the same dtype, shape, bytes and digest."""
    common = (set(before.tensors) & set(after.tensors)) - {"salr.manifest"}
    for name in common:
        old, new = before.tensors[name], after.tensors[name]
        assert (old.dtype, old.shape, bytes(before.raw(name))) == (new.dtype, new.shape, bytes(after.raw(name)))
        assert before.manifest.checksums[name] == after.manifest.checksums[name]
    return common


def test_adding_gives_the_very_file_that_converting_with_the_adapter_gives(plain, adapted, lora, tmp_path):
    summary = add_adapter(plain, lora, "a", Destination(tmp_path / "added.salr"))
    assert (tmp_path / "added.salr").read_bytes() == adapted.read_bytes()
    assert (summary.name, summary.n_modules, summary.ranks, summary.scalings) == ("a", 4, (4,), (1.5,))


def test_removing_gives_the_very_file_that_converting_without_it_gives(plain, adapted, tmp_path):
    remove_adapter(adapted, "a", Destination(tmp_path / "removed.salr"))
    assert (tmp_path / "removed.salr").read_bytes() == plain.read_bytes()


@pytest.mark.parametrize("model", ["llama32", "gpt2"])
def test_a_layer_packed_only_for_an_adapter_is_kept_dense_again_when_that_goes(model, request, make_lora, tmp_path):
    source, leaf = request.getfixturevalue(model), {"llama32": "lm_head", "gpt2": "c_proj"}[model]
    target = {"llama32": "lm_head", "gpt2": "h.1.mlp.c_proj"}[model]
    folder = make_lora(source, 24, target_modules=[target], save_embedding_layers=False, fan_in_fan_out=model == "gpt2")
    options = replace(MAGNITUDE, exclude=(f"*{leaf}",))
    salr.convert(source, tmp_path / "with.salr", replace(options, adapters=(("a", folder), ("b", folder))))
    salr.convert(source, tmp_path / "without.salr", options)
    remove_adapter(tmp_path / "with.salr", "a")
    assert any(leaf in name for name in SalrFile(tmp_path / "with.salr").modules)
    remove_adapter(tmp_path / "with.salr", "b")
    assert (tmp_path / "with.salr").read_bytes() == (tmp_path / "without.salr").read_bytes()


def test_removing_the_residual_gives_the_very_file_that_rank_0_gives(adapted, llama32, lora, tmp_path):
    options = salr.ConvertOptions(
        salr.ModuleOptions(0.5, 8),
        method="magnitude",
        adapters=(("a", lora),),
        overrides=(("*.q_proj", {"rank": 3}), ("*.up_proj", {"rank": 2, "sparsity": 0.25})),
    )
    without = replace(options, module=salr.ModuleOptions(0.5, 0), overrides=(("*.up_proj", {"sparsity": 0.25}),))
    salr.convert(llama32, tmp_path / "with.salr", options)
    salr.convert(llama32, tmp_path / "without.salr", without)
    remove_adapter(tmp_path / "with.salr", "residual")
    assert (tmp_path / "with.salr").read_bytes() == (tmp_path / "without.salr").read_bytes()


def test_an_edited_file_agrees_with_its_source_and_adapters(plain, llama32, lora, make_lora, tmp_path):
    out = shutil.copy(plain, tmp_path / "m.salr")
    second = make_lora(llama32, 21, r=2, target_modules=["k_proj", "q_proj"], use_rslora=True)
    add_adapter(out, second, "b")
    add_adapter(out, lora, "a")
    given_adapters = (("b", second), ("a", lora))
    assert differences(out, llama32, given_adapters) == {}
    scale_adapter(out, "b", factor=0.5)
    scale_adapter(out, "residual", factor=0.5)
    assert differences(out, llama32, given_adapters) == {}
    remove_adapter(out, "b")
    assert differences(out, llama32, (("a", lora),)) == {}
    remove_adapter(out, "residual")
    assert differences(out, llama32, (("a", lora),)) == {}


@pytest.mark.parametrize("edit", ["add", "remove", "scale"])
def test_every_untouched_tensor_keeps_bytes_and_digest(edit, mine, adapted, lora):
    if edit == "add":
        add_adapter(mine, lora, "b")
    elif edit == "remove":
        remove_adapter(mine, "a")
    else:
        scale_adapter(mine, "a", factor=3)
    kept = unchanged(SalrFile(adapted), sound(mine))
    assert len(kept) == len(SalrFile(adapted).tensors) - 1 - (8 if edit == "remove" else 0)


def test_the_golden_file_with_every_encoding_keeps_all_bytes(golden, tmp_path):
    remove_adapter(golden, "style", Destination(tmp_path / "removed.salr"))
    before, after = SalrFile(golden), sound(tmp_path / "removed.salr")
    gone = {"layers.0.attn.q.lora_A.style", "layers.0.attn.q.lora_B.style"}
    assert unchanged(before, after) == set(before.tensors) - gone - {"salr.manifest"}
    assert set(before.tensors) - set(after.tensors) == gone
    assert after.manifest.source == before.manifest.source


def test_factors_and_scaling_act_as_they_were_trained(plain, llama32, lora, tmp_path):
    add_adapter(plain, lora, "new", Destination(tmp_path / "m.salr"))
    tensors = load_file(lora / "adapter_model.safetensors")
    key = f"base_model.model.{Q}.lora_A.weight"
    expected = 1.5 * tensors[key.replace("_A", "_B")].double() @ tensors[key].double()
    np.testing.assert_allclose(sound(tmp_path / "m.salr").adapters(Q, ["new"]).product(), expected, atol=1e-6)


def test_checkpoints_that_leave_out_the_base_models_prefix_take_adapters_that_name_it(gpt2, make_lora, tmp_path):
    bare = shutil.copytree(gpt2, tmp_path / "bare")
    tensors = load_file(bare / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in tensors.items()}, bare / "model.safetensors")
    folder = make_lora(gpt2, 22, target_modules=["c_attn"], fan_in_fan_out=True)
    salr.convert(bare, tmp_path / "plain.salr", MAGNITUDE)
    salr.convert(bare, tmp_path / "with.salr", replace(MAGNITUDE, adapters=(("a", folder),)))
    add_adapter(tmp_path / "plain.salr", folder, "a")
    assert "h.0.attn.c_attn" in SalrFile(tmp_path / "plain.salr").modules
    assert (tmp_path / "plain.salr").read_bytes() == (tmp_path / "with.salr").read_bytes()


def test_whoever_has_the_old_file_mapped_reads_its_bytes_until_they_close_it(mine, adapted):
    mapped = SalrFile(mine)
    remove_adapter(mine, "a")
    old = SalrFile(adapted)
    assert all(bytes(mapped.raw(name)) == bytes(old.raw(name)) for name in old.tensors)
    assert "a" not in {adapter.name for adapter in SalrFile(mine).modules[Q].adapters}


def test_a_symbolic_link_stays_one_and_the_file_behind_it_is_replaced(mine, tmp_path):
    link = tmp_path / "link.salr"
    link.symlink_to(mine)
    remove_adapter(link, "a")
    assert link.is_symlink() and [a.name for a in list_adapters(mine)] == ["residual"]


def test_output_leaves_the_file_alone_and_replaces_another_only_by_force(adapted, plain, tmp_path):
    before = adapted.read_bytes()
    out = tmp_path / "out.salr"
    out.write_bytes(b"old")
    with pytest.raises(OutputError, match="the output exists already; give --force"):
        remove_adapter(adapted, "a", Destination(out))
    assert out.read_bytes() == b"old"
    remove_adapter(adapted, "a", Destination(out, force=True))
    assert out.read_bytes() == plain.read_bytes() and adapted.read_bytes() == before


@pytest.mark.parametrize("place", ["write_pieces", "finish"])
def test_an_interrupted_edit_leaves_the_old_file(refuses, mine, lora, monkeypatch, place):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(SalrWriter, place, interrupted)
    refuses(mine, KeyboardInterrupt, [], add_adapter, lora, "b")


def test_an_edit_that_another_one_overtook_is_refused_and_loses_nothing(refuses, mine, lora, monkeypatch):
    opened = SalrFile(mine)
    add_adapter(mine, lora, "b")
    monkeypatch.setattr("salr.converter.adapters.editing.SalrFile", lambda path: opened)
    refuses(mine, OutputError, "was changed while it was edited; run the command again", remove_adapter, "a")


def test_what_a_killed_edit_left_is_named_and_fresh_discards_it(refuses, mine):
    partial = mine.with_name("mine.salr.partial")
    partial.mkdir()
    (partial / "data").write_bytes(b"half")
    refuses(mine, OutputError, "--fresh", remove_adapter, "a")
    remove_adapter(mine, "a", Destination(fresh=True))
    assert not partial.exists() and [a.name for a in list_adapters(mine)] == ["residual"]


def test_a_damaged_tensor_is_refused_and_gets_no_fresh_digest(refuses, mine):
    data = bytearray(mine.read_bytes())
    data[SalrFile(mine).tensors["model.embed_tokens.weight"].begin] ^= 1
    mine.write_bytes(data)
    words = "tensor 'model.embed_tokens.weight': its bytes differ from their digest"
    refuses(mine, ChecksumError, words, scale_adapter, "a", factor=2)


@pytest.mark.parametrize("edit", [remove_adapter, lambda path, name: scale_adapter(path, name, factor=2)])
def test_an_unknown_adapter_is_refused_with_the_names_there_are(refuses, mine, edit):
    refuses(mine, AdapterError, "there is no adapter 'b', needed one of: a, residual", edit, "b")


@pytest.mark.parametrize("done", ["removed", "scaled"])
def test_a_residual_that_values_were_fitted_to_is_refused_with_the_reason(refuses, llama, tmp_path, done):
    out = tmp_path / "m.salr"
    salr.convert(llama, out, salr.ConvertOptions(calibration=salr.CalibrationOptions("none"), rounds=2))
    words = [f"the residual cannot be {done}: its kept values were chosen to be used with it", "source_minus_residual"]
    if done == "removed":
        refuses(out, AdapterError, words, remove_adapter, "residual")
    else:
        refuses(out, AdapterError, words, scale_adapter, "residual", factor=2)


def test_a_residual_beside_rounded_values_is_refused_because_its_error_is_not_known(refuses, mine, open_draft):
    draft = open_draft(mine)
    draft.module(Q)["dtype"] = "BF16"
    draft.write(mine)
    words = "the residual cannot be removed: its values are rounded to fp32, so the error without it is not known"
    refuses(mine, AdapterError, words, remove_adapter, "residual")


@pytest.mark.parametrize(
    ("name", "words"),
    [("a", "adapter 'a' exists already"), ("residual", "and not 'residual'"), ("a.b", "letters, digits")],
)
def test_a_name_that_is_taken_or_reserved_is_refused(refuses, mine, lora, name, words):
    refuses(mine, AdapterError, words, add_adapter, lora, name)


def edited_lora(lora, tmp_path, change):
    folder = shutil.copytree(lora, tmp_path / "broken" / "lora")
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_shapes_that_disagree_are_refused_with_both(refuses, mine, lora, tmp_path):
    key = f"base_model.model.{Q}.lora_A.weight"
    folder = edited_lora(lora, tmp_path, lambda tensors: tensors.update({key: torch.zeros(4, 32)}))
    refuses(mine, AdapterError, f"tensor '{Q}': factors for a 64 x 32 weight, needed 64 x 64", add_adapter, folder, "b")


def test_keys_that_match_no_packed_module_are_named_and_counted(refuses, mine, gpt2, make_lora):
    other = make_lora(gpt2, 2, target_modules=["c_attn"], fan_in_fan_out=True)
    words = ["tensor 'transformer.h.0.attn.c_attn'", "has no such module (and 1 more), needed a packed module"]
    refuses(mine, AdapterError, words, add_adapter, other, "b")


def test_an_adapter_on_a_weight_kept_dense_is_told_how_it_can_be_packed(refuses, mine, llama32, make_lora):
    head = make_lora(llama32, 3, target_modules=["lm_head"], save_embedding_layers=False)
    words = ["tensor 'lm_head'", "keeps its weight dense", "convert the source again with --adapter"]
    refuses(mine, AdapterError, words, add_adapter, head, "b")


def test_an_adapter_without_factors_is_refused(refuses, mine, lora, tmp_path):
    folder = edited_lora(lora, tmp_path, lambda tensors: tensors.clear())
    refuses(mine, AdapterError, "holds no factors", add_adapter, folder, "b")


@pytest.mark.parametrize("directory", ["nowhere", "empty"])
def test_a_missing_directory_or_config_is_one_line(refuses, mine, tmp_path, directory):
    (tmp_path / "empty").mkdir()
    refuses(mine, SalrError, "adapter_config.json: cannot be read", add_adapter, tmp_path / directory, "b")


def test_a_missing_file_is_one_line(tmp_path, lora):
    for edit in (
        lambda path: list_adapters(path),
        lambda path: add_adapter(path, lora),
        lambda path: remove_adapter(path, "a"),
        lambda path: scale_adapter(path, "a", factor=1),
    ):
        with pytest.raises(FormatError, match="no such file; check the path"):
            edit(tmp_path / "nowhere.salr")


@pytest.mark.parametrize("recorded", [{"source": {}}, {"source": {"files": "x", "class": ["y"]}}, {"options": {}}])
def test_whatever_source_and_options_record_an_edit_still_works(mine, lora, open_draft, recorded):
    draft = open_draft(mine)
    draft.manifest.update(recorded)
    draft.write(mine)
    add_adapter(mine, lora, "b")
    remove_adapter(mine, "residual")
    assert {adapter.name for adapter in list_adapters(mine)} == {"a", "b"}
    sound(mine)


def test_list_sums_up_every_adapter_residual_first(mine, llama32, make_lora):
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}}
    add_adapter(mine, make_lora(llama32, 23, **patterns), "A2")
    residual, second, first = list_adapters(mine)
    file = SalrFile(mine)
    assert (residual.name, residual.n_modules, residual.ranks) == ("residual", 14, (8,))
    assert (second.ranks, second.scalings, second.alphas) == ((2, 4), (0.75, 3.0), (3.0, 6.0))
    assert (first.name, first.origins) == ("a", ("PEFT LoRA",))
    stored = sum(t.n_bytes for name, t in file.tensors.items() if name.endswith(".a"))
    assert first.n_bytes == stored > 0


def test_the_ledger_and_the_input_files_gain_and_lose_the_adapters_lines(plain, lora, tmp_path):
    out = shutil.copy(plain, tmp_path / "m.salr")
    add_adapter(out, lora, "b")
    manifest = sound(out).manifest
    keys = set(load_file(lora / "adapter_model.safetensors"))
    lines = [line for line in manifest.ledger if line.key in keys]
    assert {(line.fate, line.file) for line in lines} == {("packed", "b/adapter_model.safetensors")}
    assert len(lines) == len(keys) and "b/adapter_model.safetensors" in json.dumps(manifest.source["files"])
    remove_adapter(out, "b")
    assert salr.open(out).manifest == salr.open(plain).manifest
