"""Every form of LoRA that PEFT trains: the converted model's logits are PEFT's own, at sparsity 0."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from salr.converter.adapters.binding import bind
from salr.converter.adapters.editing import add_adapter, remove_adapter, scale_adapter
from salr.converter.adapters.merging import merge_adapters
from salr.converter.adapters.source import Adapter
from salr.converter.sources.checkpoint import Checkpoint
from salr.converter.verification import compare_with_source
from salr.formats.errors import AdapterError

import salr

IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 7, 5]])
EXACT = salr.ConvertOptions(salr.ModuleOptions(0.0, 0), method="magnitude")
QV = ["q_proj", "v_proj"]

#: form -> base, settings; the parameters that the random training then changes are all that can be trained
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "rslora": ("plain", {"use_rslora": True}),
    "patterns": ("plain", {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 11}}),
    "fan_in_fan_out": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "lora_bias": ("biased", {"lora_bias": True}),
    "bias=all": ("biased", {"bias": "all"}),
    "bias=lora_only": ("biased", {"bias": "lora_only"}),
    "modules_to_save": ("plain", {"modules_to_save": ["lm_head", "input_layernorm", "up_proj"]}),
    "modules_to_save, tied": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "modules_to_save, both tied ends": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "trainable tokens": ("plain", {"trainable_token_indices": [3, 7]}),
    "trainable tokens, tied": ("tied", {"trainable_token_indices": [3, 7]}),
    "trainable tokens of both ends": ("tied", {"trainable_token_indices": {"embed_tokens": [3], "lm_head": [5]}}),
    "trainable tokens of the tied head": ("tied", {"trainable_token_indices": {"lm_head": [3, 5]}}),
    "embedding": ("plain", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding, tied": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "head, tied": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "both tied ends": ("tied", {"target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "dora": ("plain", {"use_dora": True, "target_modules": [*QV, "down_proj"]}),
    "dora, conv1d": ("gpt2", {"use_dora": True, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "dora, embedding": ("plain", {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]}),
    "pissa": ("plain", {"init_lora_weights": "pissa"}),
    "pissa, conv1d": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "pissa, a base weight saved": ("plain", {"init_lora_weights": "pissa", "target_modules": ["q_proj", "lm_head"]}),
    "olora": ("plain", {"init_lora_weights": "olora", "use_rslora": True}),
    "eva": ("plain", {"init_lora_weights": "eva"}),
    "orthogonal": ("plain", {"init_lora_weights": "orthogonal"}),
    "mica": ("plain", {"init_lora_weights": "mica"}),
    "gaussian": ("plain", {"init_lora_weights": "gaussian"}),
    "target_parameters": ("moe", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "target_parameters, patterns": ("moe", {
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 11},
    }),
    "target_parameters, stacked": ("stacked", {"target_parameters": ["experts.down_proj"]}),
    "layer_replication": ("plain", {"layer_replication": [[0, 2], [1, 2]]}),
    "layer_replication, a layer less": ("plain", {"layer_replication": [[1, 2], [1, 2]], "modules_to_save": ["norm"]}),
}  # fmt: skip
#: parts that stay factors, in the trained bits
BITS = ("plain", "rslora", "patterns", "fan_in_fan_out", "lora_bias", "bias=all", "modules_to_save", "embedding",
        "trainable tokens", "head, tied", "layer_replication")  # fmt: skip


@pytest.fixture(scope="session")
def bases(tmp_path_factory, moe, stacked_moe, gpt2) -> dict[str, Path]:
    """Return float32 models: a Llama plain, with biases, with tied ends; GPT-2; Mixtral in two forms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = {"moe": moe, "stacked": stacked_moe, "gpt2": gpt2}
    for name, settings in (
        ("plain", {}),
        ("biased", {"attention_bias": True}),
        ("tied", {"tie_word_embeddings": True}),
    ):
        torch.manual_seed(len(name))
        config = LlamaConfig(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, **settings,
        )  # fmt: skip
        made[name] = tmp_path_factory.mktemp("bases") / name
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1, mean=float(parameter.ndim == 1))
        model.save_pretrained(made[name])
    return made


