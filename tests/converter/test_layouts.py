"""Checkpoints in other forms: 8-bit floats, GGUF, the hub, fused weights, parts that no class of transformers has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from salr.converter.sources.opening import open_checkpoint
from salr.converter.verification import compare_with_source
from salr.formats.errors import SourceError

import salr

EXACT = salr.ConvertOptions(salr.ModuleOptions(0.0, 0), method="magnitude")
PRUNED = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude")
IDS = torch.tensor([[3, 14, 15, 9, 6, 35]])
UP = "model.layers.0.mlp.up_proj.weight"  # (96, 64)


def accounted(file: salr.SalrFile, source: Path) -> None:
    """Check that each tensor of the source stands in the ledger once, and that the file is what the source gives."""
    keys = [line.key for line in file.manifest.ledger]
    assert sorted(keys) == sorted(open_checkpoint(source).inputs) and len(set(keys)) == len(keys)
    assert [problem for _, problem in compare_with_source(file, source) if problem] == []


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


# --- 8-bit floats -----------------------------------------------------------------------------------------------------


def to_float8(source: Path, folder: Path, block: tuple[int, int] | None, name: str, method: str = "fp8") -> dict:
    """Save a model with 8-bit layers and their scales; return its tensors multiplied out, in float32."""
    shutil.copytree(source, folder)
    tensors, exact = load_file(folder / "model.safetensors"), {}
    for key, weight in list(tensors.items()):
        if "_proj" not in key:
            continue
        rows, columns = block or weight.shape
        grid = torch.nn.functional.pad(
            weight.float(), (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        ).unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # fmt: skip
        scale = grid.abs().amax((1, 3)) / 448
        each = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
        tensors[key] = (weight.float() / each).to(torch.float8_e4m3fn)
        tensors[key.replace("weight", name)] = scale if block else scale.reshape(-1)
        exact[key] = tensors[key].float() * each
    tensors["model.layers.0.self_attn.k_proj.input_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": method, **({"weight_block_size": list(block)} if block else {})}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return exact


@pytest.mark.parametrize(
    ("block", "name", "method"),
    [
        ((128, 128), "weight_scale_inv", "fp8"),
        ((32, 48), "weight_scale_inv", "fp8"),
        ((1, 64), "weight_scale", "compressed-tensors"),
        (None, "weight_scale", "modelopt"),
    ],
    ids=["a block larger than the weight", "blocks, the last ones cut", "one a row", "one a tensor"],
)
def test_8_bit_weights_are_multiplied_by_their_scales(llama, tmp_path, block, name, method):
    exact = to_float8(llama, tmp_path / "f8", block, name, method)
    salr.convert(tmp_path / "f8", tmp_path / "m.salr", EXACT)
    file = salr.open(tmp_path / "m.salr")
    for key, weight in exact.items():
        entry = file.modules[key.removesuffix(".weight")]
        assert entry.dtype == "BF16" and torch.equal(
            torch.from_numpy(file.dense(key.removesuffix(".weight"))), weight.bfloat16().float()
        )
    assert "quantization_config" not in json.loads(file.asset("config.json"))
    lines = {line.key: line for line in file.manifest.ledger}
    scale = UP.replace("weight", name)
    assert (lines[scale].fate, lines[scale].reason) == ("folded", f"scale of {UP}")
    assert lines["model.layers.0.self_attn.k_proj.input_scale"].fate == "dropped"
    assert f"F8_E4M3 times {scale}" in lines[UP].reason
    accounted(file, tmp_path / "f8")
    logits(salr.load(tmp_path / "m.salr"))


def test_kept_8_bit_weights_are_rounded_once_and_others_read_in_parts(llama, tmp_path):
    exact = to_float8(llama, tmp_path / "f8", (32, 48), "weight_scale_inv")
    checkpoint = open_checkpoint(tmp_path / "f8")
    assert torch.equal(checkpoint.read(UP), exact[UP]) and torch.equal(checkpoint.rows(UP, 30, 70), exact[UP][30:70])
    assert b"".join(checkpoint.pieces(UP)) == exact[UP].bfloat16().view(torch.uint8).numpy().tobytes()


def test_stacked_experts_in_8_bits_have_scales_of_their_own(stacked_moe, tmp_path):
    folder = shutil.copytree(stacked_moe, tmp_path / "f8")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    scale = torch.rand(4, 2, 1) + 0.5  # blocks of 16 x 24 in 32 x 24
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    exact = tensors[name].float() * scale.repeat_interleave(16, 1)
    save_file(tensors | {f"{name}_scale_inv": scale}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 24]}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert torch.equal(checkpoint.read(name), exact) and torch.equal(checkpoint.rows(name, 2, 3), exact[2:3])
    salr.convert(folder, tmp_path / "m.salr", PRUNED)
    accounted(salr.open(tmp_path / "m.salr"), folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", None])
def test_another_quantization_is_refused_by_name(llama, tmp_path, method):
    to_float8(llama, tmp_path / "f8", None, "weight_scale", method)
    with pytest.raises(SourceError, match=rf"is quantized already \({method}\), needed 16- or 32-bit floats"):
        salr.convert(tmp_path / "f8", tmp_path / "m.salr", EXACT)


def test_a_scale_that_fits_no_block_is_refused(llama, tmp_path):
    to_float8(llama, tmp_path / "f8", (32, 48), "weight_scale_inv")
    tensors = load_file(tmp_path / "f8" / "model.safetensors")
    key = UP.replace("weight", "weight_scale_inv")
    save_file(tensors | {key: torch.ones(5, 5)}, tmp_path / "f8" / "model.safetensors")
    config = json.loads((tmp_path / "f8" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [0, "x"]
    (tmp_path / "f8" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"F32 \[\d, \d\], needed a scale for \[\d+, \d+\].* for 128 x 128 weights"):
        salr.convert(tmp_path / "f8", tmp_path / "m.salr", EXACT)


# --- GGUF -------------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, model, architecture: str, kinds: dict[str, str], **metadata) -> Path:
    """Write a model as llama.cpp's converter would; ``kinds`` gives the type of tensors whose names hold a word."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    for key, value in metadata.items():
        getattr(writer, key)(value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["t", "u", "tu", *(f"t{i}" for i in range(3, config.vocab_size))])
    writer.add_token_merges(["t u"])
    names = gguf.get_tensor_name_map(
        {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture], config.num_hidden_layers
    )
    for name, tensor in gguf_tensors(model, architecture, names).items():
        kind = next((kind for word, kind in kinds.items() if word in name), "F32")
        quantized = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), quantized), raw_dtype=quantized)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return path


