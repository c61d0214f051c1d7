"""A trained model back into a .salr file: the base's bytes, with the adapters that PEFT trained.

Invariant: whatever was trained is in the new file, or saving is refused; what was not trained keeps its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..converter.adapters.summary import AdapterSummary
from ..converter.adapters.trained import TrainedAdapter, TrainedFactors, write_trained
from ..formats import naming
from ..formats.dtypes import to_float32
from ..formats.errors import AdapterError, OptionError
from ..formats.manifest import RESIDUAL, why_not_json
from ..formats.reader import SalrFile
from ..formats.rewriting import Destination
from ..formats.version import VERSION
from ..runtime.experts import packed_modules
from ..runtime.linear import SalrLinear
from .packed_model import adapted_layers, file_of, inner_model, packed_linears, skeleton_of

_CONVERT = "train LoRA on packed linear layers alone, or train the dense model and convert it"


@dataclass(frozen=True)
class SaveReport:
    """What was written: ``adapters`` trained (the residual among them where it was), ``n_bytes`` of the file."""

    path: Path
    n_bytes: int
    adapters: tuple[AdapterSummary, ...]


def save(model: Any, path: str | Path, *, force: bool = False, settings: Mapping[str, Any] | None = None) -> SaveReport:
    """Write a model from ``salr.load`` with its PEFT adapters as a .salr file.

    Every tensor of the file that the model came from stays, byte for byte, but for factors that were trained: those are
    written in the dtype that they have, under PEFT's names. A residual that training left as it was keeps its bytes. An
    adapter that the file holds already is an error, unless ``prepare_for_training`` took it out of there.

    Args:
        model: a ``PeftModel``, or a model with adapters of transformers' PEFT integration; compiled or not.
        path: of the new file; also the old one, with ``force``.
        force: replace an existing file.
        settings: what else to record beside the adapters' own settings; JSON values only.

    Raises:
        AdapterError: the model is no packed model or its file has changed; an adapter is no plain LoRA on packed linear
            layers, has a taken name or holds NaN; or something else than adapters is trainable.
        OptionError: ``settings`` hold what JSON cannot.
        SalrError: the output exists or cannot be written, or the old file is damaged.
    """
    _check_settings(settings)
    inner = inner_model(model)
    names = {home: module for module, home in skeleton_of(inner).homes.items()}
    file = file_of(inner)
    adapted_layers(inner)
    _check_whole(model, inner)
    found = _factors(inner, names)
    adapters = [
        TrainedAdapter(name, factors, _settings(model, name, len(factors), settings or {}), _was_taken(inner, name))
        for name, factors in found.items()
        if not (name == RESIDUAL and _is_untouched(file, factors))
    ]
    _check_nothing_lost(inner, set(found))
    written = write_trained(file, adapters, Destination(Path(path), force))
    return SaveReport(Path(path), Path(path).stat().st_size, tuple(written))


def _check_settings(settings: Mapping[str, Any] | None) -> None:
    """Refuse settings that the manifest could not record."""
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise OptionError(f"settings of type {type(settings).__name__}", needed="a dict, names to JSON values")
    for name, value in settings.items():
        reason = why_not_json({name: value}) if isinstance(name, str) else "its name is no text"
        if reason is not None:
            raise OptionError(
                f"setting {name!r} cannot be recorded ({reason})",
                needed="what JSON holds: text, finite numbers, true, false, null, and lists or objects of them",
                fix="convert it first, a path with str() for example",
            )


def _configs(model: Any) -> Mapping[str, Any]:
    """Return adapter -> peft's config."""
    for part in (model, getattr(model, "_orig_mod", None), getattr(model, "module", None), inner_model(model)):
        configs = getattr(part, "peft_config", None)
        if isinstance(configs, Mapping):
            return configs
    return {}


