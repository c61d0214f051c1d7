"""The tensors of a PEFT LoRA directory, sorted by what each of them is for.

Invariant: every key is either given a meaning or named in an error; none is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...formats.errors import AdapterError
from ..sources.checkpoint import FLOAT_TORCH_DTYPES, SourceTensor
from .settings import LoraSettings

_NAME = r"(?:\.default)?"
_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+?)\.(?:"
    rf"lora_(?P<linear>[AB]){_NAME}\.weight"
    rf"|lora_embedding_(?P<embedding>[AB]){_NAME}"
    rf"|lora_(?P<bias>B){_NAME}\.bias"
    rf"|(?P<magnitude>lora_magnitude_vector){_NAME}(?:\.weight)?"
    rf"|token_adapter\.(?P<tokens>trainable_tokens_delta){_NAME}"
    r")"
)
_REPLACEMENT = re.compile(r"base_model\.model\.(?P<name>.+)")
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")

#: A and B of one module
Factors = dict[str, SourceTensor]


@dataclass
class Parts:
    """What an adapter's tensors are, by module; ``replacements`` by the name of the tensor that each replaces.

    ``parameters`` holds factors of bare parameters (target_parameters), by the path they have in PEFT's model.
    """

    linear: dict[str, Factors] = field(default_factory=dict)
    parameters: dict[str, Factors] = field(default_factory=dict)
    embeddings: dict[str, Factors] = field(default_factory=dict)
    biases: dict[str, SourceTensor] = field(default_factory=dict)
    magnitudes: dict[str, SourceTensor] = field(default_factory=dict)
    tokens: dict[str, SourceTensor] = field(default_factory=dict)
    replacements: dict[str, SourceTensor] = field(default_factory=dict)

    def beside_factors(self) -> str | None:
        """Return what there is besides factors of linear layers, in words; None for nothing."""
        found = {
            "factors of bare parameters": self.parameters,
            "factors of an embedding": self.embeddings,
            "biases of lora_B": self.biases,
            "magnitudes of DoRA": self.magnitudes,
            "embedding rows": self.tokens,
            "whole tensors": self.replacements,
        }
        return next((words for words, parts in found.items() if parts), None)


def unwrapped(path: str) -> str:
    """Return a path in PEFT's model as it is in the base model: without the wrappers' own levels."""
    return _WRAPPERS.sub("", f".{path}.")[1:-1]


def sort_keys(keys: Mapping[str, SourceTensor], settings: LoraSettings, directory: Path) -> Parts:
    """Give each tensor of an adapter its meaning.

    Raises:
        AdapterError: a key has none, a tensor has a senseless dtype or shape, or a factor lacks its partner.
    """
    parts = Parts()
    for key, tensor in keys.items():
        if tensor.dtype not in FLOAT_TORCH_DTYPES:
            raise _unusable(tensor, directory, "a float tensor")
        match = _KEY.fullmatch(key)
        if match is None:
            _add_replacement(parts, key, tensor, directory)
            continue
        kind = str(match.lastgroup)
        if len(tensor.shape) != (1 if kind in ("bias", "magnitude") else 2):
            raise _unusable(tensor, directory, "a vector" if kind in ("bias", "magnitude") else "a float matrix")
        _add(parts, kind, match["module"], match[kind], tensor, settings)
    for group in (parts.linear, parts.parameters, parts.embeddings):
        for module, factors in group.items():
            if len(factors) != 2:
                missing = "lora_B" if "A" in factors else "lora_A"
                raise AdapterError(f"{missing} is missing", path=directory, tensor=module, fix="save the adapter again")
    _check_partners(parts, settings, directory)
    return parts


def _add(parts: Parts, kind: str, path: str, leaf: str, tensor: SourceTensor, settings: LoraSettings) -> None:
    module = unwrapped(path)
    if kind == "linear" and settings.owns_parameters(module):
        parts.parameters.setdefault(path, {})[leaf] = tensor
    elif kind in ("linear", "embedding"):
        group = parts.linear if kind == "linear" else parts.embeddings
        group.setdefault(module, {})[leaf] = tensor
    else:
        {"bias": parts.biases, "magnitude": parts.magnitudes, "tokens": parts.tokens}[kind][module] = tensor


def _add_replacement(parts: Parts, key: str, tensor: SourceTensor, directory: Path) -> None:
    match = _REPLACEMENT.fullmatch(key)
    if match is None or ".lora_" in key or ".token_adapter." in key:
        raise AdapterError(
            "is no key of a LoRA that this version knows",
            path=directory,
            tensor=key,
            fix="merge this adapter with peft and convert the result",
        )
    parts.replacements[unwrapped(match["name"])] = tensor


def _check_partners(parts: Parts, settings: LoraSettings, directory: Path) -> None:
    """Refuse magnitudes and biases without factors, and factors of a DoRA without magnitudes."""
    for group, partners in ((parts.magnitudes, {**parts.linear, **parts.embeddings}), (parts.biases, parts.linear)):
        for module, tensor in group.items():
            if module not in partners:
                raise AdapterError("there are no factors beside it", path=directory, tensor=tensor.name)
    factors = [*parts.linear, *parts.embeddings]
    odd = [module for module in factors if (module in parts.magnitudes) != settings.use_dora]
    if odd:
        raise AdapterError(
            "has no magnitude" if settings.use_dora else "has a magnitude, but use_dora is not set",
            path=directory,
            tensor=odd[0],
            fix="save the adapter again",
        )


def _unusable(tensor: SourceTensor, directory: Path, needed: str) -> AdapterError:
    return AdapterError(f"{tensor.dtype} {list(tensor.shape)}", path=directory, tensor=tensor.name, needed=needed)