def gguf_tensors(model, architecture: str, names) -> dict[str, torch.Tensor]:
    made = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        if name.endswith("gate_up_proj"):
            block = name.split(".")[2]
            made[f"blk.{block}.ffn_gate_exps.weight"], made[f"blk.{block}.ffn_up_exps.weight"] = tensor.chunk(2, 1)
            continue
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            tensor = tensor.unflatten(0, (heads, 2, -1)).swapaxes(1, 2).reshape(tensor.shape)
        made[f"{names.get_name(module)}.{leaf or 'weight'}"] = tensor.contiguous()
    return made


@pytest.fixture(scope="session")
def llama_gguf(llama32, tmp_path_factory) -> Path:
    """Return the float32 Llama as GGUF with four types of tensors."""
    from transformers import LlamaForCausalLM

    kinds = {"attn_q": "Q8_0", "ffn_up": "Q4_0", "ffn_down": "F16", "token_embd": "Q8_0"}
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    (path.parent / "LICENSE").write_text("free")
    return write_gguf(path, LlamaForCausalLM.from_pretrained(llama32), "llama", kinds)


def from_gguf(path: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def test_a_gguf_file_gives_the_weights_that_transformers_gives(llama_gguf, tmp_path):
    salr.convert(
        llama_gguf, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.0, 0, "fp32"), method="magnitude")
    )
    file, expected = salr.open(tmp_path / "m.salr"), from_gguf(llama_gguf).state_dict()
    for name, entry in file.modules.items():
        torch.testing.assert_close(torch.from_numpy(file.dense(name)), expected[entry.source_tensor], rtol=0, atol=0)
    dtypes = {name.split(".", 3)[-1]: entry.dtype for name, entry in file.modules.items()}
    assert (dtypes["self_attn.q_proj"], dtypes["mlp.down_proj"], dtypes["mlp.gate_proj"]) == ("BF16", "F16", "F32")
    rounded = expected["model.embed_tokens.weight"].bfloat16().view(torch.uint8).numpy().tobytes()
    assert bytes(file.raw("model.embed_tokens.weight")) == rounded
    lines = {line.key: line for line in file.manifest.ledger}
    assert (
        lines["blk.0.ffn_up.weight"].fate == "packed" and "dequantized from Q4_0" in lines["blk.0.ffn_up.weight"].reason
    )
    assert lines["blk.0.ffn_up.weight"].reason.endswith("; as model.layers.0.mlp.up_proj.weight")
    assert [line["name"] for line in file.manifest.source["files"]] == ["llama.gguf"] and file.asset(
        "LICENSE"
    ) == b"free"
    accounted(file, llama_gguf)


