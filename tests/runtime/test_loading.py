"""salr.load and salr.load_tokenizer: one file, checked, mapped, and every refusal with what to do."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from salr.formats import validation
from salr.formats.errors import AdapterError, ChecksumError, FormatError, OptionError, VersionError
from salr.formats.manifest import MANIFEST_NAME
from salr.formats.reader import SalrFile

import salr
from salr.runtime import backends, loading, memory
from salr.runtime.errors import BackendError, LoadError
from salr.runtime.experts import packed_modules

ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def addresses(path):
    """Return where the file is mapped in this process."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    return [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in lines]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's table of memory maps")
def test_every_weight_lies_in_the_files_memory_map(packed):
    model = salr.load(packed)
    maps = addresses(packed)
    assert maps
    for name, tensor in model.state_dict().items():
        assert any(start <= tensor.data_ptr() < stop for start, stop in maps), name


def test_the_dtype_is_the_configs_unless_another_is_asked_for(packed):
    assert salr.load(packed).dtype == torch.bfloat16
    for dtype in ("fp32", torch.float32):
        model = salr.load(packed, dtype=dtype)
        assert model.model.norm.weight.dtype == torch.float32 and logits(model).dtype == torch.float32
        assert model.model.layers[0].mlp.up_proj.values.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), logits(salr.load(packed)).float(), rtol=0.05, atol=0.02)
    with pytest.raises(OptionError, match="dtype 'int8', needed auto, bf16, fp16, fp32"):
        salr.load(packed, dtype="int8")


def test_buffers_that_no_file_holds_are_computed(packed):
    model = salr.load(packed)
    inv_freq = model.model.rotary_emb.inv_freq
    width = model.config.head_dim
    expected = 1 / model.config.rope_parameters["rope_theta"] ** (torch.arange(0, width, 2) / width)
    torch.testing.assert_close(inv_freq, expected)


def test_the_generation_config_is_honoured(llama, tmp_path, make_lora):
    import json

    folder = shutil.copytree(llama, tmp_path / "m")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 77, "temperature": 0.25}))
    salr.convert(folder, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 2), method="magnitude"))
    config = salr.load(tmp_path / "m.salr").generation_config
    assert (config.eos_token_id, config.temperature) == (77, 0.25)


def test_trained_adapters_are_active_and_can_be_switched(llama32, lora, tmp_path):
    options = salr.ConvertOptions(
        salr.ModuleOptions(0.0, 0), method="magnitude", adapters=(("style", lora),)
    )  # nothing removed: the base is the source
    salr.convert(llama32, tmp_path / "m.salr", options)
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, base = salr.load(tmp_path / "m.salr"), AutoModelForCausalLM.from_pretrained(llama32)
    plain = logits(base)
    tuned = logits(PeftModel.from_pretrained(base, lora))
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-5)
    model.set_adapters({})
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
    model.set_adapters({"style": 1.0})
    torch.testing.assert_close(logits(model), tuned, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tuned, plain, rtol=1e-3)
    with pytest.raises(AdapterError, match="adapter 'tone', needed one of style"):
        model.set_adapters({"tone": 1.0})


def test_a_backend_can_be_named(packed):
    model = salr.load(packed, backend="reference")
    assert {module.backend for _, module in packed_modules(model)} == {"reference"}
    with pytest.raises(BackendError, match="backend 'quickest', needed one of"):
        salr.load(packed, backend="quickest")


def test_a_device_map_places_the_model(packed):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model = salr.load(packed, device_map="auto")
    assert torch.equal(logits(model), logits(salr.load(packed)))


def test_layers_may_be_offloaded_to_disk(packed, tmp_path):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    placed = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    from salr.converter.export.hf import export_hf
    from transformers import AutoModelForCausalLM

    folder = export_hf(packed, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=placed, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(model), logits(salr.load(packed)))


