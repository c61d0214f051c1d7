"""Whole models: what ONNX Runtime computes from an exported directory is what torch computes from the .salr file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from salr.formats.errors import OptionError, OutputError

import salr
from salr.onnx import export_onnx
from salr.onnx.contract import register_schema
from salr.onnx.errors import ExportError

OPTIONS = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude")


def checked(folder: Path) -> onnx.ModelProto:
    """Check a directory's graph in full and return it without its weights."""
    register_schema()
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return onnx.load(folder / "model.onnx", load_external_data=False)


def external(model: onnx.ModelProto) -> dict[str, dict[str, str]]:
    """Return where each initializer that is not in the graph lies."""
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in model.graph.initializer
        if tensor.external_data
    }


# An export takes seconds, most of them torch's for each layer: tests share what they only read, and what does not
# depend on how many layers there are takes one.


@pytest.fixture(scope="module")
def exported(export_command) -> Path:
    """Return the tiny Llama of two layers exported with everything as it is by default; nobody writes there."""
    return export_command[1]


@pytest.fixture(scope="module")
def shallow(llama32, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of one layer with a tied output layer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(4)
    config = AutoConfig.from_pretrained(llama32, num_hidden_layers=1, tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("shallow") / "llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shallow_gpt2(gpt2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GPT-2 of one layer, whose linear layers are stored transposed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp("shallow") / "gpt2"
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(gpt2, n_layer=1)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(shallow: Path, make_lora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a .salr file with two trained adapters."""
    out = tmp_path_factory.mktemp("tuned") / "m.salr"
    other = make_lora(shallow, seed=7, r=2, target_modules=["q_proj", "gate_proj"])
    adapters = (("first", str(make_lora(shallow))), ("second", str(other)))
    salr.convert(shallow, out, salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude", adapters=adapters))
    return out


@pytest.fixture(scope="module")
def overridable(tuned: Path, library, tmp_path_factory: pytest.TempPathFactory):
    """Return ``tuned`` exported with adapters to be exchanged, at the oldest opset, with the library beside it."""
    folder = tmp_path_factory.mktemp("overridable") / "out"
    return export_onnx(tuned, folder, adapters="overridable", opset=18, library=True, verify=True)


def logits(folder: Path, run_model, library: Path | None = None, ids: tuple[int, ...] = (3, 14, 15, 92)) -> np.ndarray:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    feed = {
        "input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64),
        "position_ids": np.arange(len(ids))[None],
    }  # fmt: skip
    for value in model.graph.input:
        if value.name.startswith("past_key_values."):
            shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
            feed[value.name] = np.zeros((1, shape[1], 0, shape[3]), np.float32)
    return run_model(folder / "model.onnx", feed, library)[0]


def torch_logits(path: Path, scales: dict[str, float] | None = None, ids=(3, 14, 15, 92)) -> np.ndarray:
    model = salr.load(path, dtype="fp32", backend="reference")
    if scales is not None:
        model.set_adapters(scales)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.numpy()


def test_the_logits_are_torchs_with_the_library_and_without(packed, exported, run_model, library):
    expected = torch_logits(packed)
    for chosen in (None, library):
        np.testing.assert_allclose(logits(exported, run_model, chosen), expected, atol=1e-5)


def test_the_graph_is_sound_and_points_into_the_salr_file(packed, exported):
    model = checked(exported)
    assert {entry["location"] for entry in external(model).values()} == {"model.salr"}
    assert (exported / "model.salr").read_bytes() == packed.read_bytes()
    assert {path.name for path in exported.glob("*.bin")} == set()
    file, name = salr.open(packed), "model.layers.0.self_attn.q_proj.values"
    assert int(external(model)[name]["offset"]) == file.tensors[name].begin
    assert sum(node.op_type == "SparseLinear" for node in model.graph.node) == len(file.modules)


def test_the_graph_says_what_it_is_and_nothing_of_this_machine(exported):
    model = checked(exported)
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert facts["salr.format_version"] == "1" and facts["salr.sparse_linear_version"] == "1"
    raw = (exported / "model.onnx").read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in raw and b"site-packages" not in raw


def test_batches_padding_and_a_cache_are_torchs(packed, exported, run_model, library):
    model = salr.load(packed, dtype="fp32", backend="reference")
    ids, mask = torch.randint(0, 128, (3, 5)), torch.ones(3, 9, dtype=torch.int64)
    mask[1, :2] = 0
    position = (mask.cumsum(1) - 1).clamp(min=0)[:, 4:]
    past = [tuple(torch.randn(3, 2, 4, 16) for _ in range(2)) for _ in range(2)]
    cache = __import__("transformers").DynamicCache()
    for layer, (key, value) in enumerate(past):
        cache.update(key, value, layer)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, position_ids=position, past_key_values=cache).logits.numpy()
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
    feed |= {f"past_key_values.{i}.{kind}": past[i][j] for i in range(2) for j, kind in enumerate(("key", "value"))}
    found = run_model(exported / "model.onnx", {name: value.numpy() for name, value in feed.items()}, library)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert found[1].shape == (3, 2, 9, 16)


@pytest.mark.parametrize("options", [{"weights": "dense"}, {"dtype": "fp16", "adapters": "overridable"}])
def test_every_option_verifies(options, shallow, tmp_path, library, monkeypatch):
    """Nobody has trained an adapter here, so there is none to override. The model counts as a large one."""
    monkeypatch.setattr("salr.onnx.export.LARGE", 1000)
    salr.convert(shallow, tmp_path / "m.salr", OPTIONS)
    made = export_onnx(tmp_path / "m.salr", tmp_path / "out", verify=True, **options)
    checked(made.folder)
    found = made.verification
    assert found.with_body < (2e-2 if "dtype" in options else 1e-5) and found.with_library is not None
    assert (made.folder / "model.salr").exists() == ("weights" not in options)
    assert made.adapter_files == () and len(made.warnings) == ("weights" not in options)


@pytest.mark.parametrize("name", ["shallow", "shallow_gpt2"])
def test_quantized_tied_and_transposed_weights_verify(name, request, tmp_path, library):
    rules = (("*.mlp.*", {"values": "nf4"}),)
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4, values="int8"), method="magnitude", overrides=rules)
    salr.convert(request.getfixturevalue(name), tmp_path / "m.salr", options)
    made = export_onnx(tmp_path / "m.salr", tmp_path / "out", verify=True)
    model = checked(made.folder)
    assert {function.overload for function in model.functions} == {"int8_sparse_lora", "nf4_sparse_lora"}
    assert made.verification.with_body < 1e-5 and made.verification.with_library < 1e-5


def test_an_encoder_verifies(tmp_path, library):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "bert")
    salr.convert(tmp_path / "bert", tmp_path / "m.salr", OPTIONS)
    made = export_onnx(tmp_path / "m.salr", tmp_path / "out", verify=True)
    model = checked(made.folder)
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    assert [value.name for value in model.graph.output] == ["last_hidden_state", "pooler_output"]
    assert made.verification.with_body < 1e-5 and made.verification.with_library < 1e-5
    assert not (made.folder / "genai_config.json").exists()


def test_several_adapters_are_fused_into_one_file(tuned, tmp_path, run_model, library):
    folder = export_onnx(tuned, tmp_path / "out", verify=True).folder
    assert "adapters.bin" in {entry["location"] for entry in external(checked(folder)).values()}
    np.testing.assert_allclose(logits(folder, run_model, library), torch_logits(tuned), atol=1e-5)


def test_adapters_are_exchanged_at_run_time(tuned, overridable, library):
    import onnxruntime

    made = overridable
    assert made.adapter_files == (
        "adapters/first.onnx_adapter", "adapters/second.onnx_adapter", "no_adapter.onnx_adapter",
    )  # fmt: skip
    checked(made.folder)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(made.folder / "model.onnx"), options, ["CPUExecutionProvider"])
    feed = {"input_ids": np.array([[3, 14, 15, 92]]), "attention_mask": np.ones((1, 4), np.int64)}
    feed |= {"position_ids": np.arange(4)[None]}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values."):
            feed[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    for path, scales in zip(made.adapter_files, ({"first": 1.0}, {"second": 1.0}, {}), strict=True):
        adapter = onnxruntime.LoraAdapter()
        adapter.Load(str(made.folder / path))
        run = onnxruntime.RunOptions()
        run.add_active_adapter(adapter)
        np.testing.assert_allclose(session.run(None, feed, run)[0], torch_logits(tuned, scales), atol=1e-5)
    np.testing.assert_allclose(session.run(None, feed)[0], torch_logits(tuned), atol=1e-5)


def test_a_generating_runtime_finds_its_configuration(exported):
    config = json.loads((exported / "genai_config.json").read_text())["model"]
    assert config["type"] == "llama" and config["vocab_size"] == 128 and config["decoder"]["head_size"] == 16
    names = {value.name for value in checked(exported).graph.input}
    assert set(config["decoder"]["inputs"].values()) >= {"past_key_values.%d.key"}
    assert {"input_ids", "attention_mask", "position_ids", "past_key_values.1.value"} <= names


def test_the_oldest_opset_verifies(overridable):
    model = checked(overridable.folder)
    assert next(opset.version for opset in model.opset_import if not opset.domain) == 18
    assert overridable.verification.with_body < 1e-5 and overridable.verification.with_library < 1e-5


def test_the_library_goes_into_the_directory_where_it_is_asked_for(exported, overridable, library):
    options = [
        json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
        for folder in (exported, overridable.folder)
    ]
    assert "custom_ops_library" not in options[0]
    assert (overridable.folder / options[1]["custom_ops_library"]).read_bytes() == library.read_bytes()


def test_a_mixture_of_experts_is_refused_and_leaves_nothing(moe, tmp_path):
    salr.convert(moe, tmp_path / "m.salr", OPTIONS)
    with pytest.raises(ExportError, match="a mixture of experts"):
        export_onnx(tmp_path / "m.salr", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.salr"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "packed"}, "weights 'packed'"), ({"adapters": "none"}, "adapters 'none'"),
        ({"opset": 17}, "opset 17"), ({"opset": 26}, "opset 26, needed 18 to 25"), ({"dtype": "bf16"}, "dtype 'bf16'"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(options, message, packed, tmp_path):
    with pytest.raises(OptionError, match=message):
        export_onnx(packed, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused(packed, tmp_path):
    with pytest.raises(OutputError, match="exists already"):
        export_onnx(packed, tmp_path)


def test_large_models_are_told_what_the_function_body_costs(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("salr.onnx.export.LARGE", 1000)
    monkeypatch.setattr("salr.onnx.export._write", lambda *_: [])
    made = export_onnx(packed, tmp_path / "out")
    assert made.verification is None
    assert len(made.warnings) == 1 and "--weights dense" in made.warnings[0]
    assert export_onnx(packed, tmp_path / "dense", weights="dense").warnings == ()


def test_a_graph_that_computes_something_else_is_not_written(packed, exported, tmp_path, monkeypatch):
    """The directory is the sound one but for a weight of the last norm."""
    place = external(checked(exported))["model.norm.weight"]

    def write(_file, folder, _options):
        shutil.copytree(exported, folder, dirs_exist_ok=True)
        with (folder / place["location"]).open("r+b") as weights:
            weights.seek(int(place["offset"]))
            weights.write(b"\0\0")
        return []

    monkeypatch.setattr("salr.onnx.export._write", write)
    with pytest.raises(ExportError, match="with the function body ONNX Runtime differs from torch by"):
        export_onnx(packed, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
