"""Loading: a .salr file's logits are exactly those of its unpacked directory, and nothing is left at random."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from salr.converter import plan
from salr.formats.errors import SalrError

import salr
from salr.evaluation.errors import EvaluationError
from salr.evaluation.models import load_model, open_model

IDS = torch.arange(1, 21).reshape(2, 10)


def logits(path):
    model, _ = load_model(path)
    with torch.no_grad():
        return model(IDS).logits


def test_a_file_with_residual_and_adapter_has_the_logits_of_its_merged_directory(reader_salr, tmp_path):
    from transformers import AutoModelForCausalLM

    salr.unpack(reader_salr, tmp_path / "out", merge=True, dtype="fp32")
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(IDS).logits
    assert expected.dtype == torch.float32 and torch.equal(logits(reader_salr), expected)
    salr.unpack(reader_salr, tmp_path / "plain", merge=False, dtype="fp32")
    assert not torch.equal(logits(tmp_path / "plain"), expected)


@pytest.mark.parametrize("source", ["gpt2", "moe", "stacked_moe", "tied_llama", "llama16"])
def test_transposed_stacked_fused_and_tied_weights_load_exactly(source, request, readers, tmp_path):
    folder = readers(request.getfixturevalue(source), tmp_path / "m")
    salr.convert(folder, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.4, 4), method="magnitude"))
    salr.unpack(tmp_path / "m.salr", tmp_path / "out", dtype="fp32")
    found = logits(tmp_path / "m.salr")
    assert torch.equal(found, logits(tmp_path / "out")) and not torch.equal(found, logits(folder))


def test_names_without_the_base_models_prefix_load_too(reader, readers, tmp_path):
    folder = shutil.copytree(reader, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert set(bare) != set(tensors)
    save_file(bare, folder / "model.safetensors", metadata={"format": "pt"})
    salr.convert(folder, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.0, 0), method="magnitude"))
    assert torch.equal(logits(tmp_path / "m.salr"), logits(reader))


def test_an_encoder_loads_too(tmp_path, readers):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    BertModel(config).save_pretrained(tmp_path / "bert")
    folder = readers(tmp_path / "bert", tmp_path / "m")
    salr.convert(folder, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.0, 0), method="magnitude"))
    packed, tokenizer = load_model(tmp_path / "m.salr")
    dense, _ = load_model(folder)
    ids = torch.tensor(tokenizer("w1 w2 w3")["input_ids"])[None]
    assert torch.equal(packed(ids).last_hidden_state, dense(ids).last_hidden_state)


def test_dtype_and_tokenizer_are_what_was_asked_for(reader_salr):
    model, tokenizer = load_model(reader_salr, "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training
    assert tokenizer("w3 w7")["input_ids"] == [3, 7]


def test_what_was_written_for_the_tokenizer_is_gone_afterwards(reader_salr, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with open_model(reader_salr):
        assert len(list(tmp_path.iterdir())) == 1
    load_model(reader_salr)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_missing_is_refused_not_drawn_at_random(reader, tmp_path, monkeypatch):
    folder = shutil.copytree(reader, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluationError, match=r"m: tensor 'model.layers.1.mlp.up_proj.weight': is missing"):
        load_model(folder)
    monkeypatch.setattr(plan, "check_weights", lambda checkpoint, model: [])  # as files were made once
    salr.convert(folder, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude"))
    with pytest.raises(EvaluationError, match=r"m.salr: tensor 'model.layers.1.mlp.up_proj.weight': is missing"):
        load_model(tmp_path / "m.salr")


def test_an_unknown_class_a_missing_tokenizer_and_a_missing_path_are_told(reader, tmp_path, edit_config):
    folder = edit_config(shutil.copytree(reader, tmp_path / "m"), architectures=["NoSuchModel"])
    with pytest.raises(EvaluationError, match="names NoSuchModel, needed a model class of transformers"):
        load_model(folder)
    bare = shutil.copytree(reader, tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(EvaluationError, match=r"bare: no usable tokenizer \(.*copy the model's tokenizer files"):
        load_model(bare)
    with pytest.raises(EvaluationError, match="nothing: no such file or directory, needed a model directory or"):
        load_model(tmp_path / "nothing")
    with pytest.raises(SalrError, match=r"config.json: cannot be read"):
        load_model(tmp_path)


def test_a_file_without_a_config_is_told(golden, draft, tmp_path):
    draft.drop("assets/config.json")
    with pytest.raises(EvaluationError, match=r"f.salr: it has no config.json"):
        load_model(draft.write(tmp_path / "f.salr"))