def test_the_model_outlives_the_file_object_and_its_folder_is_gone(packed, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = salr.load(packed)
    gc.collect()
    assert list(tmp_path.iterdir()) == [] and logits(model).isfinite().all()
    assert model.name_or_path == str(packed)


def test_the_tokenizer_comes_from_the_file(speaker):
    tokenizer = salr.load_tokenizer(speaker)
    assert tokenizer("w3 w7")["input_ids"] == [3, 7] and tokenizer.name_or_path == str(speaker)


def test_a_file_without_a_tokenizer_says_what_to_do(draft, tmp_path):
    with pytest.raises(LoadError, match=r"f.salr: no usable tokenizer \(.*copy the model's tokenizer files beside"):
        salr.load_tokenizer(draft.write(tmp_path / "f.salr"))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unused_kernels(monkeypatch):
    """Fail where any backend is called."""

    def never(*arguments, **options):
        pytest.fail("a kernel was called")

    monkeypatch.setattr("salr.runtime.matrix.Matrix.product", never)


@pytest.mark.parametrize("suffix", ["bitmap", "values", "row_offsets", "lora_A.residual"])
def test_one_flipped_bit_is_refused_before_any_kernel(packed, tmp_path, suffix, unused_kernels):
    name = f"model.layers.1.mlp.down_proj.{suffix}"
    shutil.copy(packed, tmp_path / "f.salr")
    flip(tmp_path / "f.salr", name, 8)
    with pytest.raises(ChecksumError, match=rf"f.salr: tensor '{name}': its bytes differ"):
        salr.load(tmp_path / "f.salr")


def test_a_bitmap_that_lies_with_a_right_digest_is_refused(packed, open_draft, tmp_path, unused_kernels):
    draft = open_draft(packed)
    name = "model.layers.0.mlp.up_proj.bitmap"
    bitmap = draft.array(name)
    bitmap[0] ^= 1
    draft.put(name, bitmap)
    with pytest.raises(FormatError, match=rf"tensor '{name}': row 0 has another number of set bits"):
        salr.load(draft.write(tmp_path / "f.salr"))


def test_the_structure_is_checked_before_a_backend_lays_weights_out(packed, open_draft, tmp_path, monkeypatch):
    draft = open_draft(packed)
    name = "model.layers.0.mlp.up_proj.bitmap"
    bitmap = draft.array(name)
    bitmap[0] ^= 1
    draft.put(name, bitmap)
    monkeypatch.setattr(loading, "_make_ready", lambda model: pytest.fail("a module was used unchecked"))
    with pytest.raises(FormatError, match=rf"tensor '{name}': row 0 has another number of set bits"):
        salr.load(draft.write(tmp_path / "f.salr"))


def test_digests_are_checked_while_the_model_is_built(packed, monkeypatch):
    digest, build, built = validation.digest, loading._from_pretrained, threading.Event()

    def after_building(data):
        assert not threading.current_thread().name.startswith("salr-check") or built.wait(60)
        return digest(data)

    def building(*arguments):
        model = build(*arguments)
        built.set()
        return model

    monkeypatch.setattr(validation, "digest", after_building)
    monkeypatch.setattr(loading, "_from_pretrained", building)
    assert logits(salr.load(packed)).isfinite().all()


def test_damage_is_told_rather_than_that_the_model_cannot_be_built(open_draft, packed, tmp_path):
    path = changed_config(open_draft, packed, tmp_path, num_hidden_layers=3)
    flip(path, "model.norm.weight")
    with pytest.raises(ChecksumError, match=r"tensor 'model.norm.weight': its bytes differ") as raised:
        salr.load(path)
    assert isinstance(raised.value.__context__, LoadError)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("salr-check")]


def test_what_needs_no_weight_is_told_without_waiting_for_digests(open_draft, packed, tmp_path):
    path = changed_config(open_draft, packed, tmp_path, architectures=["Llama9ForCausalLM"])
    flip(path, "model.norm.weight")
    with pytest.raises(LoadError, match="names Llama9ForCausalLM"):
        salr.load(path)


def test_a_damaged_config_or_tokenizer_is_told_as_damage(speaker, tmp_path):
    for name, load in (("config.json", salr.load), ("tokenizer.json", salr.load_tokenizer)):
        path = shutil.copy(speaker, tmp_path / "f.salr")
        flip(path, f"assets/{name}")
        with pytest.raises(ChecksumError, match=rf"f.salr: tensor 'assets/{name}': its bytes differ"):
            load(path)


def flip(path, name, index=0):
    """Flip a bit of a tensor's byte in its file."""
    position = salr.open(path).tensors[name].begin + index
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def test_a_truncated_file_is_refused(packed, tmp_path):
    (tmp_path / "f.salr").write_bytes(packed.read_bytes()[:-100])
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        salr.load(tmp_path / "f.salr")


def test_a_newer_file_says_to_upgrade(draft, tmp_path):
    draft.metadata["salr_version"] = "2"
    with pytest.raises(VersionError, match="format version '2', needed version 1; upgrade salr"):
        salr.load(draft.write(tmp_path / "f.salr"))


def changed_config(open_draft, packed, tmp_path, **changes):
    import json

    draft = open_draft(packed)
    config = json.loads(bytes(draft.array("assets/config.json"))) | changes
    data = np.frombuffer(json.dumps(config).encode(), np.uint8)
    draft.put("assets/config.json", data, shape=(data.size,))
    return draft.write(tmp_path / "f.salr")


def test_a_class_that_transformers_lacks_is_named_with_what_to_do(open_draft, packed, tmp_path):
    path = changed_config(open_draft, packed, tmp_path, architectures=["Llama9ForCausalLM"])
    with pytest.raises(LoadError, match=r"names Llama9ForCausalLM, which transformers 5\.\S+ does not have; upgrade"):
        salr.load(path)
    (tmp_path / "other").mkdir()
    path = changed_config(open_draft, packed, tmp_path / "other", model_type="llama9")
    with pytest.raises(LoadError, match=r"transformers \S+ cannot read its config .*llama9.*; upgrade transformers"):
        salr.load(path)


