"""A transformers model on the meta device whose linear layers and experts are replaced by packed modules.

Invariant: a packed module of the file is either given a place where the product is the same, or named with the reason
why it has to be loaded dense; none is dropped. Planning only looks; ``build`` replaces modules.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..formats.container import TensorSpec
from ..formats.manifest import Manifest, ModuleEntry
from .conversion import Conversion, Home
from .experts import ExpertNames, SalrExperts, SalrStack
from .layout import ModuleLayout, module_layout
from .linear import SalrLinear

_SINGLE_EXPERT = re.compile(r".+\.experts\.(\d+)\.([^.]+)")
_STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Skeleton:
    """What becomes of each packed module of a file in one model class.

    ``homes`` maps the file's name of a module to the model's; ``experts`` maps a fused experts module of the model to
    what its single experts' modules are called (None: stacks); ``dense`` gives the reason for each module left dense.
    """

    manifest: Manifest
    layouts: Mapping[str, ModuleLayout]
    homes: Mapping[str, str]
    experts: Mapping[str, ExpertNames | None]
    dense: Mapping[str, str]

    def __deepcopy__(self, memo: dict[int, Any]) -> Skeleton:
        """Return itself: transformers copies configs, and this is plain data that nobody changes."""
        return self


@dataclass
class _Draft:
    """A skeleton under way; ``parts`` maps an experts module to (role -> expert -> file's module name)."""

    conversion: Conversion
    homes: dict[str, str] = field(default_factory=dict)
    parts: dict[str, dict[str, dict[int, str]]] = field(default_factory=dict)
    experts: dict[str, ExpertNames | None] = field(default_factory=dict)
    dense: dict[str, str] = field(default_factory=dict)


def plan_skeleton(model: Any, manifest: Manifest, tensors: Mapping[str, TensorSpec]) -> Skeleton:
    """Decide where each packed module goes in ``model``, a transformers model on the meta device.

    Args:
        tensors: of the file, by name.
    """
    draft = _Draft(Conversion(model))
    for module, entry in manifest.modules.items():
        reason = _place(draft, model, module, entry)
        if reason:
            draft.dense[module] = reason
    for path, roles in draft.parts.items():
        _place_experts(draft, model.get_submodule(path), path, roles)
    layouts = {name: module_layout(name, entry, tensors) for name, entry in manifest.modules.items()}
    return Skeleton(manifest, layouts, draft.homes, draft.experts, draft.dense)


def build(model: torch.nn.Module, skeleton: Skeleton) -> None:
    """Replace the modules of ``model`` that have a packed form; the new ones are empty, on the meta device."""
    for path, names in skeleton.experts.items():
        old: Any = model.get_submodule(path)
        model.set_submodule(path, SalrExperts(old.num_experts, old.act_fn, names))
    for module, home in skeleton.homes.items():
        layout = skeleton.layouts[module]
        owner, _, leaf = home.rpartition(".experts.")
        if f"{owner}.experts" in skeleton.experts:
            packed = SalrLinear(layout) if len(layout.entry.shape) == 2 else SalrStack(layout)
            experts = model.get_submodule(f"{owner}.experts")
            assert isinstance(experts, SalrExperts)
            experts.add(leaf.split("."), packed)
        else:
            linear: Any = model.get_submodule(home)
            model.set_submodule(home, SalrLinear(layout, linear.bias))


def _place(draft: _Draft, model: Any, module: str, entry: ModuleEntry) -> str | None:
    """Give one packed module its place; return why there is none."""
    home = draft.conversion.home(entry.source_tensor)
    if home is None:
        return f"{type(model).__name__} has no such weight"
    path, _, leaf = home.name.rpartition(".")
    owner = model.get_submodule(path)
    if is_experts(owner) and leaf in _STACKS:
        return _place_expert(draft, path, leaf, module, entry, home)
    if home.pattern is not None:
        return f"transformers fuses it into {home.name}"
    if home.name in (getattr(model, "all_tied_weights_keys", None) or {}):
        return "it is tied to another weight"
    if leaf != "weight" or not is_linear(owner):
        return f"it is {leaf} of {type(owner).__name__}"
    draft.homes[module] = path
    return None


def _place_expert(draft: _Draft, path: str, leaf: str, module: str, entry: ModuleEntry, home: Home) -> str | None:
    """Note a stack of experts, or one of a single expert's weights; the whole is judged later."""
    roles = draft.parts.setdefault(path, {})
    if len(entry.shape) == 3 and home.pattern is None:
        roles.setdefault(leaf, {})[-1] = module
        return None
    single = _SINGLE_EXPERT.fullmatch(module)
    if single is None or home.pattern is None:
        return "it is no stack of experts and no single expert's weight"
    role = leaf if leaf == "down_proj" else ("gate", "up")[home.patterns.index(home.pattern)]
    roles.setdefault(role, {})[int(single[1])] = module
    return None


def _place_experts(draft: _Draft, experts: Any, path: str, roles: Mapping[str, Mapping[int, str]]) -> None:
    """Accept the experts of one layer where all of them are packed in one of the two forms."""
    everyone = set(range(experts.num_experts))
    if set(roles) == set(_STACKS) and all(set(found) == {-1} for found in roles.values()):
        draft.experts[path] = None
        draft.homes |= {found[-1]: f"{path}.{leaf}" for leaf, found in roles.items()}
        return
    leaves = {role: {name.rpartition(".")[2] for name in found.values()} for role, found in roles.items()}
    is_whole = set(roles) == {"gate", "up", "down_proj"} and all(set(found) == everyone for found in roles.values())
    if not is_whole or any(len(found) != 1 for found in leaves.values()):
        draft.dense |= {
            module: "only some of its layer's experts are packed"
            for found in roles.values()
            for module in found.values()
        }
        return
    gate, up, down = (leaves[role].pop() for role in ("gate", "up", "down_proj"))
    draft.experts[path] = ExpertNames(gate, up, down)
    for found in roles.values():
        draft.homes |= {module: f"{path}.{e}.{module.rpartition('.')[2]}" for e, module in found.items()}


def is_linear(module: torch.nn.Module) -> bool:
    """Tell whether a module computes a plain linear product and nothing else."""
    from transformers.pytorch_utils import Conv1D

    return any(type(module).forward is kind.forward and isinstance(module, kind) for kind in (torch.nn.Linear, Conv1D))


def is_experts(module: Any) -> bool:
    """Tell whether a module is a fused mixture that ``SalrExperts`` computes alike: gate and up, no bias, no extra."""
    if {name for name, _ in module.named_parameters(recurse=False)} != set(_STACKS):
        return False
    standard = {"has_bias": False, "has_gate": True, "is_concatenated": True, "has_post_expert_norm": False}
    gate = getattr(type(module), "_apply_gate", None)
    return (
        all(getattr(module, name, value) == value for name, value in standard.items())
        and (gate is None or gate.__name__ == "_default_apply_gate")
        and list(inspect.signature(type(module).forward).parameters)[1:]
        == ["hidden_states", "top_k_index", "top_k_weights"]
        and hasattr(module, "num_experts")
        and hasattr(module, "act_fn")
    )
