"""What PEFT trains beyond a LoRA: each type, setting and start is refused by name with its reason, none slips by."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from peft import LoraConfig, PeftType
from salr.converter.adapters import refusals
from salr.converter.adapters.source import Adapter
from salr.formats.errors import AdapterError


@pytest.fixture
def edited(lora, tmp_path):
    """Return a function that copies a LoRA directory and changes its configuration."""

    def edit(**changes):
        folder = shutil.copytree(lora, tmp_path / "adapter", dirs_exist_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return edit


def test_every_type_of_peft_is_lora_or_has_a_reason():
    assert {kind.value for kind in PeftType} - {"LORA"} <= set(refusals.TYPES)


@pytest.mark.parametrize("kind", sorted({kind.value for kind in PeftType} - {"LORA"}))
def test_another_type_is_refused_by_name_with_its_reason(edited, kind):
    with pytest.raises(AdapterError) as error:
        Adapter(edited(peft_type=kind), "a")
    assert f"PEFT type {kind} " in str(error.value) and refusals.TYPES[kind] in str(error.value)
    assert "merge it into its base" in str(error.value)


def test_every_setting_of_a_lora_is_understood_or_refused():
    settings = {field.name for field in dataclasses.fields(LoraConfig)}
    assert settings <= refusals.UNDERSTOOD | set(refusals.SETTINGS)
    assert not refusals.UNDERSTOOD & set(refusals.SETTINGS)


@pytest.mark.parametrize("setting", [*refusals.SETTINGS, "made_up"])
def test_a_setting_without_an_exact_form_is_refused_by_name(edited, setting):
    reason = refusals.SETTINGS.get(setting, "setting 'made_up' is unknown to this version")
    with pytest.raises(AdapterError) as error:
        Adapter(edited(**{setting: {"k": 1}}), "a")
    assert reason in str(error.value)


@pytest.mark.parametrize("start", ["pissa_niter_16", "corda", "loftq", "lora_ga", "made_up"])
def test_a_start_whose_factors_cannot_be_made_again_is_refused(edited, start):
    reason = next((r for s, r in refusals.STARTS.items() if start.startswith(s)), "is unknown to this version")
    with pytest.raises(AdapterError) as error:
        Adapter(edited(init_lora_weights=start), "a")
    assert start in str(error.value) and reason in str(error.value)


def test_dora_with_lora_bias_is_refused(edited):
    with pytest.raises(AdapterError, match="DoRA with lora_bias"):
        Adapter(edited(use_dora=True, lora_bias=True), "a")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"use_dora": True}, "has no magnitude"),
        ({"layer_replication": [[2, 1]]}, "layer_replication is"),
        ({"target_parameters": "experts"}, "target_parameters is"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(edited, setting, words):
    with pytest.raises(AdapterError, match=words):
        assert Adapter(edited(**setting), "a").settings.layer_ranges()