def test_a_config_of_another_size_is_told(open_draft, packed, tmp_path):
    path = changed_config(open_draft, packed, tmp_path, num_hidden_layers=3)
    with pytest.raises(LoadError, match=r"tensor 'model.layers.2.*': is missing from the file, needed every weight"):
        salr.load(path)


def test_a_file_without_a_config_is_told(draft, tmp_path):
    draft.drop("assets/config.json")
    with pytest.raises(LoadError, match=r"f.salr: it carries no config.json; convert the model again"):
        salr.load(draft.write(tmp_path / "f.salr"))


def test_too_little_memory_says_what_is_needed_and_what_to_do(packed, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    salr.load(packed)  # mapped: nothing to allocate
    with pytest.raises(LoadError, match=r"0.00 GB of memory free on cpu, needed 0.00 GB; .*device_map='auto'"):
        salr.load(packed, dtype="fp32")


def test_free_memory_is_known_here_or_unknown():
    free = memory.free_bytes(torch.device("cpu"))
    assert free is None or free > 10**6
    assert memory.free_bytes(torch.device("meta")) is None


def test_importing_salr_loads_nothing_heavy_and_stays_out_of_the_way():
    code = """
import sys, salr
assert {"convert", "load", "open", "SalrFile"} <= set(dir(salr))
assert not {"torch", "transformers", "peft", "numba"} & set(sys.modules)
import transformers.quantizers.auto as auto
assert "salr" in auto.AUTO_QUANTIZER_MAPPING and "salr" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
assert auto.__spec__.loader.__class__.__module__ != "salr.integrations.hooks"
"""
    done = subprocess.run([sys.executable, "-W", "error::UserWarning:salr", "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_manifest_is_no_weight(packed):
    assert MANIFEST_NAME not in salr.load(packed).state_dict()


def test_the_default_backend_of_the_cpu_is_usable():
    assert backends.reason_unusable(backends.choose("cpu")) is None


@pytest.mark.parametrize("encoding", ["int8", "nf4"])
def test_quantized_values_and_an_int8_residual_load_and_compute(packed, tmp_path, encoding):
    path = quantized(packed, tmp_path / "q.salr", encoding)
    salr.unpack(path, tmp_path / "dense", dtype="fp32")
    from transformers import AutoModelForCausalLM

    model, dense = salr.load(path, dtype="fp32"), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert {module.entry.encoding for _, module in packed_modules(model)} == {encoding}
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)


def quantized(packed, path, encoding):
    """Write the file again with quantized values, and the residual in int8."""
    from dataclasses import replace

    from salr.formats import naming
    from salr.formats.container import TensorSpec
    from salr.formats.dtypes import to_float32
    from salr.formats.values import encode_quantized, pad_values
    from salr.formats.writer import SalrWriter

    file, group = SalrFile(packed), 16
    tensors = {name: (stored.dtype, file.tensor(name)) for name, stored in file.tensors.items()}
    del tensors[MANIFEST_NAME]
    modules = {}
    for name, entry in file.modules.items():
        scales = np.abs(file.module(name).dense().reshape(*entry.shape[:1], -1, group)).max(-1) / 127
        each = np.repeat(scales, group, axis=1)[file.module(name).mask()].astype(np.float32)
        kept = file.module(name).dense()[file.module(name).mask()]
        codes = encode_quantized(kept, each * (127 if encoding == "nf4" else 1), encoding)
        tensors[naming.values_name(name)] = "U8", pad_values(codes, encoding, entry.nnz)
        scales = scales * (127 if encoding == "nf4" else 1)
        tensors[naming.scales_name(name)] = "F32", scales.astype(np.float32)
        unit = 1.0
        for spell, axis in ((naming.lora_a_name, 1), (naming.lora_b_name, 0)):
            factor = to_float32(file.tensor(spell(name, "residual")), "BF16")
            largest = np.abs(factor).max(axis, keepdims=True) / 127
            tensors[spell(name, "residual")] = "I8", np.rint(factor / largest).astype(np.int8)
            unit = unit * largest.reshape(-1)
        tensors[naming.rank_scales_name(name, "residual")] = "F32", unit.astype(np.float32)
        modules[name] = replace(entry, encoding=encoding, group_size=group, values_from="refit")
    specs = [TensorSpec(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with SalrWriter(path, specs) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)
        writer.finish(replace(file.manifest, modules=modules))
    return path


def test_a_whole_model_compiles_with_the_operator_in_its_graph(packed):
    model = salr.load(packed, dtype="fp32")
    expected = logits(model)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(logits(compiled), expected)
    calls = [node for graph in graphs for node in graph.graph.nodes if "salr" in str(node.target)]
    assert len(calls) == len(salr.open(packed).modules)


def test_a_whole_model_is_exported(packed):
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    model = salr.load(packed, dtype="fp32")
    with torch.no_grad():
        program = torch.export.export(Logits(model), (IDS,), strict=False)
        torch.testing.assert_close(program.module()(IDS), logits(model))
    assert len([node for node in program.graph.nodes if node.target is torch.ops.salr.linear.default]) == 14
