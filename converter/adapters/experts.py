"""target_parameters: factors of a stack of experts, which transformers may have fused from one tensor an expert.

PEFT stores A as (E*r, K) with the experts outside, and B as (N, r*E) with the experts inside.
Invariant: where the checkpoint holds single experts, each gets the rows of the factors that are its own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ...formats.errors import AdapterError
from ..sources.architecture import Architecture, Role
from ..sources.checkpoint import Checkpoint, SourceTensor
from .keys import Factors, unwrapped
from .source import Adapter, Factor, LoraPair

#: what transformers may do with single experts: stack them, and put gate and up side by side
_PLAIN = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


@dataclass(frozen=True)
class ExpertPair:
    """Factors of one tensor of the checkpoint, and how they are computed from the trained ones."""

    tensor: str
    pair: LoraPair
    make_a: Factor
    make_b: Factor


@dataclass(frozen=True)
class _Slice:
    """One expert's part of a fused parameter: its number and its rows of N."""

    tensor: str
    expert: int
    start: int
    stop: int


@dataclass
class _FusedParameter:
    """A parameter that transformers makes of single experts: expert -> place along N -> tensor.

    ``is_plain``: they are only put side by side.
    """

    is_plain: bool = False
    tensors: dict[int, dict[int, str]] = field(default_factory=dict)


class SingleExperts:
    """Which tensors of a checkpoint transformers fuses into which parameters of its class."""

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture) -> None:
        self.checkpoint, self.architecture = checkpoint, architecture

    def parts(self, name: str, n_rows: int, adapter: Adapter) -> Iterator[_Slice]:
        """Yield the tensors that parameter ``name`` with ``n_rows`` rows an expert is made of.

        Raises:
            AdapterError: transformers does more than put them side by side.
        """
        found = next((self._fused[n] for n in self.architecture.spellings(name) if n in self._fused), None)
        if found is None or not found.is_plain:
            raise AdapterError(
                f"target_parameters: {self.checkpoint.directory} holds {name} in a form that is not known here",
                path=adapter.directory,
                needed="stacked experts, or one tensor an expert",
            )
        for expert, positions in sorted(found.tensors.items()):
            step = n_rows // len(positions)
            for position, tensor in sorted(positions.items()):
                yield _Slice(tensor, expert, position * step, (position + 1) * step)

    @cached_property
    def _fused(self) -> dict[str, _FusedParameter]:
        """What each fused parameter is made of."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        model: Any = self.architecture.model
        conversion = list(get_model_conversion_mapping(model))
        renamings = [t for t in conversion if isinstance(t, WeightRenaming)]
        converters = [t for t in conversion if isinstance(t, WeightConverter)]
        state = model.state_dict()
        found: dict[str, _FusedParameter] = {}
        for tensor in self.checkpoint.tensors:
            home, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
            used = next((c for c in converters if pattern in c.source_patterns), None)
            numbers = [int(level) for level in tensor.split(".") if level.isdigit()]
            if used is not None and numbers:
                position = list(used.source_patterns).index(pattern)
                parameter = found.setdefault(home, _FusedParameter())
                parameter.is_plain = [type(step).__name__ for step in used.operations] in _PLAIN
                parameter.tensors.setdefault(numbers[-1], {})[position] = tensor
        return found


class _Fused:
    """Factors of one parameter of PEFT's model as tensors: A (E, r, K), B (E, N, r)."""

    def __init__(self, adapter: Adapter, factors: Factors, shape: tuple[int, int, int]) -> None:
        self._adapter, self._factors = adapter, factors
        self.n_experts, self.n_rows, self.n_columns = shape
        self.rank = factors["A"].shape[0] // self.n_experts

    def lora_a(self) -> torch.Tensor:
        return self._adapter.read(self._factors["A"]).reshape(self.n_experts, self.rank, self.n_columns)

    def lora_b(self) -> torch.Tensor:
        packed = self._adapter.read(self._factors["B"]).reshape(self.n_rows, self.rank, self.n_experts)
        return packed.permute(2, 0, 1)