def _check_whole(model: Any, inner: Any) -> None:
    """Refuse what a file cannot hold: other kinds of adapters, and trained parameters of the base."""
    for name, config in _configs(model).items():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        parts = {
            key: getattr(config, key, None)
            for key in ("modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters")
        }
        found = [f"{key}={value!r}" for key, value in parts.items() if value and key != "modules_to_save"]
        found += [f"bias={config.bias!r}"] if getattr(config, "bias", "none") != "none" else []
        if kind != "LORA" or found:
            what = kind if kind != "LORA" else ", ".join(found)
            raise AdapterError(f"adapter '{name}' has {what}", needed="plain LoRA", fix=_CONVERT)
    for name, parameter in inner.named_parameters():
        is_factor = ".lora_A." in name or ".lora_B." in name
        is_replaced = ".modules_to_save." in name or ".token_adapter." in name
        if is_replaced or (parameter.requires_grad and not is_factor):
            raise AdapterError("it is trained and no LoRA factor", tensor=name, needed="a frozen base", fix=_CONVERT)


def _factors(inner: Any, names: Mapping[str, str]) -> dict[str, dict[str, TrainedFactors]]:
    """Return adapter -> the file's name of a module -> factors."""
    found: dict[str, dict[str, TrainedFactors]] = {}
    for path, layer in adapted_layers(inner):
        if not isinstance(layer.base_layer, SalrLinear):
            raise AdapterError(
                "its adapter is on a layer that is not packed", tensor=path, needed="packed linear layers", fix=_CONVERT
            )
        for name in layer.lora_A:
            lora_a, lora_b = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
            if lora_a.is_meta or lora_b.is_meta:
                raise AdapterError("its factors are not there", tensor=path, fix="load the adapter before saving")
            factors = TrainedFactors(lora_a, lora_b, float(layer.scaling[name]), _alpha(layer, name))
            found.setdefault(name, {})[names[path]] = factors
    return found


def _alpha(layer: Any, name: str) -> float | None:
    """Return the alpha that an adapter was trained with; None for the residual, which has a scaling alone."""
    alpha = layer.lora_alpha.get(name)
    return None if name == RESIDUAL or alpha is None else float(alpha)


def _was_taken(inner: Any, name: str) -> bool:
    """Tell whether an adapter left the packed product to be trained further."""
    return any(name in module.taken for _, module in packed_modules(inner))


def _check_nothing_lost(inner: Any, found: set[str]) -> None:
    """Refuse a model that lost an adapter which had left the packed base."""
    lost = sorted({name for _, module in packed_modules(inner) for name in module.taken} - found)
    if lost:
        raise AdapterError(f"adapter '{lost[0]}' was deleted from the model", fix="load the file and train again")


def _is_untouched(file: SalrFile, factors: Mapping[str, TrainedFactors]) -> bool:
    """Tell whether the residual's factors are still the file's, bit for bit but for their dtype."""
    for module, pair in factors.items():
        for name, factor in (
            (naming.lora_a_name(module, RESIDUAL), pair.lora_A),
            (naming.lora_b_name(module, RESIDUAL), pair.lora_B),
        ):
            dtype = file.tensors[name].dtype if name in file.tensors else ""
            if dtype not in naming.FLOAT_DTYPES:
                return False
            stored = torch.from_numpy(to_float32(file.tensor(name), dtype))
            if not torch.equal(stored, factor.float().cpu()):
                return False
    return True


def _settings(model: Any, name: str, n_layers: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the manifest records of an adapter's training."""
    import peft

    config = _configs(model).get(name)
    told: dict[str, Any] = {"trainer": f"salr {VERSION}, peft {peft.__version__}, torch {torch.__version__}"}
    if config is not None and name != RESIDUAL:
        told |= {key: getattr(config, key) for key in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
        targets = config.target_modules or []
        is_everywhere = n_layers == len(packed_linears(inner_model(model)))
        told["target_modules"] = (
            "all-linear" if is_everywhere else targets if isinstance(targets, str) else sorted(targets)
        )
    return {**told, **settings}