def test_a_packed_gguf_model_runs_with_its_tokenizer(llama_gguf, tmp_path):
    salr.convert(llama_gguf.parent, tmp_path / "m.salr", EXACT)
    found, expected = logits(salr.load(tmp_path / "m.salr", dtype="fp32")), logits(from_gguf(llama_gguf))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    assert salr.load_tokenizer(tmp_path / "m.salr").convert_tokens_to_ids("t7") == 7


def test_experts_of_a_gguf_file_are_put_together_as_transformers_has_them(tmp_path):
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(6)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    counts = {"add_expert_count": 4, "add_expert_used_count": 2, "add_expert_feed_forward_length": 32,
              "add_key_length": 16, "add_value_length": 16}  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    del model.lm_head
    path = write_gguf(tmp_path / "moe.gguf", model, "qwen3moe", {"_exps": "F16"}, **counts)
    salr.convert(path, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.0, 0, "fp32"), method="magnitude"))
    file, name = salr.open(tmp_path / "m.salr"), "model.layers.0.mlp.experts.gate_up_proj"
    np.testing.assert_array_equal(file.dense(name), model.state_dict()[name].half().float().numpy())
    assert json.loads(file.asset("config.json"))["moe_intermediate_size"] == 32
    lines = {line.key: line for line in file.manifest.ledger}
    assert {lines[f"blk.0.ffn_{part}_exps.weight"].fate for part in ("gate", "up")} == {"packed", "folded"}
    accounted(file, path)


def test_a_damaged_gguf_file_is_one_line(llama_gguf, tmp_path):
    for length in (0, 100, 20_000):
        (tmp_path / "x.gguf").write_bytes(llama_gguf.read_bytes()[:length])
        with pytest.raises(SourceError, match="cannot be read as GGUF") as error:
            salr.convert(tmp_path / "x.gguf", tmp_path / "m.salr", EXACT)
        assert "\n" not in str(error.value) and not (tmp_path / "m.salr").exists()


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(llama32, lora, tmp_path, monkeypatch) -> Path:
    """Make a cache of the hub that holds a model and an adapter of it, and no network."""
    cache = tmp_path / "hub"
    for name, source, commit in (("base", llama32, "a" * 40), ("lora", lora, "b" * 40)):
        snapshot = cache / f"models--some--{name}" / "snapshots" / commit
        shutil.copytree(source, snapshot)
        refs = snapshot.parents[1] / "refs"
        refs.mkdir()
        for ref in ("main", "v1"):
            (refs / ref).write_text(commit)
    config = json.loads((snapshot / "adapter_config.json").read_text())
    (snapshot / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/base"}))
    base = cache / "models--some--base" / "snapshots" / ("a" * 40)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nA model.\n")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return base


def test_a_hub_id_is_its_snapshot_with_commit_and_licence(hub, tmp_path):
    import dataclasses

    salr.convert("some/base", tmp_path / "id.salr", dataclasses.replace(PRUNED, revision="v1"))
    salr.convert(hub, tmp_path / "dir.salr", PRUNED)
    (hub.parents[1] / "refs" / "main").write_text("c" * 40)  # main has moved on: the recorded commit is compared
    assert [p for _, p in compare_with_source(salr.open(tmp_path / "id.salr"), "some/base") if p] == []
    by_id, by_directory = salr.open(tmp_path / "id.salr"), salr.open(tmp_path / "dir.salr")
    assert by_id.manifest.checksums == by_directory.manifest.checksums
    assert by_id.manifest.source["repository"] == "some/base" and by_id.manifest.source["revision"] == "a" * 40
    assert by_id.manifest.source["license"] == "apache-2.0" and "README.md" not in by_id.assets


def test_an_adapter_of_the_hub_finds_its_base_there(hub, lora, tmp_path):
    import dataclasses

    salr.convert("some/lora", tmp_path / "own.salr", PRUNED)
    salr.convert(lora, tmp_path / "given.salr", dataclasses.replace(PRUNED, base=Path("some/base")))
    named = dataclasses.replace(PRUNED, adapters=(("default", Path("some/lora")),))
    salr.convert("some/base", tmp_path / "named.salr", named)
    first = (tmp_path / "own.salr").read_bytes()
    digests = [salr.open(tmp_path / f"{name}.salr").manifest.checksums for name in ("own", "given", "named")]
    assert digests[0] == digests[1] == digests[2] and b'"repository":"some/base"' in first


def test_what_is_not_in_the_cache_is_refused_offline(hub, tmp_path):
    with pytest.raises(SourceError, match=r"not found among what was downloaded before \(HF_HUB_OFFLINE is set\)"):
        salr.convert("some/other", tmp_path / "m.salr", PRUNED)


def test_a_revision_of_a_directory_is_refused(llama, tmp_path):
    with pytest.raises(SourceError, match="--revision v1, needed a model of the hub"):
        salr.convert(llama, tmp_path / "m.salr", salr.ConvertOptions(revision="v1", method="magnitude"))


# --- parts that must not get lost -------------------------------------------------------------------------------------


def test_tensors_that_the_class_does_not_have_are_kept(llama, tmp_path):
    """Multi-token prediction heads lie behind the last layer, where transformers ignores them."""
    source = shutil.copytree(llama, tmp_path / "mtp")
    tensors = load_file(source / "model.safetensors")
    extra = {
        name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in tensors.items() if "layers.1" in name
    } | {"model.layers.2.eh_proj.weight": torch.ones(64, 128), "mtp.0.norm.weight": torch.ones(64)}
    save_file(tensors | extra, source / "model.safetensors", {"format": "pt"})
    salr.convert(source, tmp_path / "m.salr", PRUNED)
    file = salr.open(tmp_path / "m.salr")
    assert set(extra) <= set(file.dense_tensors())
    accounted(file, source)
    salr.unpack(tmp_path / "m.salr", tmp_path / "out")
    back = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in extra.items())
    logits(salr.load(tmp_path / "m.salr"))


