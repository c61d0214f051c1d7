"""Back to a dense directory: transformers loads it, and its logits are those of W_hat + BA."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open
from salr.formats.dtypes import from_float32, to_float32
from salr.formats.errors import OptionError, OutputError, SalrError
from salr.formats.reader import SalrFile

import salr

OPTIONS = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude")
INPUT = torch.arange(12).reshape(2, 6)


def logits(folder):
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(INPUT).logits


def with_weights(folder, file: SalrFile, **what):
    """Return the logits of the source model after putting the file's dense weights into it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name, entry in file.modules.items():
        weight = torch.from_numpy(file.dense(name, **what))
        model.get_submodule(name).weight.data = weight.T if entry.transposed else weight
    with torch.no_grad():
        return model(INPUT).logits


@pytest.mark.parametrize("model", ["llama32", "gpt2"])
@pytest.mark.parametrize("residual", [True, False])
def test_the_unpacked_model_has_the_logits_of_the_files_weights(model, residual, request, tmp_path):
    source = request.getfixturevalue(model)
    salr.convert(source, tmp_path / "m.salr", OPTIONS)
    salr.unpack(tmp_path / "m.salr", tmp_path / "out", residual=residual)
    found, expected = logits(tmp_path / "out"), with_weights(source, salr.open(tmp_path / "m.salr"), residual=residual)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, logits(source), atol=1e-4)


@pytest.mark.parametrize("model", ["moe", "stacked_moe"])
def test_an_unpacked_mixture_of_experts_loads_with_every_weight(model, request, tmp_path):
    source = request.getfixturevalue(model)
    salr.convert(source, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.0), method="magnitude"))
    salr.unpack(tmp_path / "m.salr", tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(source), rtol=0, atol=0)


@pytest.mark.parametrize("model", ["llama", "tied_llama", "gpt2", "moe", "stacked_moe"])
def test_the_unpacked_directory_has_the_sources_tensors_names_and_assets(model, request, tmp_path, read_tensors):
    source = request.getfixturevalue(model)
    salr.convert(source, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude"))
    salr.unpack(tmp_path / "m.salr", tmp_path / "out")
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in before.items()} == {n: (t.dtype, t.shape) for n, t in after.items()}
    packed = {entry.source_tensor for entry in salr.open(tmp_path / "m.salr").modules.values()}
    assert all(torch.equal(before[name], after[name]) for name in set(before) - packed)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {path.name for path in source.iterdir()}
    assert all(
        (tmp_path / "out" / n).read_bytes() == (source / n).read_bytes() for n in names if n != "model.safetensors"
    )
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tied_embeddings_load_tied(tied_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    salr.convert(tied_llama, tmp_path / "m.salr", OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(salr.unpack(tmp_path / "m.salr", tmp_path / "out"))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_sparsity_0_comes_back_bit_for_bit(llama, tmp_path, read_tensors):
    salr.convert(llama, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.0), method="magnitude"))
    salr.unpack(tmp_path / "m.salr", tmp_path / "out")
    before, after = read_tensors(llama), read_tensors(tmp_path / "out")
    assert all(torch.equal(before[name].view(torch.int16), after[name].view(torch.int16)) for name in before)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_another_dtype_rounds_every_float_tensor_once(packed, tmp_path, read_tensors, dtype, kind):
    salr.unpack(packed, tmp_path / "out", dtype=dtype)
    file, tensors = salr.open(packed), read_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {kind}
    name = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]
    for module, entry in file.modules.items():
        expected = to_float32(from_float32(file.dense(module), name), name)
        np.testing.assert_array_equal(tensors[entry.source_tensor].float().numpy(), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(kind).removeprefix("torch.")


def test_an_unknown_dtype_is_refused(packed, tmp_path):
    with pytest.raises(OptionError, match="dtype 'int8', needed one of source, bf16, fp16, fp32"):
        salr.unpack(packed, tmp_path / "out", dtype="int8")


def test_an_existing_directory_is_refused_and_left_alone(packed, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="out: the output exists already"):
        salr.unpack(packed, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_module_leaves_no_directory(packed, tmp_path):
    data = bytearray(packed.read_bytes())
    data[next(t.begin for t in salr.open(packed).tensors.values() if t.name.endswith("bitmap"))] ^= 1
    (tmp_path / "bad.salr").write_bytes(data)
    with pytest.raises(SalrError, match="bitmap"):
        salr.unpack(tmp_path / "bad.salr", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.salr"]


def test_a_disk_that_is_too_small_leaves_no_directory(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OutputError, match="disk space free"):
        salr.unpack(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["config.json/x"], ["a", "a/b"], ["model.safetensors"], ["n" * 300]])
def test_assets_that_stand_in_each_others_way_give_a_clear_error(golden, open_draft, tmp_path, names):
    draft = open_draft(golden)
    for name in names:
        draft.put(f"assets/{name}", np.zeros(3, np.uint8))
    with pytest.raises(SalrError, match=r"out|hostile"):
        salr.unpack(draft.write(tmp_path / "hostile.salr"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.salr"]


@pytest.mark.parametrize("config", [b"nonsense", b"[]", b'["dtype"]', b"\xff"])
def test_a_carried_config_that_is_no_object_never_ends_in_a_traceback(golden, open_draft, tmp_path, config):
    draft = open_draft(golden)
    draft.put("assets/config.json", np.frombuffer(config, np.uint8), shape=(len(config),))
    path = draft.write(tmp_path / "hostile.salr")
    try:
        salr.unpack(path, tmp_path / "out", dtype="fp32")
    except SalrError:
        assert not (tmp_path / "out").exists()
    else:
        assert (tmp_path / "out" / "config.json").is_file()


def test_progress_ends_with_every_tensor(packed, tmp_path):
    seen = []
    salr.unpack(packed, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 21) for done in range(22)]


def test_leaving_the_residual_out_is_refused_where_values_were_fitted_to_it(llama, tmp_path):
    salr.convert(llama, tmp_path / "m.salr", salr.ConvertOptions(calibration=salr.CalibrationOptions("none"), rounds=2))
    with pytest.raises(OptionError, match="drop --no-residual"):
        salr.unpack(tmp_path / "m.salr", tmp_path / "out", residual=False)
    assert not (tmp_path / "out").exists()
