"""Calibrated conversion from block to block: exact statistics, the same bytes with any workers, and honest notes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from salr.converter.calibration.data import calibration_tokens
from salr.converter.calibration.sequential import open_block_run
from salr.converter.execution.packers import Team
from salr.converter.execution.threads import one_thread_each
from salr.converter.pipeline import plan_conversion
from salr.converter.verification import compare_with_source
from salr.formats.dtypes import from_float32, to_float32
from salr.formats.errors import CalibrationError

import salr

WITH_DATA = ["alternating", "wanda", "sparsegpt", "joint"]
CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.up_proj"


@pytest.fixture
def convert(calibration, tmp_path):
    """Return a function that converts with little random data and returns the file and the report."""

    def run(source, method="joint", out="m.salr", *, sparsity=0.5, rank=4, data=True, **options):
        settings = {"rounds": 4, "calibration": calibration() if data else None} | options
        chosen = salr.ConvertOptions(salr.ModuleOptions(sparsity, rank), method=method, **settings)
        report = salr.convert(source, tmp_path / out, chosen)
        return salr.open(tmp_path / out), report

    return run


def problems(file, source, adapters=()):
    assert [str(problem) for _, problem in file.check_all() if problem] == []
    return [str(problem) for _, problem in compare_with_source(file, source, adapters) if problem]


def direct_grams(model, names, tokens) -> dict[str, torch.Tensor]:
    """Return X^T X of each layer's inputs when transformers runs the whole model."""
    grams = {}

    def note(name):
        def hook(module, args):
            inputs = args[0].reshape(-1, args[0].shape[-1])
            grams[name] = grams.get(name, 0) + inputs.T @ inputs

        return hook

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(note(name))
    with torch.no_grad():
        for sample in tokens:
            model(input_ids=sample[None], use_cache=False)
    return grams


def found_grams(source, options) -> dict[str, torch.Tensor]:
    plan = plan_conversion(source, options)
    with one_thread_each(2) as pool:
        run = open_block_run(plan, options, CPU, Team(pool))
        return {item.module.name: item.gram for found in run.measured() for item in found}


@pytest.mark.parametrize("model", ["llama32", "gpt2"])
def test_gram_matrices_are_those_of_the_models_own_inputs(model, request, calibration):
    from transformers import AutoModelForCausalLM

    source = request.getfixturevalue(model)
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="wanda", calibration=calibration())
    found = found_grams(source, options)
    plan = plan_conversion(source, options)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    expected = direct_grams(whole, list(found), calibration_tokens(options.data, plan.checkpoint))
    assert set(found) == {module.name for module in plan.modules}
    for name, gram in found.items():
        torch.testing.assert_close(gram, expected[name], rtol=1e-4, atol=1e-4 * float(expected[name].abs().max()))


def test_with_a_lora_the_inputs_are_the_adapted_models(llama32, lora, calibration):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = calibration()
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="wanda", calibration=data, adapters=(("a", lora),))
    found, bare = found_grams(llama32, options), found_grams(llama32, salr.ConvertOptions(
        salr.ModuleOptions(0.5, 4), method="wanda", calibration=data
    ))  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(llama32, dtype=torch.float32)
    whole = PeftModel.from_pretrained(base, lora).merge_and_unload().eval()
    tokens = calibration_tokens(data, plan_conversion(llama32, options).checkpoint)
    expected = direct_grams(whole, list(found), tokens)
    for name, gram in found.items():
        torch.testing.assert_close(gram, expected[name], rtol=1e-3, atol=1e-4 * float(expected[name].abs().max()))
    assert not torch.allclose(found[NAME], bare[NAME], rtol=1e-3)


