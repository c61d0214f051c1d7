"""What each tensor of a checkpoint is for: linear weight, expert weight, router, embedding, norm.

Invariant: the answer comes from the transformers class that config.json names, built on the meta device, so no code
and no weight of the checkpoint is touched. Without such a class, names and shapes decide.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch

from ...formats.errors import SourceError
from .renaming import Renaming

_ROUTER_LEAVES = {"gate", "router", "shared_expert_gate", "classifier"}
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_SINGLE_EXPERT = re.compile(r".*\bexperts\.\d+\..+\.weight")
_NUMBERED_BLOCK = re.compile(r".*\.\d+\..*|\d+\..*")
_NOT_LINEAR = re.compile(r"embed|norm|wte|wpe|ln_|router|(^|\.)gate$")


class Described(Protocol):
    """A model directory of which config.json is known; its weights need not be there."""

    @property
    def directory(self) -> Path:
        """Where config.json lies."""

    @property
    def config(self) -> dict[str, Any]:
        """What config.json holds."""

    @property
    def architecture(self) -> str | None:
        """The class that config.json names, if any."""


@dataclass(frozen=True)
class Role:
    """What a tensor is for.

    ``packable``: a weight matrix of a block; ``linear``: a weight matrix at all; ``transposed``: stored as (K, N);
    ``shape``: what the class expects, None if unknown; ``reason``: in words, for the ledger.
    """

    packable: bool
    linear: bool
    reason: str
    transposed: bool = False
    shape: tuple[int, ...] | None = None


class Architecture:
    """The roles of a checkpoint's tensors."""

    def __init__(self, checkpoint: Described) -> None:
        self._n_experts = {checkpoint.config.get(key) for key in EXPERT_COUNTS} - {None}
        #: the model class on the meta device, None without one
        self.model = model = _meta_model(checkpoint)
        self.class_name = type(model).__name__ if model is not None else None
        self._prefix = getattr(model, "base_model_prefix", "") or ""
        self._roles = roles_of_model(model, self._n_experts) if model is not None else {}
        self._renaming = Renaming(model, getattr(checkpoint, "tensors", ())) if model is not None else None

    def role(self, name: str, shape: tuple[int, ...]) -> Role:
        """Return the role of tensor ``name``."""
        for candidate in self.spellings(name):
            if candidate in self._roles:
                return self._roles[candidate]
        leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if len(shape) == 2 and _SINGLE_EXPERT.fullmatch(name):
            return Role(True, True, "expert weight")
        if leaf in _ROUTER_LEAVES:
            return Role(False, len(shape) == 2, "router")
        if self.class_name is not None:
            return Role(False, False, f"not a linear layer of {self.class_name}")
        if (
            len(shape) == 2
            and name.endswith(".weight")
            and _NUMBERED_BLOCK.fullmatch(name)
            and not _NOT_LINEAR.search(leaf)
        ):
            return Role(True, True, "2-D weight of a numbered block (no model class)")
        return Role(False, False, "no 2-D weight of a numbered block (no model class)")

    def linear_layer(self, tensor: str) -> str | None:
        """Return the model's own name of the linear layer whose weight ``tensor`` is; None where it is no such weight.

        Without a model class every weight counts, under the name it has.
        """
        known = [name for name in self.spellings(tensor) if name in self._roles or self.class_name is None]
        if not known or not tensor.endswith(".weight"):
            return None
        role = self._roles.get(known[0])
        is_layer = role is None or (role.linear and len(role.shape or ()) == 2)
        return known[0].removesuffix(".weight") if is_layer else None

    @property
    def tied(self) -> dict[str, str]:
        """Tensors of the class that are another one of it: output embeddings, and the input embeddings they equal."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    @property
    def blocks(self) -> tuple[str, int] | None:
        """Name and length of the list of blocks: the module list with the most parameters."""
        return name_of_blocks(self.model) if self.model is not None else None

    def parameter(self, name: str) -> Role | None:
        """Return the role of a parameter of the class by its name there; None if it has none of this name."""
        return next((self._roles[n] for n in self.spellings(name) if n in self._roles), None)

    def spellings(self, name: str) -> list[str]:
        """Return the names a tensor or module may have in the checkpoint and in the model class, its own first."""
        found = spellings(name, self._prefix)
        if self._renaming is not None:
            found += [other for spelled in found for other in self._renaming.others(spelled)]
        return list(dict.fromkeys(found))


def spellings(name: str, prefix: str) -> list[str]:
    """Return the names a tensor or module may have where ``prefix`` is the base model's."""
    return [name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")] if prefix else [name]


def _meta_model(checkpoint: Described) -> torch.nn.Module | None:
    """Build the model class of a checkpoint on the meta device; None if transformers has no such class."""
    import transformers

    model_class = getattr(transformers, checkpoint.architecture or "", None)
    if model_class is None or not isinstance(model_class, type):
        return None
    try:
        config = model_config(checkpoint)
        with torch.device("meta"):
            model: torch.nn.Module = model_class(config)
    except Exception as error:  # transformers raises many types for a bad config; all mean the same here
        raise SourceError(
            f"transformers cannot build {checkpoint.architecture} from it ({' '.join(str(error).split())[:200]})",
            path=checkpoint.directory / "config.json",
            fix="check the config against the model's own",
        ) from error
    return model


def model_config(checkpoint: Described) -> Any:
    """Return the transformers config of a checkpoint, with what was changed since it was read.

    Raises:
        OSError, ValueError and others, as transformers does.
    """
    import transformers

    with TemporaryDirectory(prefix="salr-config-") as folder:
        (Path(folder) / "config.json").write_text(json.dumps(checkpoint.config), encoding="utf-8")
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)


def name_of_blocks(model: torch.nn.Module) -> tuple[str, int] | None:
    """Return name and length of the module list with the most parameters."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m)}
    sizes = {name: sum(parameter.numel() for parameter in blocks.parameters()) for name, blocks in lists.items()}
    name = max(sizes, key=lambda name: sizes[name], default=None)
    return None if name is None else (name, len(lists[name]))


def roles_of_model(model: torch.nn.Module, n_experts: set[Any]) -> dict[str, Role]:
    """Return the role of every parameter of a model, by name; a linear layer of ``n_experts`` rows is a router."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    roles = {}
    for module_name, module in model.named_modules():
        in_block = any(module_name.startswith(name + ".") for name in lists)
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}" if module_name else leaf
            roles[name] = _role_of_parameter(module_name, module, leaf, parameter, in_block, n_experts)
    return roles


def _role_of_parameter(
    module_name: str,
    module: torch.nn.Module,
    leaf: str,
    parameter: torch.nn.Parameter,
    in_block: bool,
    n_experts: set[Any],
) -> Role:
    from transformers.pytorch_utils import Conv1D

    kind, shape = type(module).__name__, tuple(parameter.shape)
    conv1d = isinstance(module, Conv1D)
    linear = leaf == "weight" and (conv1d or isinstance(module, torch.nn.Linear))
    names_router = leaf == "weight" and len(shape) == 2 and module_name.rsplit(".", 1)[-1] in _ROUTER_LEAVES
    if names_router or (linear and shape[0] in n_experts):
        return Role(False, True, "router", shape=shape)
    if linear:
        reason = f"{kind} in a block" if in_block else f"{kind} outside the blocks"
        return Role(in_block, True, reason, conv1d, shape)
    if len(shape) == 3 and module_name.endswith("experts"):
        return Role(True, True, f"stacked experts of {kind}", bool(getattr(module, "is_transposed", False)), shape)
    return Role(False, False, f"{leaf} of {kind}", shape=shape)
