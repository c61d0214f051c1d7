"""Which packed modules of a .salr file the factors of a PEFT directory belong to.

Invariant: every factor is matched, or the adapter is refused with the key and the reason.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ...formats.errors import AdapterError
from ...formats.manifest import ModuleEntry
from ...formats.reader import SalrFile
from ..selection import TrainedPair
from ..sources.architecture import Architecture, spellings
from ..sources.checkpoint import architecture_of
from .source import Adapter


def match_modules(file: SalrFile, adapter: Adapter) -> dict[str, TrainedPair]:
    """Return the pair of each packed module that the adapter has factors for.

    Raises:
        AdapterError: it has none, a key matches no packed module, or shapes disagree.
    """
    if not adapter.pairs:
        raise AdapterError("holds no factors", path=adapter.directory, fix="save the adapter again")
    prefix = _base_model_prefix(file)
    known = {key: spellings(key, prefix) for key in adapter.pairs}
    if any(not set(names) & set(file.modules) for names in known.values()):
        known = {key: names + _renamed(file, key) for key, names in known.items()}
    matched, unmatched = {}, []
    for key, pair in adapter.pairs.items():
        module = next((name for name in known[key] if name in file.modules), None)
        if module is None:
            unmatched.append(key)
            continue
        _check_shape(adapter, key, (pair.lora_B.shape[0], pair.lora_A.shape[1]), file.modules[module])
        matched[module] = TrainedPair(adapter, key, pair)
    if unmatched:
        raise _unmatched(file, adapter, unmatched, prefix)
    return matched


def _base_model_prefix(file: SalrFile) -> str:
    """Return what the model class puts before the names of its base model, which some checkpoints leave out."""
    import transformers

    name = file.manifest.source.get("class")
    model_class = getattr(transformers, name, None) if isinstance(name, str) else None
    prefix = getattr(model_class, "base_model_prefix", None)
    return prefix if isinstance(prefix, str) else ""


@dataclass(frozen=True)
class _Carried:
    """The config that a file carries, and the names of the tensors that its modules were."""

    directory: Path
    config: dict[str, Any]
    tensors: tuple[str, ...]

    @property
    def architecture(self) -> str | None:
        return architecture_of(self.config)


def _renamed(file: SalrFile, key: str) -> list[str]:
    """Return the names that transformers gives a module of its class in a checkpoint."""
    architecture = _architecture(file)
    return [] if architecture is None else architecture.spellings(key)


@lru_cache(maxsize=1)
def _architecture(file: SalrFile) -> Architecture | None:
    if "config.json" not in file.assets:
        return None
    try:
        config = json.loads(file.asset("config.json"))
    except (ValueError, RecursionError):
        return None
    if not isinstance(config, dict):
        return None
    return Architecture(_Carried(file.path, config, tuple(e.source_tensor for e in file.modules.values())))


def _check_shape(adapter: Adapter, key: str, shape: tuple[int, int], entry: ModuleEntry) -> None:
    if shape != entry.shape:
        raise AdapterError(
            f"factors for a {shape[0]} x {shape[1]} weight",
            path=adapter.directory,
            tensor=key,
            needed=" x ".join(map(str, entry.shape)),
            fix="the adapter was trained on another model",
        )


def _unmatched(file: SalrFile, adapter: Adapter, keys: list[str], prefix: str) -> AdapterError:
    key = keys[0]
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    if any(f"{name}.weight" in file.tensors for name in spellings(key, prefix)):
        found, fix = f"{file.path} keeps its weight dense", "convert the source again with --adapter, which packs it"
    else:
        found, fix = f"{file.path} has no such module", "was the adapter trained on another model?"
    return AdapterError(found + more, path=adapter.directory, tensor=key, needed="a packed module", fix=fix)
