"""Tensors that a model class calls otherwise than its checkpoints do, as transformers renames them while it loads.

Invariant: only whole names are mapped to whole names; what transformers fuses from several tensors is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch


class Renaming:
    """Names of one model class, and of the tensors of one checkpoint of it.

    Args:
        model: on the meta device.
        tensors: names in the checkpoint.
    """

    def __init__(self, model: torch.nn.Module, tensors: Iterable[str]) -> None:
        self._model, self._tensors = model, tensors
        self._known: dict[str, str] = {}

    def others(self, name: str) -> list[str]:
        """Return what a tensor or module of this name is called on the other side, of the two that there are."""
        found = [self._in_model(name)]
        if name in self._on_disk:
            found.append(self._on_disk[name])
        elif f"{name}.weight" in self._on_disk:
            found.append(self._on_disk[f"{name}.weight"].removesuffix(".weight"))
        return [other for other in found if other != name]

    def _in_model(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        if name not in self._known:
            prefix = getattr(self._model, "base_model_prefix", "")
            self._known[name] = str(rename_source_key(name, self._renamings, [], prefix, self._state)[0])
        return self._known[name]

    @cached_property
    def _renamings(self) -> list[Any]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        return [t for t in get_model_conversion_mapping(self._model) if isinstance(t, WeightRenaming)]

    @cached_property
    def _state(self) -> dict[str, Any]:
        return self._model.state_dict()

    @cached_property
    def _on_disk(self) -> dict[str, str]:
        """Model's name -> checkpoint's name, where they differ."""
        return {home: name for name in self._tensors if (home := self._in_model(name)) != name and home in self._state}
