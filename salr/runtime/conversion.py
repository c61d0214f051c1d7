"""Where a tensor of a checkpoint lives in a transformers model: its renamings and fusings, asked of transformers.

Invariant: nothing here knows an architecture; the answer is the one that ``from_pretrained`` itself acts on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Home:
    """A place in the model: the parameter's name there.

    Where transformers would fuse several tensors into it: ``patterns`` of all of them, and the one that matched.
    """

    name: str
    patterns: tuple[str, ...] = ()
    pattern: str | None = None


class Conversion:
    """The conversion mapping of a model whose parameters are all still dense."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._state = model.state_dict()

    def home(self, name: str) -> Home | None:
        """Return where the checkpoint's tensor ``name`` goes; None where the model has no place for it."""
        found, pattern = self._rename(name, self._renamings, self._converters)
        if found not in self._state and name in self._state:
            found, pattern = self._rename(name, [], [])
        if found not in self._state:
            return None
        for converter in self._converters:
            if pattern in converter.source_patterns:
                return Home(found, tuple(converter.source_patterns), pattern)
        return Home(found)

    def _rename(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, self._prefix, self._state)
        return found
