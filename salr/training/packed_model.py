"""A model with packed layers as training sees it: what can be trained, and the file that it came from.

Invariant: modules have the names of the transformers model inside, whatever wraps it (PEFT, torch.compile,
DistributedDataParallel).
"""

from __future__ import annotations

from typing import Any

import torch

from ..formats.errors import AdapterError, OptionError
from ..formats.reader import SalrFile
from ..runtime.experts import SalrExperts, packed_modules
from ..runtime.linear import SalrLinear
from ..runtime.skeleton import Skeleton

_LOAD = "load it with salr.load(FILE)"


def import_peft() -> Any:
    """Return the peft library.

    Raises:
        OptionError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise OptionError("training without PEFT", needed="peft", fix="pip install 'salr[peft]'") from error
    return peft


def inner_model(model: Any) -> Any:
    """Return the transformers model inside whatever wraps it."""
    while True:
        if hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):  # peft
            model = model.get_base_model()
        else:
            return model


def adapted_layers(model: Any) -> list[tuple[str, Any]]:
    """Return the layers of a transformers model that PEFT gave adapters, packed or dense, by name.

    Raises:
        AdapterError: there are none.
    """
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "base_layer")]
    if not found:
        raise AdapterError("the model has no adapter of peft", fix="use salr.prepare_for_training or get_peft_model")
    return found


def packed_linears(model: Any) -> dict[str, SalrLinear]:
    """Return the packed layers that take adapters, by name: linear layers that are no experts."""
    experts = [f"{name}." for name, module in model.named_modules() if isinstance(module, SalrExperts)]
    linears = {name: module for name, module in packed_modules(model) if isinstance(module, SalrLinear)}
    return {name: module for name, module in linears.items() if not name.startswith(tuple(experts))}


def skeleton_of(model: Any) -> Skeleton:
    """Return what the model was built from.

    Raises:
        AdapterError: it is no packed model.
    """
    skeleton = getattr(getattr(model, "hf_quantizer", None), "skeleton", None)
    if not isinstance(skeleton, Skeleton):
        raise AdapterError(
            f"{type(model).__name__} does not come from a .salr file", needed="a packed model", fix=_LOAD
        )
    return skeleton


def file_of(model: Any) -> SalrFile:
    """Return the .salr file that a model came from.

    Raises:
        AdapterError: it came from elsewhere, or the file has changed since.
        FormatError: the file cannot be read any more.
    """
    skeleton, path = skeleton_of(model), str(model.name_or_path)
    if not path.endswith(".salr") and _is_directory_of_transformers(path):
        raise AdapterError(
            "the model was loaded from a directory of transformers", path=path, needed="a .salr file", fix=_LOAD
        )
    file = SalrFile(path)
    if file.manifest.checksums != skeleton.manifest.checksums:
        raise AdapterError(
            "the file has changed since the model was loaded from it", path=path, fix="load it and train again"
        )
    return file


def _is_directory_of_transformers(path: str) -> bool:
    from pathlib import Path

    return (Path(path) / "config.json").is_file()
