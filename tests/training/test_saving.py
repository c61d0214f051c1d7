"""What was trained goes into a .salr file: the base's bytes, the new factors, and what the manifest says of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from salr.formats.errors import AdapterError, OptionError, OutputError

import salr

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
Q = "model.layers.0.self_attn.q_proj"


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def load(path):
    return salr.load(path, dtype="fp32")


def prepared(path, **options):
    torch.manual_seed(0)
    return salr.prepare_for_training(load(path), **{"rank": 4} | options)


def base_of(file):
    """Return the names of all tensors that are no factor."""
    parts = ".lora_", ".rank_scales."
    return {name for name in file.tensors if name != "salr.manifest" and not any(part in name for part in parts)}


def assert_same_base(before, after):
    """Compare raw bytes of everything that is no factor."""
    before, after = salr.open(before), salr.open(after)
    assert base_of(before) == base_of(after)
    for name in base_of(before):
        assert bytes(before.raw(name)) == bytes(after.raw(name)), name
    assert not [problem for _, problem in after.check_all() if problem is not None]


@pytest.fixture(scope="module")
def to_save(packed):
    """Return a prepared model, to be saved and not changed."""
    return prepared(packed)


@pytest.fixture
def trained(packed, train, tmp_path):
    """Return (a model with trained adapter and residual, its file)."""
    tuned = prepared(packed)
    train(tuned)
    salr.save(tuned, tmp_path / "tuned.salr")
    return tuned, tmp_path / "tuned.salr"


def test_the_saved_file_computes_what_was_trained_and_keeps_the_bases_bytes(packed, trained):
    tuned, path = trained
    expected = logits(tuned)
    assert (expected - logits(load(packed))).abs().max() > 0.05
    torch.testing.assert_close(logits(load(path)), expected, rtol=1e-5, atol=1e-5)
    assert_same_base(packed, path)


def test_factors_are_pefts_bit_for_bit_in_their_own_dtype(packed, trained, train, tmp_path):
    tuned, path = trained
    half = salr.prepare_for_training(salr.load(packed), rank=4, autocast_adapter_dtype=False)
    train(half)
    salr.save(half, tmp_path / "half.salr")
    for model, file, dtype in ((tuned, path, "F32"), (half, tmp_path / "half.salr", "BF16")):
        file, layer = salr.open(file), model.get_base_model().get_submodule(Q)
        for adapter in ("default", "residual"):
            stored = file.tensors[f"{Q}.lora_A.{adapter}"]
            raw = layer.lora_A[adapter].weight.detach().contiguous().view(torch.uint8).numpy().tobytes()
            assert stored.dtype == dtype and bytes(file.raw(stored.name)) == raw


def test_the_manifest_says_what_was_trained_and_how(packed, trained):
    before, after = salr.open(packed).manifest, salr.open(trained[1]).manifest
    settings = after.source["trained"]
    assert settings["default"]["r"] == 4 and settings["default"]["lora_alpha"] == 8
    assert settings["default"]["target_modules"] == "all-linear" and "peft" in settings["residual"]["trainer"]
    residual, default = after.modules[Q].adapters
    assert residual.origin == f"low-rank part of magnitude, trained by salr {salr.__version__}"
    assert (default.name, default.rank, default.scaling, default.alpha) == ("default", 4, 2.0, 8.0)
    assert after.modules[Q].error == before.modules[Q].error and after.ledger == before.ledger


def test_wherever_errors_are_shown_they_are_said_to_be_older_than_the_residual(packed, trained, tmp_path):
    from salr.converter.export.model_card import model_card

    from salr.cli.inspect import summary_lines
    from salr.evaluation.report_html import write_report

    for path, is_trained in ((packed, False), (trained[1], True)):
        file = salr.open(path)
        write_report(file, tmp_path / "page.html", None)
        shown = ["\n".join(summary_lines(file)), model_card(file), (tmp_path / "page.html").read_text()]
        assert ["before the residual was trained or merged" in text for text in shown] == [is_trained] * 3


def test_a_residual_that_was_not_touched_keeps_its_bytes_and_its_origin(packed, tmp_path):
    tuned = prepared(packed)
    report = salr.save(tuned, tmp_path / "m.salr")
    assert [adapter.name for adapter in report.adapters] == ["default"]
    before, after = salr.open(packed), salr.open(tmp_path / "m.salr")
    for name in set(before.tensors) - {"salr.manifest"}:
        assert bytes(before.raw(name)) == bytes(after.raw(name))
    assert before.modules[Q].adapters == after.modules[Q].adapters[:1]


def test_a_plain_peft_model_is_saved_alike_and_the_frozen_residual_stays(packed, train, tmp_path):
    tuned = get_peft_model(load(packed), LoraConfig(**LORA), "style")
    train(tuned)
    report = salr.save(tuned, tmp_path / "m.salr")
    assert [(a.name, a.n_modules, a.scalings) for a in report.adapters] == [("style", 4, (2.0,))]
    assert report.n_bytes == (tmp_path / "m.salr").stat().st_size
    torch.testing.assert_close(logits(load(tmp_path / "m.salr")), logits(tuned), rtol=1e-5, atol=1e-5)
    assert_same_base(packed, tmp_path / "m.salr")
    assert salr.open(tmp_path / "m.salr").manifest.source["trained"]["style"]["target_modules"] == [
        "down_proj",
        "q_proj",
    ]


def test_every_encoding_and_an_int8_residual_go_through(mixed, train, tmp_path):
    tuned = prepared(mixed)
    train(tuned)
    salr.save(tuned, tmp_path / "m.salr")
    down = "model.layers.0.mlp.down_proj"
    assert f"{down}.rank_scales.residual" in salr.open(mixed).tensors
    assert f"{down}.rank_scales.residual" not in salr.open(tmp_path / "m.salr").tensors
    torch.testing.assert_close(logits(load(tmp_path / "m.salr")), logits(tuned), rtol=1e-4, atol=1e-5)
    assert_same_base(mixed, tmp_path / "m.salr")


def test_an_old_adapter_stays_and_can_be_trained_further(llama32, lora, train, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 2), method="magnitude", adapters=(("old", lora),))
    salr.convert(llama32, tmp_path / "m.salr", options)
    with pytest.raises(AdapterError, match="adapter 'old' exists already; give another name, or train it further"):
        prepared(tmp_path / "m.salr", name="old")
    with pytest.raises(AdapterError, match="no adapter 'new' to train further, needed one of: old"):
        prepared(tmp_path / "m.salr", name="new", rank=None)
    halved = load(tmp_path / "m.salr")
    halved.set_adapters({"old": 0.5})
    with pytest.raises(salr.SalrError, match=r"adapter 'old' acts at 0\.5 of its scaling, needed 1"):
        salr.prepare_for_training(halved, name="old", rank=None)
    first = prepared(tmp_path / "m.salr", name="new")
    train(first)
    salr.save(first, tmp_path / "2.salr")
    before, after = salr.open(tmp_path / "m.salr"), salr.open(tmp_path / "2.salr")
    assert bytes(before.raw(f"{Q}.lora_A.old")) == bytes(after.raw(f"{Q}.lora_A.old"))
    further = prepared(tmp_path / "2.salr", name="old", rank=None)
    torch.testing.assert_close(logits(further), logits(first), rtol=1e-5, atol=1e-5)
    train(further)
    salr.save(further, tmp_path / "3.salr")
    old = next(a for a in salr.open(tmp_path / "3.salr").modules[Q].adapters if a.name == "old")
    assert old.origin == f"PEFT LoRA, trained by salr {salr.__version__}" and (old.alpha, old.scaling) == (6.0, 1.5)
    torch.testing.assert_close(logits(load(tmp_path / "3.salr")), logits(further), rtol=1e-5, atol=1e-5)
    assert set(salr.open(tmp_path / "3.salr").manifest.source["trained"]) == {"new", "old", "residual"}


def test_values_that_followed_from_the_residual_are_marked_as_free(llama, train, tmp_path):
    options = salr.ConvertOptions(
        calibration=salr.CalibrationOptions("none"), rounds=2, module=salr.ModuleOptions(0.5, 4)
    )
    salr.convert(llama, tmp_path / "m.salr", options)
    assert salr.open(tmp_path / "m.salr").modules[Q].values_from == "source_minus_residual"
    tuned = prepared(tmp_path / "m.salr")
    train(tuned, 1)
    salr.save(tuned, tmp_path / "tuned.salr")
    assert salr.open(tmp_path / "tuned.salr").modules[Q].values_from == "refit"
    from salr.converter.verification import compare_with_source

    found = dict(compare_with_source(salr.open(tmp_path / "tuned.salr"), llama))
    assert len(found) > 14 and not [problem for problem in found.values() if problem is not None]


def test_removing_a_trained_adapter_leaves_no_trace(packed, train, tmp_path):
    tuned = prepared(packed, train_residual=False)
    train(tuned)
    salr.save(tuned, tmp_path / "m.salr")
    salr.remove_adapter(tmp_path / "m.salr", "default")
    assert (tmp_path / "m.salr").read_bytes() == packed.read_bytes()


def test_what_was_merged_into_an_adapter_keeps_its_settings_by_name_also_when_that_is_trained(trained, train, tmp_path):
    path = trained[1]
    before = salr.open(path).manifest.source["trained"]
    assert set(before) == {"default", "residual"}
    salr.merge_adapters(path, ["residual", "default"], "residual", rank=8)
    assert salr.open(path).manifest.source["trained"] == {"residual": {"merged_from": before}}
    further = prepared(path)
    train(further, 1)
    salr.save(further, tmp_path / "further.salr", settings={"seed": 5})
    found = salr.open(tmp_path / "further.salr").manifest.source["trained"]["residual"]
    assert (found["merged_from"], found["seed"], set(found)) == (before, 5, {"trainer", "seed", "merged_from"})


def test_peft_directories_of_a_tuned_file_compute_the_same(trained, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tuned, path = trained
    salr.export_peft(path, tmp_path / "out", dtype="fp32")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    model = PeftModel.from_pretrained(model, tmp_path / "out" / "adapters" / "residual", adapter_name="residual")
    model.load_adapter(tmp_path / "out" / "adapters" / "default", adapter_name="default")
    model.base_model.set_adapter(["residual", "default"], inference_mode=True)
    torch.testing.assert_close(logits(model), logits(tuned), rtol=1e-4, atol=1e-5)


def test_an_output_that_exists_is_replaced_only_by_force(packed, trained):
    tuned, path = trained
    with pytest.raises(OutputError, match="the output exists already; give --force"):
        salr.save(tuned, path)
    before = path.read_bytes()
    salr.save(tuned, path, force=True)
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir() if "tuned" in p.name] == [
        "tuned.salr"
    ]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": Path("train.jsonl")}, r"setting 'data' cannot be recorded \(Object of type PosixPath is not JSON"),
        ({"seed": 1, "loss": float("nan")}, r"setting 'loss' cannot be recorded \(.*needed what JSON holds: text, fin"),
        ({"deep": {"list": [{1, 2}]}}, r"setting 'deep' .* type set is not JSON serializable.*; convert it first"),
        ({"twice": {1: "a", "1": "b"}}, "setting 'twice' cannot be recorded"),
        ({"text": "\udc80"}, "setting 'text' cannot be recorded"),
        ({1: "a"}, r"setting 1 cannot be recorded \(its name is no text\)"),
        ([("a", 1)], "settings of type list, needed a dict"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_settings_that_json_cannot_hold_are_refused_and_leave_nothing(to_save, tmp_path, settings, words):
    with pytest.raises(OptionError, match=words):
        salr.save(to_save, tmp_path / "o.salr", settings=settings)
    assert list(tmp_path.iterdir()) == []


def test_settings_of_every_json_type_are_recorded(to_save, tmp_path):
    settings = {"text": "ä", "on": True, "none": None, "rate": 1e-3, "steps": [1, 2], "data": {"lines": 8}}
    salr.save(to_save, tmp_path / "o.salr", settings=settings)
    recorded = salr.open(tmp_path / "o.salr").manifest.source["trained"]["default"]
    assert recorded == recorded | settings


def refusal(call, path, words):
    with pytest.raises(AdapterError, match=words):
        call()
    assert not path.exists() and not path.with_name(path.name + ".partial").exists()


def test_a_taken_name_is_refused_with_the_file(llama32, lora, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 2), method="magnitude", adapters=(("default", lora),))
    salr.convert(llama32, tmp_path / "m.salr", options)
    tuned = get_peft_model(load(tmp_path / "m.salr"), LoraConfig(**LORA))
    refusal(
        lambda: salr.save(tuned, tmp_path / "o.salr"), tmp_path / "o.salr", "m.salr: adapter 'default' exists already"
    )


def test_what_no_file_can_hold_is_refused(packed, llama, tmp_path):
    out = tmp_path / "o.salr"
    cases = [
        ({"target_modules": ["q_proj", "lm_head"]}, "tensor 'lm_head': its adapter is on a layer that is not packed"),
        ({"lora_bias": True}, "adapter 'default' has lora_bias=True, needed plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.*is trained and no LoRA factor, needed a frozen base"),
    ]
    for config, words in cases:
        tuned = get_peft_model(load(packed), LoraConfig(**LORA | config))
        refusal(lambda tuned=tuned: salr.save(tuned, out), out, words)
    thawed = prepared(packed)
    thawed.get_base_model().model.norm.weight.requires_grad_(True)
    refusal(lambda: salr.save(thawed, out), out, "tensor 'model.norm.weight': it is trained and no LoRA factor")
    diverged = prepared(packed)
    with torch.no_grad():
        diverged.get_base_model().get_submodule(Q).lora_A["default"].weight[0, 0] = np.nan
    refusal(lambda: salr.save(diverged, out), out, f"tensor '{Q}': adapter 'default' holds NaN or infinity")
    lost = prepared(packed)
    lost.delete_adapter("residual")
    refusal(lambda: salr.save(lost, out), out, "adapter 'residual' was deleted from the model")
    refusal(lambda: salr.save(load(packed), out), out, "has no adapter of peft; use salr.prepare_for_training")


def test_a_model_that_is_no_longer_the_files_or_never_was_is_refused(packed, llama, tmp_path, trained):
    from transformers import AutoModelForCausalLM

    copy, out = shutil.copy(packed, tmp_path / "copy.salr"), tmp_path / "o.salr"
    tuned = prepared(copy)
    shutil.copy(trained[1], copy)
    refusal(lambda: salr.save(tuned, out), out, "copy.salr: the file has changed since the model was loaded")
    dense = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(**LORA))
    refusal(lambda: salr.save(dense, out), out, "LlamaForCausalLM does not come from a .salr file")
    with pytest.raises(AdapterError, match=r"does not come from a .salr file, needed a packed model; load it with"):
        salr.prepare_for_training(AutoModelForCausalLM.from_pretrained(llama))
