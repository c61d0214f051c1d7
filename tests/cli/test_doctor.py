"""salr doctor and salr export hf."""

from __future__ import annotations

import json

import torch


def test_doctor_names_every_backend_and_why_one_cannot_be_used(salr, monkeypatch):
    from salr.runtime import backends

    monkeypatch.setitem(backends.MODULES, "absent", "salr.no_such_backend")
    result = salr("doctor")
    assert result.exit_code == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in result.stdout.splitlines() if " " in line}
    assert lines["reference"] == "usable" and lines["absent"] == "not installed"
    assert f"torch {torch.__version__}" in result.stdout


def test_doctor_gives_json(salr):
    found = json.loads(salr("doctor", "--json").stdout)
    assert found["devices"][0]["name"] == "cpu" and found["devices"][0]["backend"] in ("cpu", "reference")
    assert {"name": "reference", "reason": None} in found["backends"]
    assert found["libraries"]["torch"] == torch.__version__


def test_export_hf_writes_a_directory_that_loads_and_says_how(salr, speaker, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = salr("export", "hf", speaker, tmp_path / "hf")
    assert result.exit_code == 0 and "import salr" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "SalrLinear" and tokenizer("w3")["input_ids"] == [3]


def test_export_refuses_what_exists_and_what_has_no_config(fails, speaker, draft, tmp_path):
    (tmp_path / "out").mkdir()
    assert "the output exists already" in fails("export", "hf", speaker, tmp_path / "out")
    draft.drop("assets/config.json")
    path = draft.write(tmp_path / "f.salr")
    assert "tensor 'assets/config.json': is missing" in fails("export", "hf", path, tmp_path / "hf")


def test_export_hf_puts_a_recorded_evaluation_into_the_model_card(salr, fails, speaker, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 " * 20)
    saved = tmp_path / "found.json"
    result = salr("eval", speaker, "--text", tmp_path / "text.txt", "--window", 32, "--save", saved)
    assert result.exit_code == 0, result.output
    assert salr("export", "hf", speaker, tmp_path / "hf", "--eval", saved).exit_code == 0
    card, found = (tmp_path / "hf" / "README.md").read_text(), json.loads(saved.read_text())
    assert f"| {found['results'][0]['perplexity']:.2f} |" in card and "window 32" in card
    saved.write_text("{}")
    assert "has no kind" in fails("export", "hf", speaker, tmp_path / "other", "--eval", saved)
    assert not (tmp_path / "other").exists()
