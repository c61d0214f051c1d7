"""What an exported graph takes and gives: names, example inputs and dynamic axes of decoders and encoders.

Invariant: the names are those of other exporters (``past_key_values.0.key`` -> ``present.0.key``), so that runtimes
which drive such graphs find what they look for; batch and sequence lengths are free, a past may be empty.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ExportError

#: example sizes: at least 2, because a 1 would be taken for a constant
_BATCH, _LENGTH, _PAST = 2, 3, 5

#: the attribute of a wrapper under which the model lies, and so what every traced name begins with
MODEL = "model"


@dataclass(frozen=True)
class Signature:
    """Names and examples of a graph; ``wrapper`` is what is traced with ``inputs``."""

    wrapper: torch.nn.Module
    inputs: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]
    is_decoder: bool


class Decoder(torch.nn.Module):
    """A causal language model with its keys and values as plain tensors: [(B, heads, past, dim)] a layer."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Any) -> Any:
        """Return logits (B, S, vocabulary) and the keys and values of all positions."""
        from transformers import DynamicCache

        *plain, past = inputs
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past):
            cache.update(key, value, layer)
        named = dict(zip(self.names, plain, strict=True))
        output = self.model(**named, past_key_values=cache, use_cache=True)
        return output.logits, [(layer.keys, layer.values) for layer in output.past_key_values.layers]


class Encoder(torch.nn.Module):
    """A model that reads a text at once and gives its tensors, in the order of its output class."""

    def __init__(self, model: Any, names: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.model, self.names, self.outputs = model, names, outputs

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors of the output."""
        output = self.model(**dict(zip(self.names, inputs, strict=True)))
        return [output[name] for name in self.outputs]


def signature_of(model: Any) -> Signature:
    """Return the signature of a transformers model; it is run once, on a few tokens.

    Raises:
        ExportError: it is neither a causal language model with keys and values, nor a text encoder.
    """
    accepted = inspect.signature(model.forward).parameters
    if getattr(model.config, "is_encoder_decoder", False) or "input_ids" not in accepted:
        raise ExportError(
            f"{type(model).__name__} has no ONNX form here", needed="a causal language model or a text encoder"
        )
    return _decoder(model, set(accepted)) if model.can_generate() else _encoder(model, set(accepted))


def _decoder(model: Any, accepted: set[str]) -> Signature:
    names: list[str] = [name for name in ("input_ids", "attention_mask", "position_ids") if name in accepted]
    past = _example_past(model)
    total = {0: "batch_size", 1: "total_sequence_length"}
    plain = {0: "batch_size", 1: "sequence_length"}
    examples = {
        "input_ids": (torch.zeros(_BATCH, _LENGTH, dtype=torch.int64), plain),
        "attention_mask": (torch.ones(_BATCH, _PAST + _LENGTH, dtype=torch.int64), total),
        "position_ids": (torch.arange(_PAST, _PAST + _LENGTH).expand(_BATCH, _LENGTH).contiguous(), plain),
    }
    axes = {0: "batch_size", 2: "past_sequence_length"}
    layers = [f"{i}.{kind}" for i in range(len(past)) for kind in ("key", "value")]
    return Signature(
        wrapper=Decoder(model, names),
        inputs=(*(examples[name][0] for name in names), past),
        dynamic_shapes=((*(examples[name][1] for name in names), [(axes, axes) for _ in past]),),
        input_names=[*names, *(f"past_key_values.{layer}" for layer in layers)],
        output_names=["logits", *(f"present.{layer}" for layer in layers)],
        is_decoder=True,
    )


def _example_past(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values of random content for each layer, in the shapes that the model itself makes."""
    from transformers import DynamicCache

    ids = torch.zeros(_BATCH, _PAST, dtype=torch.int64)
    with torch.inference_mode():
        output = model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", [])
    pairs = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    if not pairs or any(not _is_cache(tensor) for pair in pairs for tensor in pair):
        raise ExportError(
            f"{type(model).__name__} keeps another state than keys and values", needed="attention in every layer"
        )
    return [tuple(torch.randn(tensor.shape) for tensor in pair) for pair in pairs]  # type: ignore[union-attr, misc]


def _is_cache(tensor: object) -> bool:
    return isinstance(tensor, torch.Tensor) and tensor.ndim == 4 and tensor.shape[2] == _PAST


def _encoder(model: Any, accepted: set[str]) -> Signature:
    names: list[str] = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in accepted]
    if "attention_mask" not in names:
        raise ExportError(f"{type(model).__name__} has no ONNX form here", needed="a text encoder")
    ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.int64)
    inputs = tuple(torch.ones_like(ids) if name == "attention_mask" else ids.clone() for name in names)
    with torch.inference_mode():
        output = model(**dict(zip(names, inputs, strict=True)))
    outputs = [name for name, value in output.items() if isinstance(value, torch.Tensor)]
    axes = {0: "batch_size", 1: "sequence_length"}
    return Signature(
        wrapper=Encoder(model, names, outputs),
        inputs=inputs,
        dynamic_shapes=(tuple(axes for _ in names),),
        input_names=names,
        output_names=outputs,
        is_decoder=False,
    )