@pytest.mark.parametrize("method", WITH_DATA)
@pytest.mark.parametrize("model", ["llama", "llama32", "gpt2"])
def test_every_calibrated_method_agrees_with_its_source_and_keeps_the_exact_count(convert, request, method, model):
    source = request.getfixturevalue(model)
    file, report = convert(source, method, sparsity=0.6)
    assert problems(file, source) == []
    kinds = {"alternating": "source_minus_residual", "wanda": "source", "sparsegpt": "refit", "joint": "refit"}
    for entry in file.modules.values():
        assert entry.values_from == kinds[method] and 0 < entry.error.output < 1
        per_row = entry.n_columns - entry.n_columns * 6 // 10
        by_layer = entry.n_weights - entry.n_weights * 6 // 10
        assert entry.nnz == (by_layer if method == "sparsegpt" else per_row * entry.n_rows)
    assert [note for note in report.notes if "no calibration data" in note] == []


@pytest.mark.parametrize("method", WITH_DATA)
def test_2_4_and_rank_0_work_with_data_too(convert, llama, method):
    file, _ = convert(llama, method, rank=0, pattern="2:4")
    assert problems(file, llama) == []
    for name, entry in file.modules.items():
        assert entry.pattern == "2:4" and entry.adapters == ()
        assert set(file.module(name).mask().reshape(-1, 4).sum(1).tolist()) == {2}


@pytest.mark.parametrize("model", ["llama", "llama16", "llama32"])
@pytest.mark.parametrize("data", [True, False], ids=["random tokens", "no data"])
def test_alternatings_values_are_the_source_minus_the_stored_residual_bit_for_bit(
    convert, calibration, request, read_tensors, model, data
):
    source = request.getfixturevalue(model)
    file, _ = convert(source, "alternating", calibration=calibration() if data else calibration("none"))
    tensors = read_tensors(source)
    for name, entry in file.modules.items():
        (pair,) = file.pairs(name)
        lora_a, lora_b = (to_float32(factor, pair.dtype).astype(np.float64) for factor in (pair.lora_A, pair.lora_B))
        exact = (tensors[f"{name}.weight"].double().numpy() - lora_b @ lora_a).astype(np.float32)
        expected = from_float32(exact, entry.dtype)[file.module(name).mask()]
        assert entry.values_from == "source_minus_residual"
        assert file.module(name).stored().tobytes() == expected.tobytes()


@pytest.mark.parametrize("method", WITH_DATA)
def test_an_adapter_is_kept_exact_beside_a_calibrated_base(convert, llama32, lora, method):
    file, _ = convert(llama32, method, adapters=(("a", lora),))
    assert problems(file, llama32, (("a", lora),)) == []


@pytest.mark.parametrize("method", ["alternating", "joint"])
def test_one_and_two_workers_give_the_same_bytes_with_data(convert, llama, method):
    files = [convert(llama, method, f"{workers}.salr", workers=workers)[0] for workers in (1, 2)]
    assert files[0].path.read_bytes() == files[1].path.read_bytes()


def test_data_lowers_the_error_of_the_outputs(convert, llama32):
    shares = {}
    for method in ("wanda", "joint"):
        file, _ = convert(llama32, method, f"{method}.salr", rounds=12)
        shares[method] = np.mean([entry.error.output for entry in file.modules.values()])
    assert shares["joint"] < 0.9 * shares["wanda"]


def test_too_few_tokens_are_reported_and_the_numbers_stay_finite(convert, calibration, llama):
    file, report = convert(llama, calibration=calibration(samples=1, length=5))
    (note,) = report.notes
    assert note.startswith("5 calibration tokens are fewer than the inputs of 14 modules (") and "damped" in note
    assert all(np.isfinite(file.dense(name)).all() for name in file.modules)
    assert problems(file, llama) == []


def test_only_the_layers_with_more_inputs_than_tokens_are_counted_as_singular(convert, llama):
    (note,) = convert(llama)[1].notes  # 72 tokens; down_proj has 96 inputs, all others 64
    assert note.startswith("72 calibration tokens are fewer than the inputs of 2 modules (model.layers.0.mlp.down_proj")


def test_enough_tokens_leave_no_note(convert, calibration, llama):
    assert convert(llama, calibration=calibration(samples=4, length=32))[1].notes == ()


