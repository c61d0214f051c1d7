"""Packed models in directories of transformers: read with the checks of a .salr file, written with its manifest.

Invariant: a tensor keeps name, dtype and bytes between a .salr file and a directory; the manifest digests every tensor
of the directory, whether it is one file or shards.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..converter.export.hf import GUARD
from ..formats import validation
from ..formats.container import Container
from ..formats.errors import FormatError
from ..formats.manifest import MANIFEST_NAME, Manifest, ModuleEntry, parse_manifest
from ..formats.reader import SalrFile
from ..formats.version import VERSION
from ..runtime.experts import packed_modules
from ..runtime.layout import stored_name
from ..runtime.skeleton import Skeleton


class _Joined(Container):
    """Several safetensors files that are read as one."""

    def __init__(self, paths: list[str]) -> None:
        self._files = [Container(path) for path in paths]
        self.path = self._files[0].path if len(paths) == 1 else Path(paths[0]).parent
        self._owner = {name: file for file in self._files for name in file.tensors}
        self.tensors = {name: file.tensors[name] for name, file in self._owner.items()}
        self.n_bytes = sum(file.n_bytes for file in self._files)
        self.metadata = {}

    def raw(self, name: str) -> memoryview:
        if name not in self._owner:
            raise FormatError("there is no such tensor", path=self.path, tensor=name)
        return self._owner[name].raw(name)


class SavedModel(SalrFile):
    """The weight files of a directory, checked like a .salr file but for the header's digest.

    Raises:
        FormatError: there is no manifest, or files and manifest contradict each other.
    """

    def __init__(self, paths: list[str]) -> None:
        container = _Joined(paths) if paths else None
        if container is None or MANIFEST_NAME not in container.tensors:
            raise FormatError(
                "there is no salr.manifest among the weights",
                path=container.path if container else None,
                needed="what `salr export hf` or save_pretrained wrote",
                fix="export the .salr file again",
            )
        self._container = container
        self.manifest = parse_manifest(bytes(container.raw(MANIFEST_NAME)), str(container.path))
        validation.check_manifest(container, self.manifest)
        self._checked = set()

    def refuse_dense(self, skeleton: Skeleton) -> None:
        """Refuse a module that would have to be decoded: transformers loads a directory's tensors as they are.

        Raises:
            FormatError: see above.
        """
        for module, reason in skeleton.dense.items():
            raise FormatError(
                f"it cannot stay packed here: {reason}",
                path=self.path,
                tensor=module,
                fix="load the .salr file with salr.load, or convert again with --exclude for this module",
            )


def saved_state(model: Any, manifest: Manifest | None) -> dict[str, torch.Tensor]:
    """Return what ``save_pretrained`` has to write: the model's tensors by their names there, and a manifest.

    The manifest speaks of the names that transformers gives the tensors on disk (it reverts its own renamings).

    Args:
        manifest: of the file that the model came from, for what it says beside the tensors.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    packed = dict(packed_modules(model))
    factors = {
        f"{home}.{name}": f"{home}.{stored_name(name)}"
        for home, module in packed.items()
        for name in module.state_dict()
    }
    state = {factors.get(name, name): tensor for name, tensor in model.state_dict().items() if name not in tied}
    names = {id(tensor): name for name, tensor in state.items()}
    on_disk = _as_on_disk(model, state)
    disk_names = {names[id(tensor)]: name for name, tensor in on_disk.items() if id(tensor) in names}
    modules = {}
    for home, module in packed.items():
        name = disk_names[f"{home}.values"].removesuffix(".values")
        modules[name] = _renamed(module.entry, name)
    checksums = {name: validation.digest(_raw(tensor)) for name, tensor in on_disk.items()}
    data = _updated(manifest, modules, checksums).to_json()
    return state | {MANIFEST_NAME: torch.frombuffer(bytearray(data), dtype=torch.uint8)}


def save_guarded(model: Any, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> None:
    """Save as the model's class does, and put the guard into config.json, from which transformers drops it.

    With ``push_to_hub`` transformers uploads before the guard is there; upload the directory afterwards instead.
    """
    type(model).save_pretrained(model, save_directory, *args, **options)
    path = Path(save_directory) / "config.json"
    if path.is_file() and not getattr(model, "_hf_peft_config_loaded", False):
        config = json.loads(path.read_text(encoding="utf-8")) | {"transformers_weights": GUARD}
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_on_disk(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors under the names that transformers writes; it reverts the conversions it loaded with."""
    from transformers.core_model_loading import revert_weight_conversion

    found: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(state))
    return found


def _renamed(entry: ModuleEntry, name: str) -> ModuleEntry:
    """Return a module's entry for another module name; stacks of experts are parameters without ``.weight``."""
    suffix = ".weight" if entry.source_tensor.endswith(".weight") else ""
    return replace(entry, source_tensor=name + suffix)


def _updated(manifest: Manifest | None, modules: dict[str, ModuleEntry], checksums: dict[str, str]) -> Manifest:
    if manifest is None:
        return Manifest(f"salr {VERSION}", modules, checksums)
    return replace(manifest, modules=modules, checksums=checksums)


def _raw(tensor: torch.Tensor) -> memoryview:
    """Return a tensor's bytes."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
