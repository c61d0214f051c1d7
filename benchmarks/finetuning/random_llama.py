"""A transformers Llama of random weights, dense or packed, built as `salr.load` builds one from a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from random_model import RANK, Sizes, random_packed, random_residual, random_weight
from salr.formats import naming
from salr.formats.container import TensorSpec
from salr.formats.manifest import AdapterEntry, Manifest, ModuleEntry

from salr.runtime.layout import TORCH_DTYPES, buffer_name
from salr.runtime.packed import PackedWeight
from salr.runtime.packing import pack
from salr.runtime.skeleton import plan_skeleton

NF4_GROUP = 64


def random_llama(kind: str, sizes: Sizes, device: torch.device) -> Any:
    """Return the model in bf16 on ``device``.

    Args:
        kind: ``dense``, ``salr`` (half kept, bf16, rank 64) or ``nf4`` (all kept, groups of 64, no residual).
    """
    import transformers

    config = llama_config(sizes)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
    state: dict[str, torch.Tensor] = {}
    entries: dict[str, ModuleEntry] = {}
    specs: dict[str, TensorSpec] = {}
    for name, parameter in empty.named_parameters():
        module = name.removesuffix(".weight")
        if kind == "dense" or not module.endswith("_proj"):
            state[name] = random_parameter(parameter.shape, device).cpu()
            continue
        entry, tensors = packed_module(kind, name, tuple(parameter.shape), device)
        entries[module] = entry
        for spec, tensor in tensors:
            specs[f"{module}.{spec.name}"] = replace(spec, name=f"{module}.{spec.name}")
            state[f"{module}.{buffer_name(spec.name)}"] = tensor.view(TORCH_DTYPES[spec.dtype]).cpu()
    if kind != "dense":
        skeleton = plan_skeleton(empty, Manifest("a benchmark", entries, {}), specs)
        config.quantization_config = {"quant_method": "salr", "skeleton": skeleton}
    model, info = transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.bfloat16, output_loading_info=True
    )
    wrong = {name: names for name, names in info.items() if names}
    if wrong:
        raise SystemExit(f"{kind}: the random weights do not fit the model: {wrong}")
    return model.to(device)


def llama_config(sizes: Sizes) -> Any:
    """Return transformers' config of a shape."""
    import transformers

    return transformers.LlamaConfig(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, head_dim=sizes.head_columns,
        vocab_size=sizes.words, max_position_embeddings=8192, rope_theta=500000.0,
        architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip


def random_parameter(shape: torch.Size, device: torch.device) -> torch.Tensor:
    """Return a random matrix, or ones for a norm."""
    return torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1 else random_weight(*shape, device)


def packed_module(
    kind: str, source: str, shape: tuple[int, int], device: torch.device
) -> tuple[ModuleEntry, list[tuple[TensorSpec, torch.Tensor]]]:
    """Return a packed module's entry, and its tensors with their names below the module's."""
    weight = random_packed(*shape, device, "bf16") if kind == "salr" else dense_nf4(shape, device)
    residual = (AdapterEntry("residual", RANK, 1.0, "svd"),) if kind == "salr" else ()
    entry = ModuleEntry(
        source, shape, False, shape, "BF16", weight.nnz, weight.pattern, weight.encoding, "source",
        adapters=residual, group_size=weight.group_size,
    )  # fmt: skip
    return entry, list(tensors_of(entry, weight, device))


def dense_nf4(shape: tuple[int, int], device: torch.device) -> PackedWeight:
    """Return a random matrix in nf4 with nothing removed."""
    weight = pack(random_weight(*shape, device), torch.ones(shape, dtype=torch.bool, device=device), "nf4", NF4_GROUP)
    return replace(weight, pattern="dense", bitmap=None, row_offsets=None)


def tensors_of(
    entry: ModuleEntry, weight: PackedWeight, device: torch.device
) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Yield each tensor of a module as a file would hold it."""
    for spec in naming.module_specs("", entry):
        name = spec.name.removeprefix(".")
        tensor = getattr(weight, name)
        yield TensorSpec(name, spec.dtype, tuple(tensor.shape)), tensor
    for adapter in entry.adapters:
        factors = random_residual(*entry.shape, device)
        for name, tensor in (("lora_A", factors.lora_A), ("lora_B", factors.lora_B)):
            yield TensorSpec(f"{name}.{adapter.name}", "BF16", tuple(tensor.shape)), tensor
