"""Tiny models of many architectures, converted, and their dense twins."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import salr

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MOE = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = SIZES | {
    "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500000.0}  # fmt: skip

#: name -> (config class, model class, settings); each with random weights
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama2": ("LlamaConfig", "LlamaForCausalLM", SIZES),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", SIZES | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", SIZES | {"sliding_window": 16}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SIZES),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SIZES | {"head_dim": 8}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", SIZES | {"head_dim": 8}),
    "phi": ("PhiConfig", "PhiForCausalLM", SIZES),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", MOE),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", MLA),
    "bert": ("BertConfig", "BertModel", {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}),
}


def save_random(name: str, folder: Path) -> Path:
    """Save a model of random weights with biases and norms off their zeros and ones."""
    import torch
    import transformers

    config_class, model_class, settings = ARCHITECTURES[name]
    torch.manual_seed(sum(map(ord, name)))
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def convert_random(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Return a function: architecture -> (its .salr file, the directory unpacked from that); made once a session."""
    made: dict[str, tuple[Path, Path]] = {}

    def convert(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            save_random(name, folder / "dense")
            options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude")
            salr.convert(folder / "dense", folder / "m.salr", options)
            made[name] = folder / "m.salr", salr.unpack(folder / "m.salr", folder / "unpacked", dtype="fp32")
        return made[name]

    return convert
