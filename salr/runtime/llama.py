"""Llama-like models of transformers, read as a ``Decoder``: Llama, Mistral, Qwen2 and Qwen3.

Invariant: only what computes exactly as written here is read; everything else is told with its reason, and transformers
computes it itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch

from . import backends, layer_operations
from .decoder import Decoder, DecoderLayer, Product
from .experts import packed_modules
from .linear import SalrLinear, is_hooked

Tensor = torch.Tensor
CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
#: kinds of rotary embedding whose tables do not depend on how long the text is
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
#: device type -> the module with its kernels for what lies between products
_OPERATIONS = {"cuda": "salr.cuda.operations"}


def reason_not_read(model: Any) -> str | None:
    """Return why a model cannot be read as a ``Decoder``, None where it can."""
    config = model.config
    if type(model).__name__ not in CLASSES or not type(model).__module__.startswith("transformers."):
        return f"{type(model).__name__} (a decoder is made of {', '.join(CLASSES)})"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act}"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope not in _ROPE_TYPES:
        return f"rotary embedding {rope}"
    if getattr(model, "_hf_peft_config_loaded", False):
        return "adapters of peft"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "weights on several devices"
    odd = [name for name, module in model.named_modules() if _is_odd(name, module)]
    return f"{odd[0]} is no plain linear layer" if odd else _reason_without_kernels(model)


def _reason_without_kernels(model: Any) -> str | None:
    """Return why a model on a device that has kernels cannot use them: a captured step needs them."""
    device = model.device
    if device.type not in _OPERATIONS:
        return None
    if operations_for(device, *_sizes(model), model.model.embed_tokens.weight.dtype) is layer_operations:
        return f"dtype, sizes or a machine without kernels for {device.type}"
    for name in {module.backend for _, module in packed_modules(model)}:
        if backends.backend_for(device.type, name).stack is None:
            return f"backend {name or backends.choose(device.type)}"
    return None


def _sizes(model: Any) -> tuple[int, int, int, int]:
    """Return hidden and intermediate size, columns of a head, query heads a key head."""
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    return config.hidden_size, config.intermediate_size, model.model.layers[0].self_attn.head_dim, group


def _is_odd(name: str, module: torch.nn.Module) -> bool:
    """Tell a projection that is neither packed nor plain, or that somebody hooked."""
    if not name.endswith("_proj") and name != "lm_head":
        return False
    return is_hooked(module) or type(module) not in (SalrLinear, torch.nn.Linear)


def read_model(model: Any) -> Decoder:
    """Return a model's ``Decoder``, which shares its weights; packed products are made ready and stacked."""
    config, inner = model.config, model.model
    device, dtype = inner.embed_tokens.weight.device, inner.embed_tokens.weight.dtype
    return Decoder(
        embedding=inner.embed_tokens.weight,
        layers=[_layer(layer, dtype, device) for layer in inner.layers[: config.num_hidden_layers]],
        norm=inner.norm.weight,
        head=joined([model.lm_head], dtype, device),
        epsilon=inner.norm.variance_epsilon,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_columns=inner.layers[0].self_attn.head_dim,
        tables=lambda n: _tables(inner, n),
        operations=operations_for(device, *_sizes(model), dtype),
    )


def operations_for(
    device: torch.device, hidden: int, intermediate: int, head_columns: int, group: int, dtype: torch.dtype
) -> Any:
    """Return the module of operations for a device and sizes: kernels where it has them, else their torch twins."""
    name = _OPERATIONS.get(device.type)
    if name is None or backends.reason_unusable(device.type) is not None:
        return layer_operations
    kernels = import_module(name)
    reason = kernels.reason_not_taken(hidden, intermediate, head_columns, group, dtype)
    return layer_operations if reason else kernels


def joined(modules: Sequence[torch.nn.Module], dtype: torch.dtype, device: torch.device) -> Product:
    """Return x (M, K) -> (M, N_0 + N_1 + ...), the outputs of linear layers side by side, in one launch if possible."""
    if len(modules) > 1 and all(isinstance(module, SalrLinear) for module in modules):
        product = _stacked([module for module in modules if isinstance(module, SalrLinear)], dtype, device)
        if product is not None:
            return product
    products = [_single(module, dtype, device) for module in modules]
    if len(products) == 1:
        return products[0]
    return lambda x: torch.cat([product(x) for product in products], -1)


def _stacked(modules: Sequence[SalrLinear], dtype: torch.dtype, device: torch.device) -> Product | None:
    names = {module.backend for module in modules}
    stack = backends.backend_for(device.type, modules[0].backend).stack
    if stack is None or len(names) > 1:
        return None
    matrices = [module.matrices()[0] for module in modules]
    weights, adapters = [matrix.weight for matrix in matrices], [matrix.adapters for matrix in matrices]
    return stack(weights, adapters, [module.bias for module in modules], dtype, device)


def _single(module: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> Product:
    """Return one layer's product, laid out by a row of zeros."""
    if not isinstance(module, SalrLinear):
        return module
    product = module.matrices()[0].product(device, dtype, module.bias, module.backend).run
    with torch.no_grad():
        product(torch.zeros(1, module.in_features, dtype=dtype, device=device))
    return product


def _layer(layer: Any, dtype: torch.dtype, device: torch.device) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = None
    if hasattr(attention, "q_norm"):
        norms = attention.q_norm.weight, attention.k_norm.weight, attention.q_norm.variance_epsilon
    window = getattr(attention, "sliding_window", None)
    if type(attention).__name__ == "MistralAttention":
        window = attention.config.sliding_window
    return DecoderLayer(
        input_norm=layer.input_layernorm.weight,
        qkv=joined([attention.q_proj, attention.k_proj, attention.v_proj], dtype, device),
        output=joined([attention.o_proj], dtype, device),
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=joined([mlp.gate_proj, mlp.up_proj], dtype, device),
        down=joined([mlp.down_proj], dtype, device),
        head_norms=norms,
        window=window,
    )


def _tables(inner: Any, n_positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines (n, D / 2) as the model's own rotary embedding gives them."""
    like = inner.embed_tokens.weight
    with torch.no_grad():
        cos, sin = inner.rotary_emb(like, torch.arange(n_positions, device=like.device)[None])
    half = cos.shape[-1] // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