def test_a_vision_tower_is_accounted_for_and_the_model_computes_the_same(llava, tmp_path):
    from transformers import LlavaForConditionalGeneration

    salr.convert(llava, tmp_path / "m.salr", EXACT)
    file = salr.open(tmp_path / "m.salr")
    accounted(file, llava)
    # the checkpoint says language_model.model, the class model.language_model
    assert "language_model.model.layers.0.mlp.up_proj" in file.modules and len(file.modules) == 7 + 2 * 6
    inputs = {"input_ids": torch.tensor([[1, 63, 63, 63, 63, 2]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    with torch.no_grad():
        expected = LlavaForConditionalGeneration.from_pretrained(llava)(**inputs).logits
        torch.testing.assert_close(salr.load(tmp_path / "m.salr")(**inputs).logits, expected, rtol=1e-4, atol=1e-5)


def test_fused_qkv_and_gate_up_are_packed_whole(tmp_path):
    import transformers

    torch.manual_seed(9)
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "phi3")
    salr.convert(tmp_path / "phi3", tmp_path / "m.salr", EXACT)
    file = salr.open(tmp_path / "m.salr")
    assert file.modules["model.layers.0.self_attn.qkv_proj"].shape == (64, 32)
    assert file.modules["model.layers.0.mlp.gate_up_proj"].shape == (96, 32)
    torch.testing.assert_close(logits(salr.load(tmp_path / "m.salr")), logits(model), rtol=1e-4, atol=1e-5)


def test_licence_and_notice_files_travel_along(llama, tmp_path):
    source = shutil.copytree(llama, tmp_path / "m")
    names = ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "chat_template.jinja", "preprocessor_config.json")
    for name in (*names, "README.md", "run.py"):
        (source / name).write_text("{}")
    salr.convert(source, tmp_path / "m.salr", PRUNED)
    salr.unpack(tmp_path / "m.salr", tmp_path / "out")
    assert all((tmp_path / "out" / name).read_text() == "{}" for name in (*names, "tokenizer.json")[:-1])
    assert not {"README.md", "run.py"} & set(salr.open(tmp_path / "m.salr").assets)
