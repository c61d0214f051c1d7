"""Where transformers puts the tensors of a checkpoint while it loads them, found from names and shapes alone.

Invariant: the rules are transformers' own (its renamings, conversions and exceptions of a class), applied on the meta
device; nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

Shape = tuple[int, ...]


class Place(NamedTuple):
    """A tensor of the model, and the pattern of the conversion that makes it from others; None for none."""

    tensor: str
    pattern: str | None


class Loading:
    """Where the tensors of a checkpoint go in ``model``, a transformers model on the meta device."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {pattern: t for t in self._converters for pattern in t.source_patterns}
        self._model, self._prefix, self._state = model, model.base_model_prefix, model.state_dict()
        self._tied = getattr(model, "all_tied_weights_keys", None) or {}
        optional = getattr(model, "_keys_to_ignore_on_load_missing", None)
        self._optional = re.compile("|".join(f"({pattern})" for pattern in optional)) if optional else None

    def saved_shapes(self) -> dict[str, Shape]:
        """Return name and shape of each parameter in a checkpoint that transformers saves, without tied ones."""
        from transformers.core_model_loading import revert_weight_conversion

        every = self._model.named_parameters(remove_duplicate=False)
        saved = revert_weight_conversion(self._model, {name: p for name, p in every if name not in self._tied})
        return {name: tuple(tensor.shape) for name, tensor in saved.items()}

    def places(self, name: str) -> list[Place]:
        """Return the tensors of the model that tensor ``name`` of a checkpoint is, or is a part of."""
        found, pattern = self._find(name)
        if found not in self._state:
            return []
        targets = [found]
        if pattern is not None:
            first, *others = self._by_pattern[pattern].target_patterns
            targets += [found.replace(first, other) for other in others]
        return [Place(target, pattern) for target in targets if target in self._state]

    def unexpected(self, names: Iterable[str]) -> list[str]:
        """Return those of ``names``, all without a place, that transformers would warn of."""
        keys = {name: self._find(name)[0] for name in names}
        found = SimpleNamespace(missing_keys=set(), unexpected_keys=set(keys.values()))
        self._model._adjust_missing_and_unexpected_keys(found)
        return [name for name, key in keys.items() if key in found.unexpected_keys]

    def shape(self, tensor: str) -> Shape:
        """Return the shape of a tensor of the model."""
        return tuple(self._state[tensor].shape)

    def fits(self, tensor: str, patterns: Mapping[str, str], shapes: Mapping[str, Shape]) -> bool:
        """Tell whether the tensors with these patterns, converted, have the shape of the model's ``tensor``."""
        converter = deepcopy(self._by_pattern[next(iter(patterns.values()))])
        for name, pattern in patterns.items():
            converter.add_tensor(tensor, name, pattern, torch.empty(shapes[name], device="meta"))
        try:
            made = converter.convert(tensor, model=self._model, config=self._model.config)
        except Exception:  # operations raise many types for tensors that do not go together
            return False
        tensors = {name: value[0] if isinstance(value, list) else value for name, value in made.items()}
        return all(tuple(value.shape) == self.shape(name) for name, value in tensors.items() if name in self._state)

    def renamed(self, name: str) -> str:
        """Return the name of a checkpoint's tensor in the spelling that all checkpoints share."""
        return self._rename(name, self._renamings, [])[0]

    def untied(self, tensor: str) -> str:
        """Return the tensor of the model that one of it is tied to, or itself."""
        return str(self._tied.get(tensor, tensor))

    def beside(self, place: Place) -> set[Place]:
        """Return the places that only together make up a tensor of the model."""
        patterns = self._by_pattern[place.pattern].source_patterns if place.pattern is not None else [None]
        return {Place(place.tensor, pattern) for pattern in patterns}

    def is_optional(self, tensor: str) -> bool:
        """Tell whether the class does without a tensor."""
        return self._optional is not None and self._optional.search(tensor) is not None

    def _find(self, name: str) -> tuple[str, str | None]:
        """Return the tensor of the model, there or not, that a checkpoint's is for, and the conversion's pattern."""
        found, pattern = self._rename(name, self._renamings, self._converters)
        if found not in self._state and name in self._state:
            return self._rename(name, [], [])
        return found, pattern

    def _rename(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, self._prefix, self._state)
        return found
