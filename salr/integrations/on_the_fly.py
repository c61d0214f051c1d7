"""Packing a dense model while transformers loads it, without data.

Invariant: the same layers are packed in the same way as by ``salr convert`` without calibration, one at a time; what
has no packed module that computes the same stays dense.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..converter.execution.packing import pack_module
from ..converter.module_options import check_rank, matches
from ..converter.options import ConvertOptions
from ..converter.plan import PlannedModule, plan_module
from ..converter.selection import Choice, module_name
from ..converter.sources.architecture import EXPERT_COUNTS, Role, roles_of_model
from ..converter.sources.checkpoint import TORCH_DTYPES, Checkpoint, SourceTensor
from ..formats.container import TensorSpec
from ..formats.dtypes import Array
from ..formats.errors import OptionError
from ..runtime.experts import SalrExperts, SalrStack
from ..runtime.layout import TORCH_DTYPES as LAYOUT_DTYPES
from ..runtime.layout import buffer_name, module_layout
from ..runtime.linear import SalrLinear
from ..runtime.skeleton import is_experts, is_linear


class PackOnLoad(ConversionOps):  # type: ignore[misc]
    """The operation that transformers runs on a weight in the place of setting it."""

    def __init__(self, packer: Packer) -> None:
        self._packer = packer

    def convert(
        self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, missing_keys: Any = None, **rest: Any
    ) -> dict[str, torch.Tensor]:
        """Pack the one weight (N, K) or (E, N, K) of ``input_dict`` into the model; nothing is left to be set."""
        (value,) = input_dict.values()
        self._packer.pack(model, full_layer_name, value[0] if isinstance(value, list) else value)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


class Packer:
    """Packs the weights of one model; ``roles`` holds those to pack, by their names in the model.

    Raises:
        OptionError: an ``exclude`` pattern matches no module, or the rank exceeds min(N, K) of one.
    """

    def __init__(self, model: Any, options: ConvertOptions) -> None:
        self._options = options
        n_experts = {getattr(model.config, key, None) for key in EXPERT_COUNTS} - {None}
        roles = {name: role for name, role in roles_of_model(model, n_experts).items() if role.packable}
        for pattern in options.exclude:
            if not any(matches(pattern, module_name(name)) for name in roles):
                raise OptionError(f"pattern {pattern!r} matches no module that would be packed")
        self.roles = {
            name: role
            for name, role in roles.items()
            if not any(matches(pattern, module_name(name)) for pattern in options.exclude) and _has_home(model, name)
        }
        for name, role in self.roles.items():
            fix = "give SalrConfig a lower rank, or exclude the layer"
            check_rank(options.module.rank, min((role.shape or (1, 1))[-2:]), name, fix)

    def pack(self, model: Any, name: str, weight: torch.Tensor) -> None:
        """Replace the module of parameter ``name`` by a packed one made from ``weight``, in the file's orientation."""
        planned = self._plan(name, self.roles[name], weight)
        packed = pack_module(planned, _in_memory(name, weight), self._options, weight.device)
        layout = module_layout(planned.name, packed.entry, {spec.name: spec for spec in planned.specs()})
        old = model.get_submodule(name.rpartition(".")[0])
        is_stack = len(packed.entry.shape) == 3
        module = SalrStack(layout) if is_stack else SalrLinear(layout, old.bias)
        state = {
            buffer_name(spec.name): _tensor(packed.tensors[f"{planned.name}.{spec.name}"], spec).to(weight.device)
            for spec in layout.tensors
        }
        module.load_state_dict(state, strict=False, assign=True)
        if not is_stack:
            model.set_submodule(planned.name, module)
            return
        path, _, leaf = planned.name.rpartition(".")
        if not isinstance(old, SalrExperts):
            model.set_submodule(path, SalrExperts(old.num_experts, old.act_fn))
        cast(SalrExperts, model.get_submodule(path)).add([leaf], module)

    def finish(self, model: Any) -> None:
        """Let the model be saved in the form it has now: fused experts stay stacks of packed ones."""
        model._weight_conversions = [
            transform for transform in model._weight_conversions or [] if not isinstance(transform, WeightConverter)
        ]

    def _plan(self, name: str, role: Role, weight: torch.Tensor) -> PlannedModule:
        tensor = SourceTensor(name, TORCH_DTYPES[weight.dtype], tuple(weight.shape), "")
        options = self._options
        choice = Choice(tensor, role, True, role.reason)
        return plan_module(choice, [], _in_memory(name, weight), options)


class _InMemory:
    """Stands for a checkpoint of one tensor."""

    def __init__(self, name: str, weight: torch.Tensor) -> None:
        self.directory, self._name, self._weight = Path("in memory"), name, weight

    def read(self, name: str) -> torch.Tensor:
        assert name == self._name
        return self._weight

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.read(name)[start:stop]


def _in_memory(name: str, weight: torch.Tensor) -> Checkpoint:
    return cast(Checkpoint, _InMemory(name, weight))


def _has_home(model: Any, name: str) -> bool:
    """Tell whether a packed module can stand in for the owner of a parameter."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return is_linear(owner) or is_experts(owner)


def _tensor(array: Array, spec: TensorSpec) -> torch.Tensor:
    """Return an array of the file as the tensor that ``spec`` describes; BF16 comes as uint16."""
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return flat.view(LAYOUT_DTYPES[spec.dtype]).reshape(spec.shape)
