"""What an optimizer is given: the adapters at one rate, the residual at its own.

Invariant: every trainable parameter is in exactly one group. At LoRA's rate the residual loses what it was fitted to
(docs/training.md has figures), so its own is a tenth with AdamW, and with SGD the step of the paper's theorem 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..formats.errors import OptionError
from ..formats.manifest import RESIDUAL
from .activations import largest_singular_values
from .packed_model import adapted_layers, inner_model

OPTIMIZERS = ("adamw", "sgd")
ADAMW_SHARE = 0.1

Parameter = torch.nn.Parameter


def param_groups(
    model: Any,
    lr: float,
    residual_lr: float | str = "auto",
    *,
    optimizer: str = "adamw",
    activations: Iterable[Mapping[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Return groups for a torch optimizer, each with ``params``, ``lr`` and ``name``: adapters, and the residual.

    Args:
        model: with adapters of PEFT: from ``prepare_for_training`` or ``get_peft_model``, packed or dense.
        lr: of the adapters, and of whatever else is trainable.
        residual_lr: ``auto``, or the rate itself. With ``adamw`` auto is a tenth of ``lr``. With ``sgd`` it is
            1 / sigma_max(X)^2 of each layer, X (tokens, K) being the inputs that ``activations`` give the layer: the
            step at which descent on |X (E - B A)^T|^2 / 2 is stable. Each layer is a group of its own then.
        optimizer: ``adamw`` or ``sgd``, what ``auto`` is meant for.
        activations: batches of model inputs (tokens masked out do not count), as many as one step of training sees.

    Raises:
        AdapterError: the model has no adapters yet.
        OptionError: nothing is trainable, a rate or the optimizer makes no sense, or ``sgd`` with auto has no batches.
    """
    _check(lr, residual_lr, optimizer)
    residual, others = _trainable(model)
    groups: list[dict[str, Any]] = []
    if others:
        groups.append({"params": others, "lr": lr, "name": "adapters"})
    if not residual:
        return groups
    if residual_lr == "auto" and optimizer == "sgd":
        return groups + _groups_of_layers(model, residual, activations)
    own = lr * ADAMW_SHARE if residual_lr == "auto" else float(residual_lr)
    params = [parameter for layer in residual.values() for parameter in layer]
    return [*groups, {"params": params, "lr": own, "name": RESIDUAL}]


def _check(lr: float, residual_lr: float | str, optimizer: str) -> None:
    if optimizer not in OPTIMIZERS:
        raise OptionError(f"optimizer {optimizer!r}", needed="one of " + ", ".join(OPTIMIZERS))
    for name, rate in (("lr", lr), ("residual_lr", residual_lr)):
        if rate == "auto" and name == "residual_lr":
            continue
        if not isinstance(rate, (int, float)) or not math.isfinite(rate) or rate < 0:
            raise OptionError(f"{name} {rate!r}", needed="a finite number, 0 or more" + ", or auto" * (name != "lr"))


def _trainable(model: Any) -> tuple[dict[str, list[Parameter]], list[Parameter]]:
    """Return the residual's trainable parameters by the layer's name, and all others."""
    residual: dict[str, list[Parameter]] = {}
    others: list[Parameter] = []
    inner = inner_model(model)
    adapted_layers(inner)
    for name, parameter in inner.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, factor, rest = name.partition(".lora_")
        if factor and rest[2:].partition(".")[0] == RESIDUAL:
            residual.setdefault(layer, []).append(parameter)
        else:
            others.append(parameter)
    if not residual and not others:
        raise OptionError(
            "no trainable parameter", fix="load adapters with is_trainable=True, or prepare the model again"
        )
    return residual, others


def _groups_of_layers(
    model: Any, residual: dict[str, list[Parameter]], activations: Iterable[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    batches = [] if activations is None else list(activations)
    if not batches:
        raise OptionError(
            "residual_lr 'auto' with SGD",
            needed="activations: batches of model inputs, from which the step follows",
            fix="give some, or a residual_lr",
        )
    found = largest_singular_values(model, list(residual), batches)
    return [
        {"params": params, "lr": 1 / found[layer] ** 2 if found[layer] else 0.0, "name": f"{RESIDUAL} {layer}"}
        for layer, params in residual.items()
    ]
