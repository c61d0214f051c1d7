"""A loaded model made ready for training: new LoRA adapters, and the residual as one more of them.

Invariant: before the first step the model computes what it computed, and no factor is kept twice: what becomes a
trained adapter leaves the packed product.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..converter.export.peft_config import PeftModule, adapter_config
from ..converter.module_options import check_rank
from ..formats.errors import AdapterError, OptionError
from ..formats.manifest import RESIDUAL, is_adapter_name
from ..runtime.linear import SalrLinear
from ..runtime.packed_module import TakenAdapter
from .packed_model import import_peft, packed_linears, skeleton_of

ALL_LINEAR = "all-linear"


def prepare_for_training(
    model: Any,
    *,
    rank: int | None = 16,
    alpha: float | None = None,
    target: str | Sequence[str] = ALL_LINEAR,
    train_residual: bool = True,
    dropout: float = 0.0,
    name: str = "default",
    autocast_adapter_dtype: bool = True,
) -> Any:
    """Return a ``peft.PeftModel`` in training mode around a model from ``salr.load``, which it changes.

    Everything packed or dense stays frozen; adapters of the file go on acting, frozen too. For checkpointing call
    ``gradient_checkpointing_enable`` of what this returns, which cares for what the reentrant kind needs.

    Args:
        rank: of the new adapter, at most min(N, K) of each layer; None takes adapter ``name`` of the file out of the
            packed base and trains it further.
        alpha: scaling times rank; None for twice the rank.
        target: where the new adapter goes: every packed linear layer, or what PEFT's ``target_modules`` takes.
        train_residual: make the residual of every packed linear layer (whatever ``target`` says) a trainable adapter
            ``residual``, which stays active whichever adapters are chosen; else it stays frozen in the packed base.
        dropout: of the new adapter's input.
        name: of the new adapter.
        autocast_adapter_dtype: as in PEFT: 16-bit factors are trained in float32; False keeps the layer's dtype.

    Raises:
        OptionError: a number makes no sense, the rank exceeds min(N, K) of a layer, or peft is not installed.
        AdapterError: the model is not packed or has adapters of peft already, the name is taken, or ``target`` fits no
            packed linear layer.
    """
    peft = import_peft()
    _check_numbers(rank, alpha, dropout)
    skeleton_of(model)
    linears = _trainable(model)
    if train_residual:
        _check_residual(linears)
    _check_name(linears, name, rank is None)
    layers = linears if rank is None else _targets(model, linears, target)
    for layer_name, layer in layers.items():
        check_rank(rank, min(layer.entry.shape), layer_name, "lower the rank, or leave the layer out of target")
    task = _task(model)
    if rank is None:
        tuned = _with_taken(peft, model, name, layers, task, autocast_adapter_dtype, dropout)
    else:
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=2 * rank if alpha is None else alpha,
            lora_dropout=dropout,
            target_modules=list(layers),
            task_type=task,
            fan_in_fan_out=any(layer.entry.transposed for layer in layers.values()),
        )
        tuned = peft.get_peft_model(model, config, name, autocast_adapter_dtype=autocast_adapter_dtype)
    if train_residual:
        _add_residual(peft, tuned, linears, task, autocast_adapter_dtype)
    tuned.set_adapter(name)
    return tuned.train()


def _check_numbers(rank: int | None, alpha: float | None, dropout: float) -> None:
    if rank is not None and (type(rank) is not int or rank < 1):
        raise OptionError(f"rank {rank!r}", needed="1 or more (None trains an adapter of the file further)")
    if alpha is not None and (not math.isfinite(alpha) or alpha == 0):
        raise OptionError(f"alpha {alpha!r}", needed="a finite number other than 0")
    if rank is None and alpha is not None:
        raise OptionError("an alpha without a rank", fix="an adapter of the file keeps its own: leave alpha out")
    if not 0 <= dropout < 1:
        raise OptionError(f"dropout {dropout!r}", needed="0 or more, less than 1")


def _trainable(model: Any) -> dict[str, SalrLinear]:
    """Return the layers that take adapters."""
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise AdapterError("the model has adapters of peft already", fix="load it again with salr.load(FILE)")
    linears = packed_linears(model)
    if not linears:
        raise AdapterError(
            "the model has no packed linear layer", fix="experts take no adapters: train the dense model"
        )
    return linears


def _check_residual(linears: Mapping[str, SalrLinear]) -> None:
    if not any(adapter.name == RESIDUAL for layer in linears.values() for adapter in layer.entry.adapters):
        raise AdapterError(
            "there is no residual to train",
            fix="train LoRA alone (--freeze-residual, train_residual=False), or convert again with --rank",
        )


def _check_name(linears: Mapping[str, SalrLinear], name: str, is_there: bool) -> None:
    if not is_adapter_name(name) or name == RESIDUAL:
        raise AdapterError(f"adapter name {name!r}", needed=f"letters, digits, '_' and '-', and not '{RESIDUAL}'")
    exists = any(name in layer.adapter_names for layer in linears.values())
    if exists and not is_there:
        fix = "give another name, or train it further (rank=None in Python)"
        raise AdapterError(f"adapter '{name}' exists already", fix=fix)
    if is_there and not exists:
        held = ", ".join(sorted({n for layer in linears.values() for n in layer.adapter_names})) or "none"
        raise AdapterError(
            f"there is no adapter '{name}' to train further", needed=f"one of: {held}", fix="give a rank"
        )


def _targets(model: Any, linears: dict[str, SalrLinear], target: str | Sequence[str]) -> dict[str, SalrLinear]:
    """Return the layers that ``target`` means, as PEFT matches them."""
    if target == ALL_LINEAR:
        return linears
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    def matches(wanted: str | list[str]) -> list[str]:
        config = LoraConfig(target_modules=wanted)
        try:
            return [name for name, _ in model.named_modules() if check_target_module_exists(config, name)]
        except re.error as error:
            raise OptionError(f"target {wanted!r} is no regular expression ({error})") from error

    parts = [target] if isinstance(target, str) else [[part] for part in target]
    empty = [part for part in parts if not matches(part)]
    if empty or not parts:
        what = empty[0] if empty else list(target)
        raise AdapterError(
            f"target {what!r} fits no layer of {type(model).__name__}", fix=f"for example {ALL_LINEAR!r}"
        )
    found = matches(target if isinstance(target, str) else list(target))
    for name in found:
        if name not in linears:
            raise AdapterError(
                f"target {target!r} fits a layer that is not packed, or an expert",
                tensor=name,
                needed="packed linear layers, whose adapters the file can hold",
            )
    return {name: linears[name] for name in found}


def _task(model: Any) -> str | None:
    """Return PEFT's task type of a model: that of language models, or none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return "CAUSAL_LM" if type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() else None