@pytest.fixture(scope="session")
def train(tmp_path_factory) -> Callable[..., Path]:
    """Return a function that saves an adapter with every trainable parameter changed at random, each one once."""
    made: dict[str, Path] = {}

    def once(base: Path, seed: int = 0, **settings: Any) -> Path:
        key = repr((base, seed, sorted(settings.items())))
        if key not in made:
            made[key] = run(base, seed, **settings)
        return made[key]

    def run(base: Path, seed: int = 0, **settings: Any) -> Path:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": QV, "task_type": "CAUSAL_LM", **settings})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("trained") / "adapter"
        model.save_pretrained(folder)
        return folder

    return once


@pytest.fixture
def edited(train, tmp_path) -> Callable[..., Path]:
    """Return a function that trains an adapter, copies it, and changes its tensors and settings."""

    def edit(base: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
        folder = shutil.copytree(train(base, **settings), tmp_path / "edited")
        save_file(load_file(folder / "adapter_model.safetensors") | tensors, folder / "adapter_model.safetensors")
        config = json.loads((folder / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return edit


def logits_of_peft(base: Path, *folders: Path) -> torch.Tensor:
    """Return what PEFT computes with all adapters active, unmerged: its merge is wrong where ends are tied."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    model = PeftModel.from_pretrained(model, folders[0], adapter_name="a0")
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(folder, adapter_name=f"a{number}")
    model.base_model.set_adapter([f"a{number}" for number in range(len(folders))])
    with torch.no_grad():
        return model.eval()(IDS % model.config.vocab_size, use_cache=False).logits


def converted(base: Path, tmp_path: Path, *folders: Path, options: salr.ConvertOptions = EXACT) -> Path:
    named = tuple((f"a{number}", folder) for number, folder in enumerate(folders))
    salr.convert(base, tmp_path / "m.salr", dataclasses.replace(options, adapters=named))
    return tmp_path / "m.salr"


def logits_of(path: Path) -> torch.Tensor:
    model = salr.load(path)
    with torch.no_grad():
        return model(IDS % model.config.vocab_size, use_cache=False).logits


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


@pytest.fixture(scope="session")
def bare(bases) -> dict[str, torch.Tensor]:
    """Return the logits of each base without any adapter."""
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        models = {name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in bases.items()}
        return {name: m(IDS % m.config.vocab_size, use_cache=False).logits for name, m in models.items()}


@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_pefts(bases, bare, train, tmp_path, form):
    base, settings = FORMS[form]
    folder = train(bases[base], **settings)
    expected = logits_of_peft(bases[base], folder)
    path = converted(bases[base], tmp_path, folder)
    same(logits_of(path), expected)
    assert not torch.allclose(expected, bare[base], rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    file = salr.open(path)
    assert sorted(line.key for line in file.manifest.ledger if line.file.startswith("a0/")) == sorted(
        Adapter(folder, "a").keys
    )
    findings = compare_with_source(file, bases[base], [("a0", folder)])
    assert [problem for _, problem in findings if problem] == []


@pytest.mark.parametrize(
    "settings",
    [
        [{}, {"r": 2, "use_rslora": True}],
        [{"use_dora": True}, {"target_modules": ["q_proj"]}],
        [{"modules_to_save": ["lm_head"]}, {}],
        [{"init_lora_weights": "olora"}, {}],
    ],
    ids=["plain", "dora and plain", "modules_to_save", "olora and plain"],
)
def test_several_adapters_are_what_peft_adds_up(bases, train, tmp_path, settings):
    base = bases["plain"]
    folders = [train(base, seed, **one) for seed, one in enumerate(settings)]
    same(logits_of(converted(base, tmp_path, *folders)), logits_of_peft(base, *folders))


@pytest.mark.parametrize("form", BITS)
def test_what_stays_a_factor_keeps_its_bits(bases, train, tmp_path, form):
    base, settings = FORMS[form]
    folder = train(bases[base], **settings)
    file = salr.open(converted(bases[base], tmp_path, folder))
    trained = {
        key.removeprefix("base_model.model."): t for key, t in load_file(folder / "adapter_model.safetensors").items()
    }
    factors = [name for name in trained if name.endswith(("lora_A.weight", "lora_B.weight"))]
    assert factors
    for name in factors:
        assert bytes(file.raw(f"{name.removesuffix('.weight')}.a0")) == trained[name].numpy().tobytes()


def test_experts_have_their_own_rows_of_the_trained_factors(bases, train, tmp_path):
    folder = train(bases["moe"], **FORMS["target_parameters"][1])
    file = salr.open(converted(bases["moe"], tmp_path, folder))
    trained = load_file(folder / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_"
    module = "model.layers.0.block_sparse_moe.experts.2.w3"  # the second half of gate_up_proj
    lora_a = trained[f"{start}A.weight"].reshape(4, 4, 32)[2]
    lora_b = trained[f"{start}B.weight"].reshape(48, 4, 4)[24:, :, 2].contiguous()
    assert bytes(file.raw(f"{module}.lora_A.a0")) == lora_a.numpy().tobytes()
    assert bytes(file.raw(f"{module}.lora_B.a0")) == lora_b.numpy().tobytes()


@pytest.mark.parametrize(
    ("form", "is_tied"),
    [("plain", True), ("trainable tokens, tied", True), ("embedding, tied", False), ("modules_to_save, tied", False)],
)
def test_tied_ends_stay_tied_until_an_adapter_changes_one(bases, train, tmp_path, form, is_tied):
    file = salr.open(converted(bases["tied"], tmp_path, train(bases["tied"], **FORMS[form][1])))
    assert json.loads(file.asset("config.json"))["tie_word_embeddings"] is is_tied
    assert ("lm_head.weight" in file.tensors) is not is_tied


def test_a_tied_head_that_is_on_disk_too_is_untied(bases, train, tmp_path):
    folder = shutil.copytree(bases["tied"], tmp_path / "both")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    adapter = train(bases["tied"], **FORMS["head, tied"][1])
    path = converted(folder, tmp_path, adapter)
    assert json.loads(salr.open(path).asset("config.json"))["tie_word_embeddings"] is False
    same(logits_of(path), logits_of_peft(bases["tied"], adapter))


def test_a_layer_that_replication_leaves_out_stands_in_the_ledger_as_dropped(bases, train, tmp_path):
    folder = train(bases["plain"], **FORMS["layer_replication, a layer less"][1])
    file = salr.open(converted(bases["plain"], tmp_path, folder))
    lines = {line.key: line for line in file.manifest.ledger}
    assert lines["model.layers.0.mlp.up_proj.weight"].fate == "dropped"
    assert lines["model.layers.1.mlp.up_proj.weight"].reason.endswith(
        "; as model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight"
    )


def test_rows_that_dora_rescales_are_rounded_once(llama, train, tmp_path):
    """g W stays in float32 until the residual is taken off: rounded to bf16 before, a g near 1 would be lost."""
    folder = train(llama, use_dora=True, target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj"
    checkpoint, _ = bind(Checkpoint(llama), [Adapter(folder, "a0")])
    assert checkpoint.tensors[f"{name}.weight"].dtype == "BF16"
    rescaled = checkpoint.read(f"{name}.weight")
    assert rescaled.dtype == torch.float32 and torch.equal(checkpoint.rows(f"{name}.weight", 5, 9), rescaled[5:9])
    assert bytes(checkpoint.raw(f"{name}.weight")) == rescaled.bfloat16().view(torch.uint8).numpy().tobytes()
    none = salr.CalibrationOptions("none")
    options = salr.ConvertOptions(salr.ModuleOptions(0.25, 16), method="alternating", calibration=none)
    file = salr.open(converted(llama, tmp_path, folder, options=options))
    energy = float(rescaled.double().square().sum())
    assert file.modules[name].dtype == "BF16" and file.modules[name].error.energy == pytest.approx(energy)
    assert [problem for _, problem in compare_with_source(file, llama, [("a0", folder)]) if problem] == []


@pytest.mark.parametrize("form", ["dora", "lora_bias", "modules_to_save", "pissa", "target_parameters"])
def test_an_adapter_that_needs_its_base_is_not_added_to_a_finished_file(bases, train, tmp_path, form):
    base, settings = FORMS[form]
    folder, path = train(bases[base], **settings), converted(bases[base], tmp_path)
    before = path.read_bytes()
    with pytest.raises(AdapterError, match="convert the source again with --adapter"):
        add_adapter(path, folder, "late")
    assert path.read_bytes() == before


def test_an_adapter_with_a_part_in_the_base_is_not_taken_out_or_scaled(bases, train, tmp_path):
    base = bases["plain"]
    path = converted(base, tmp_path, train(base, use_dora=True), train(base, 1))
    before = path.read_bytes()
    for change in (
        lambda: remove_adapter(path, "a0"),
        lambda: scale_adapter(path, "a0", factor=2),
        lambda: merge_adapters(path, ["a0", "a1"], "both"),
    ):
        with pytest.raises(AdapterError, match=r"'a0' cannot be \w+: a part of it is in the base"):
            change()
    assert path.read_bytes() == before
    remove_adapter(path, "a1")


def test_two_adapters_that_replace_one_tensor_are_refused(bases, train, tmp_path):
    base, settings = bases["plain"], {"modules_to_save": ["lm_head"]}
    with pytest.raises(AdapterError, match=r"replaces lm_head\.weight, and adapter 'a0' does too"):
        converted(base, tmp_path, train(base, **settings), train(base, 1, **settings))


def test_a_dora_behind_another_adapter_is_refused_because_peft_rescales_both(bases, train, tmp_path):
    base = bases["plain"]
    for first in ({}, {"use_dora": True}):
        with pytest.raises(AdapterError, match="would rescale adapter 'a0' too, needed the DoRA first, and only one"):
            converted(base, tmp_path, train(base, **first), train(base, 1, use_dora=True))


def test_a_resized_embedding_is_refused_with_both_shapes(bases, edited, tmp_path):
    resized = {"base_model.model.lm_head.weight": torch.zeros(130, 64)}
    folder = edited(bases["plain"], {"modules_to_save": ["lm_head"]}, resized)
    with pytest.raises(AdapterError, match=r"\[130, 64\], needed \[128, 64\]; give the base .* resized as it was"):
        converted(bases["plain"], tmp_path, folder)


def test_saved_embeddings_that_equal_the_base_change_nothing(bases, edited, tmp_path):
    embedding = load_file(bases["tied"] / "model.safetensors")["model.embed_tokens.weight"]
    ends = ("model.embed_tokens", "lm_head")
    folder = edited(bases["tied"], {}, {f"base_model.model.{end}.weight": embedding.clone() for end in ends})
    file = salr.open(converted(bases["tied"], tmp_path, folder))
    assert "lm_head.weight" not in file.tensors
    lines = [line for line in file.manifest.ledger if line.fate == "dropped"]
    assert [line.reason for line in lines] == [
        "equals lm_head.weight of the base",
        "equals model.embed_tokens.weight of the base",
    ]


@pytest.mark.parametrize(
    ("form", "setting", "words"),
    [
        ("trainable tokens", {"trainable_token_indices": [3, 128]}, "row 128, needed rows of its own in the base"),
        ("trainable tokens", {"trainable_token_indices": []}, r"\[2, 64\], needed \[0, 64\]"),
        ("trainable tokens", {"trainable_token_indices": {"other": [1, 2]}}, "trainable_token_indices is None"),
        ("layer_replication", {"layer_replication": [[0, 10**9]]}, "names layer 999999999, needed 0 to 1"),
        ("target_parameters", {"rank_pattern": {"experts.down_proj": 8}}, "needed rank 8 for 4 experts"),
        ("target_parameters", {"target_parameters": ["mlp.experts.up"]}, "needed a stack of experts"),
    ],
)
def test_settings_that_do_not_fit_the_base_are_refused(bases, edited, tmp_path, form, setting, words):
    base, settings = FORMS[form]
    folder = edited(bases[base], settings, {}, **setting)
    with pytest.raises(AdapterError, match=words):
        converted(bases[base], tmp_path, folder)
    assert not (tmp_path / "m.salr").exists()


@pytest.mark.parametrize("use_dora", [True, False])
def test_an_adapter_has_the_names_of_the_class_where_the_checkpoint_has_others(llava, tmp_path, use_dora):
    from peft import LoraConfig, get_peft_model
    from transformers import LlavaForConditionalGeneration

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|up_proj)", use_dora=use_dora)
    model = get_peft_model(LlavaForConditionalGeneration.from_pretrained(llava), config).eval()
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "a0")
    inputs = {"input_ids": torch.tensor([[1, 63, 63, 63, 63, 2]]), "pixel_values": torch.randn(1, 3, 16, 16)}
    path = converted(llava, tmp_path, tmp_path / "a0")
    with torch.no_grad():
        same(salr.load(path)(**inputs).logits, model(**inputs).logits)
    assert "language_model.model.layers.0.mlp.up_proj.lora_A.a0" in salr.open(path).tensors
    if not use_dora:
        whole = path.read_bytes()
        remove_adapter(path, "a0")
        add_adapter(path, tmp_path / "a0")
        assert path.read_bytes() == whole
