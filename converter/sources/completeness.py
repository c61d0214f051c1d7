"""Whether a checkpoint holds the weights that its config.json asks for, each in the shape it asks for.

Invariant: the answer is that of transformers' own loading, found from names and shapes alone: missing are the
parameters that ``from_pretrained`` would make up, misshapen the tensors that it would refuse, surplus those that it
would warn of. What is tied to a weight that is there is not missing, nor what the class itself says may be; buffers
may be, since a class has values for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from ...formats.errors import SourceError
from .checkpoint import Checkpoint
from .loading import Loading, Place, Shape

_N_NAMED = 3


def check_weights(checkpoint: Checkpoint, model: Any) -> list[str]:
    """Refuse a checkpoint that does not hold the weights of its class; return a line on what it holds besides.

    Args:
        model: of that class, on the meta device.

    Raises:
        SourceError: weights are missing, or have another shape.
    """
    compared = WeightComparison(model, {name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    described = f"{type(model).__name__} that config.json describes"
    if missing := compared.missing():
        raise SourceError(
            f"lacks {_listed(missing)}",
            path=checkpoint.location,
            needed=f"every weight of the {described}",
            fix="download or save the checkpoint again, or correct config.json (its layers, its architectures)",
        )
    if misshapen := compared.misshapen():
        name, needed = next(iter(misshapen.items()))
        tensor, count = checkpoint.tensors[name], f"{len(misshapen)} tensors differ: " if len(misshapen) > 1 else ""
        raise SourceError(
            f"shape {list(tensor.shape)}",
            path=checkpoint.directory / tensor.file,
            tensor=name,
            needed=f"{needed} for the {described}",
            fix=f"{count}give the config.json that belongs to these weights",
        )
    if surplus := compared.surplus():
        count = f"{len(surplus)} tensor{'s' if len(surplus) > 1 else ''}"
        return [
            f"The {described} has no place for {count}: {_listed(surplus)}. The file carries them along, the "
            "model does without them. If they belong to it, correct config.json (its layers, its architectures)."
        ]
    return []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _N_NAMED} more" if len(names) > _N_NAMED else ""
    return ", ".join(names[:_N_NAMED]) + more


class WeightComparison:
    """The tensors of a checkpoint beside those that its class asks for.

    Args:
        model: a transformers model on the meta device.
        shapes: of the checkpoint's tensors, by name.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Shape]) -> None:
        self._loading, self._shapes = Loading(model), shapes
        self._places = {name: self._loading.places(name) for name in shapes}
        self._saved = self._loading.saved_shapes()

    def missing(self) -> list[str]:
        """Return what the checkpoint lacks, by the names that transformers would save it under."""
        loading = self._loading
        held = Counter(place for places in self._places.values() for place in places)
        wanted = {name: self._places.get(name) or loading.places(name) for name in self._saved}
        n_wanted = Counter(place for places in wanted.values() for place in places)
        sources: dict[str, set[Place]] = {}
        for place in held:
            sources.setdefault(loading.untied(place.tensor), set()).add(place)

        def is_held(place: Place) -> bool:
            """Tell whether all parts of a tensor are there, or it is there in another form or under a tied name."""
            others = sources.get(loading.untied(place.tensor), set()) - loading.beside(place)
            return held[place] >= n_wanted[place] or bool(others) or loading.is_optional(place.tensor)

        lacking = [name for name, places in wanted.items() if not all(is_held(place) for place in places)]
        spelled = {loading.renamed(name) for name in self._shapes} if lacking else set()
        return [name for name in lacking if loading.renamed(name) not in spelled]

    def misshapen(self) -> dict[str, str]:
        """Return what is needed instead of each tensor of another shape; what is not exactly known comes last."""
        found: dict[str, Shape] = {}
        parts: dict[str, dict[str, str]] = {}
        for name, places in self._places.items():
            for tensor, pattern in places[:1]:
                if pattern is not None:
                    parts.setdefault(tensor, {})[name] = pattern
                elif self._shapes[name] != self._loading.shape(tensor):
                    found[name] = self._loading.shape(tensor)
        inexact = {}
        for tensor, patterns in parts.items():
            others = self._other_shapes(patterns)
            if others and not self._loading.fits(tensor, patterns, self._shapes):
                known = {name: shape for name, shape in others.items() if shape is not None}
                found |= known
                if not known:
                    inexact[next(iter(others))] = f"a part of {tensor} {list(self._loading.shape(tensor))}"
        return {name: str(list(shape)) for name, shape in found.items()} | inexact

    def surplus(self) -> list[str]:
        """Return the tensors that the class has no place for, but for those of which it says so itself."""
        return self._loading.unexpected(name for name, places in self._places.items() if not places)

    def _other_shapes(self, names: Iterable[str]) -> dict[str, Shape | None]:
        """Return the shape that transformers would save each tensor in, where it differs; None for none of its name."""
        saved = {
            name: self._saved[name] if name in self._saved else self._respelled.get(self._loading.renamed(name))
            for name in names
        }
        return {name: shape for name, shape in saved.items() if shape != self._shapes[name]}

    @cached_property
    def _respelled(self) -> dict[str, Shape]:
        return {self._loading.renamed(name): shape for name, shape in self._saved.items()}