def _with_taken(
    peft: Any, model: Any, name: str, linears: dict[str, SalrLinear], task: str | None, autocast: bool, dropout: float
) -> Any:
    """Return a PeftModel that trains an adapter of the file further."""
    taken = {path: pair for path, layer in linears.items() if (pair := layer.take_out(name)) is not None}
    config = _config(peft, linears, taken, task, dropout)
    tuned = peft.get_peft_model(model, config, name, low_cpu_mem_usage=True, autocast_adapter_dtype=autocast)
    _fill(tuned, name, taken, autocast)
    return tuned


def _add_residual(peft: Any, tuned: Any, linears: dict[str, SalrLinear], task: str | None, autocast: bool) -> None:
    """Make the residual an adapter; a layer's factors leave its packed product here."""
    taken = {path: pair for path, layer in linears.items() if (pair := layer.take_out(RESIDUAL)) is not None}
    tuned.add_adapter(RESIDUAL, _config(peft, linears, taken, task, 0.0), low_cpu_mem_usage=True)
    _fill(tuned, RESIDUAL, taken, autocast)


def _config(
    peft: Any, linears: Mapping[str, SalrLinear], taken: Mapping[str, TakenAdapter], task: str | None, dropout: float
) -> Any:
    """Return the LoraConfig of factors that are there already, with ranks and alphas of their own."""
    modules = {path: PeftModule(p.entry.rank, p.entry.scaling, p.entry.alpha) for path, p in taken.items()}
    transposed = any(linears[path].entry.transposed for path in taken)
    config = adapter_config(modules, base="", is_causal_lm=task is not None, fan_in_fan_out=transposed)
    given = {key: config[key] for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")}
    return peft.LoraConfig(
        **given, target_modules=list(taken), task_type=task, fan_in_fan_out=transposed, lora_dropout=dropout
    )


def _fill(tuned: Any, name: str, taken: Mapping[str, TakenAdapter], autocast: bool) -> None:
    """Put factors and scalings into PEFT's layers, which are empty so far."""
    model = tuned.get_base_model()
    for path, pair in taken.items():
        layer = model.get_submodule(path)
        for factors, factor in ((layer.lora_A, pair.lora_A), (layer.lora_B, pair.lora_B)):
            trained = factor.to(torch.float32 if autocast else layer.get_base_layer().compute_dtype, copy=True)
            factors[name].weight = torch.nn.Parameter(trained)
        layer.scaling[name] = pair.entry.scaling
