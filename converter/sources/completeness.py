"""Whether a checkpoint holds every weight that its config.json asks for.

Invariant: the answer is that of transformers' own loading, found from names alone: missing are the parameters that
``from_pretrained`` would make up. What is tied to a weight that is there is not, nor what the class itself says may be
missing; buffers may be, since a class has values for them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from ...formats.errors import SourceError
from .checkpoint import Checkpoint

_N_NAMED = 3


class _Place(NamedTuple):
    """A tensor of the model, and the pattern of the conversion that makes it from others; None for none."""

    tensor: str
    pattern: str | None


def require_weights(checkpoint: Checkpoint, model: Any) -> None:
    """Refuse a checkpoint that lacks weights of its class, ``model`` on the meta device.

    Raises:
        SourceError: see above.
    """
    missing = missing_weights(model, checkpoint.tensors)
    if missing:
        more = f" and {len(missing) - _N_NAMED} more" if len(missing) > _N_NAMED else ""
        raise SourceError(
            f"lacks {', '.join(missing[:_N_NAMED])}{more}",
            path=checkpoint.location,
            needed=f"every weight of the {type(model).__name__} that config.json describes",
            fix="download or save the checkpoint again, or correct config.json (its layers, its architectures)",
        )


def missing_weights(model: Any, names: Iterable[str]) -> list[str]:
    """Return what a checkpoint with tensors of these names lacks, by the names that transformers would save it under.

    Args:
        model: a transformers model on the meta device.
    """
    loading, names = _Loading(model), list(names)
    held = Counter(place for name in names for place in loading.places(name))
    wanted = {name: loading.places(name) for name in _saved_names(model)}
    n_wanted = Counter(place for places in wanted.values() for place in places)
    sources: dict[str, set[_Place]] = {}
    for place in held:
        sources.setdefault(loading.untied(place.tensor), set()).add(place)

    def is_held(place: _Place) -> bool:
        """Tell whether all parts of a tensor are there, or it is there in another form or under a tied name."""
        others = sources.get(loading.untied(place.tensor), set()) - loading.beside(place)
        return held[place] >= n_wanted[place] or bool(others) or loading.is_optional(place.tensor)

    lacking = [name for name, places in wanted.items() if not all(is_held(place) for place in places)]
    spelled = {loading.renamed(name) for name in names} if lacking else set()
    return [name for name in lacking if loading.renamed(name) not in spelled]


def _saved_names(model: Any) -> list[str]:
    """Return what the parameters of a model are called in a checkpoint that transformers saves, without tied ones."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in tied}
    return list(revert_weight_conversion(model, parameters))


class _Loading:
    """Where transformers puts the tensors of a checkpoint while it loads them into ``model``."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
        self._converters = [t for t in transforms if isinstance(t, WeightConverter)]
        self._by_pattern = {pattern: t for t in self._converters for pattern in t.source_patterns}
        self._prefix, self._state = model.base_model_prefix, model.state_dict()
        self._tied = getattr(model, "all_tied_weights_keys", None) or {}
        optional = getattr(model, "_keys_to_ignore_on_load_missing", None)
        self._optional = re.compile("|".join(f"({pattern})" for pattern in optional)) if optional else None

    def places(self, name: str) -> list[_Place]:
        """Return the tensors of the model that tensor ``name`` of a checkpoint is, or is a part of."""
        found, pattern = self._rename(name, self._renamings, self._converters)
        if found not in self._state and name in self._state:
            found, pattern = self._rename(name, [], [])
        targets = [found]
        if pattern is not None:
            first, *others = self._by_pattern[pattern].target_patterns
            targets += [found.replace(first, other) for other in others]
        return [_Place(target, pattern) for target in targets if target in self._state]

    def renamed(self, name: str) -> str:
        """Return the name of a checkpoint's tensor in the spelling that all checkpoints share."""
        return self._rename(name, self._renamings, [])[0]

    def _rename(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, self._prefix, self._state)
        return found

    def untied(self, tensor: str) -> str:
        """Return the tensor of the model that one of it is tied to, or itself."""
        return str(self._tied.get(tensor, tensor))

    def beside(self, place: _Place) -> set[_Place]:
        """Return the places that only together make up a tensor of the model."""
        patterns = self._by_pattern[place.pattern].source_patterns if place.pattern is not None else [None]
        return {_Place(place.tensor, pattern) for pattern in patterns}

    def is_optional(self, tensor: str) -> bool:
        """Tell whether the class does without a tensor."""
        return self._optional is not None and self._optional.search(tensor) is not None