def test_stacked_experts_fall_back_and_are_counted_in_a_note(convert, stacked_moe):
    file, report = convert(stacked_moe)
    blind = sorted(name for name, entry in file.modules.items() if entry.error.output is None)
    assert blind == sorted(name for name, entry in file.modules.items() if len(entry.shape) == 3) and len(blind) == 4
    assert {file.modules[name].values_from for name in blind} == {"source_minus_residual"}
    assert {entry.values_from for entry in file.modules.values() if entry.error.output is not None} == {"refit"}
    assert any(note.startswith("4 modules saw no calibration data") and blind[0] in note for note in report.notes)
    assert problems(file, stacked_moe) == []


def test_a_layer_outside_the_blocks_falls_back_and_is_named_in_a_note(convert, llama):
    file, report = convert(llama, include=("lm_head",))
    assert file.modules["lm_head"].error.output is None
    assert any(note.startswith("1 modules saw no calibration data") and "lm_head" in note for note in report.notes)
    assert problems(file, llama) == []


@pytest.fixture
def unknown_class(llama, tmp_path):
    """Return a Llama directory whose config names a class that transformers does not have."""
    source = shutil.copytree(llama, tmp_path / "unknown")
    config = json.loads((source / "config.json").read_text()) | {"architectures": ["NobodysModel"], "model_type": "x"}
    (source / "config.json").write_text(json.dumps(config))
    return source


@pytest.mark.parametrize("model", ["unknown_class", "moe"])
def test_a_model_that_cannot_be_run_is_an_error_where_data_was_asked_for(convert, request, tmp_path, model):
    source = request.getfixturevalue(model)
    with pytest.raises(CalibrationError, match="NobodysModel" if model == "unknown_class" else "MixtralForCausalLM"):
        convert(source)
    assert not [path for path in tmp_path.iterdir() if ".salr" in path.name]


@pytest.mark.parametrize("model", ["unknown_class", "moe"])
def test_the_default_falls_back_to_weights_alone_with_a_note_and_records_it(convert, request, model):
    source = request.getfixturevalue(model)
    file, report = convert(source, None, data=False)
    (note,) = report.notes
    assert note.startswith("Random calibration tokens could not be used: ") and note.endswith("by weights alone.")
    assert file.manifest.options["calibration"] is None and file.manifest.options["method"] == "alternating"
    assert all(entry.error.output is None for entry in file.modules.values())
    assert problems(file, source) == []


def test_activations_that_overflow_are_named(convert, llama32, tmp_path):
    source = shutil.copytree(llama32, tmp_path / "hot")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"] = torch.full((64,), 3e38)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CalibrationError, match=r"hot: tensor 'model\.layers\.1\.self_attn\.\w+': its inputs are not finite"
    ):
        convert(source)
    assert [path.name for path in tmp_path.iterdir()] == ["hot"]


@pytest.mark.parametrize("method", ["wanda", "joint"])
def test_nan_in_a_weight_is_named_with_data_too(convert, llama32, tmp_path, method):
    source, name = shutil.copytree(llama32, tmp_path / "nan"), f"{NAME}.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(salr.SalrError, match=r"nan: tensor 'model\.layers\.1\.mlp\.\w+"):
        convert(source, method)


def test_random_tokens_are_recorded_by_kind_and_count(convert, calibration, llama):
    file, _ = convert(llama, calibration=calibration(seed=5))
    expected = {"kind": "synthetic", "samples": 3, "length": 24, "seed": 5}
    assert file.manifest.options["calibration"] == expected
    assert str(llama) not in bytes(file.raw("salr.manifest")).decode()


def test_the_seed_chooses_the_tokens_and_so_the_bytes(convert, calibration, llama):
    one, _ = convert(llama, out="a.salr")
    two, _ = convert(llama, out="b.salr", calibration=calibration(seed=1))
    assert one.raw(f"{NAME}.values") != two.raw(f"{NAME}.values")