def expert_pairs(path: str, factors: Factors, adapter: Adapter, singles: SingleExperts) -> Iterator[ExpertPair]:
    """Yield the pairs that the factors of one bare parameter are, one for each tensor of the checkpoint.

    Args:
        path: of the factors in PEFT's model; several parameters of a module are wrapped in each other.

    Raises:
        AdapterError: no parameter of the module has this size, or the checkpoint holds it in an unknown form.
    """
    module, checkpoint, architecture = unwrapped(path), singles.checkpoint, singles.architecture
    name, role = _parameter(module, factors, adapter, architecture)
    n_experts, n_rows, n_columns = _sizes(role)
    fused = _Fused(adapter, factors, (n_experts, n_rows, n_columns))
    settings = adapter.settings
    alpha, scaling = settings.alpha(name), settings.scaling(name)
    if fused.rank != settings.rank(name):
        raise _odd(adapter, module, factors, f"rank {settings.rank(name)} for {n_experts} experts")
    whole = next((n for n in architecture.spellings(name) if n in checkpoint.tensors), None)
    if whole is not None:
        stacked = (n_experts, fused.rank, n_columns), (n_experts, n_rows, fused.rank)
        pair = _pair(factors, whole, stacked, alpha, scaling)
        yield ExpertPair(whole, pair, fused.lora_a, fused.lora_b)
        return
    for part in singles.parts(name, n_rows, adapter):
        shapes = (fused.rank, n_columns), (part.stop - part.start, fused.rank)
        pair = _pair(factors, part.tensor, shapes, alpha, scaling)
        yield ExpertPair(part.tensor, pair, _of_a(fused, part), _of_b(fused, part))


def _of_a(fused: _Fused, part: _Slice) -> Factor:
    return lambda: fused.lora_a()[part.expert]


def _of_b(fused: _Fused, part: _Slice) -> Factor:
    return lambda: fused.lora_b()[part.expert, part.start : part.stop]


def _pair(
    factors: Factors, tensor: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], alpha: float, scaling: float
) -> LoraPair:
    made = [
        SourceTensor(f"{factors[side].name} for {tensor}", factors[side].dtype, shape, factors[side].file)
        for side, shape in zip("AB", shapes, strict=True)
    ]
    formula = "the expert's own rows of PEFT's factors of all experts, bit for bit"
    return LoraPair(made[0], made[1], shapes[0][-2], alpha, scaling, formula)


def _parameter(module: str, factors: Factors, adapter: Adapter, architecture: Architecture) -> tuple[str, Role]:
    """Return name and role of the stacked parameter of ``module`` that the factors fit."""
    fitting = []
    for target in adapter.config.get("target_parameters") or []:
        name = f"{module}.{str(target).rpartition('.')[2]}"
        role = architecture.parameter(name)
        if role is None or role.shape is None or len(role.shape) != 3:
            continue
        n_experts, n_rows, n_columns = _sizes(role)
        a, b = factors["A"].shape, factors["B"].shape
        if a[1] == n_columns and b[0] == n_rows and a[0] == b[1] and a[0] % n_experts == 0:
            fitting.append((name, role))
    if len({name for name, _ in fitting}) != 1:
        raise _odd(adapter, module, factors, f"a stack of experts in {architecture.class_name} that they fit")
    return fitting[0]


def _sizes(role: Role) -> tuple[int, int, int]:
    """Return E, N and K of a stack of experts."""
    assert role.shape is not None
    n_experts, *sides = role.shape
    n_rows, n_columns = reversed(sides) if role.transposed else sides
    return n_experts, n_rows, n_columns


def _odd(adapter: Adapter, module: str, factors: Factors, needed: str) -> AdapterError:
    found = f"target_parameters: lora_A {list(factors['A'].shape)}, lora_B {list(factors['B'].shape)}"
    return AdapterError(found, path=adapter.directory, tensor=module, needed=needed)
