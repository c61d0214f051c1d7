"""layer_replication: a base whose layers are stacked several times, so that each copy has an adapter of its own.

Invariant: a copy is the base's own tensor under another number; layers that no range names are dropped with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ...formats.errors import AdapterError
from ..sources.architecture import Architecture
from ..sources.checkpoint import Checkpoint
from ..sources.derived import Changes, DerivedCheckpoint
from .source import Adapter

_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")


def with_replicated_layers(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Checkpoint:
    """Return the base that the adapters stand on: with its layers in the order that they ask for.

    Raises:
        AdapterError: two adapters ask for different orders, a layer does not exist, or the layers cannot be found.
    """
    wanted = [adapter for adapter in adapters if adapter.settings.layer_ranges()]
    if not wanted:
        return checkpoint
    adapter, ranges = wanted[0], wanted[0].settings.layer_ranges() or []
    if any(other.settings.layer_ranges() != ranges for other in adapters):
        raise AdapterError(
            "layer_replication repeats layers, and another adapter does not",
            path=adapter.directory,
            needed="the same layers for all adapters",
            fix="convert them one by one",
        )
    architecture = Architecture(checkpoint)
    if architecture.blocks is None:
        raise AdapterError(
            f"layer_replication on {checkpoint.architecture}, whose layers cannot be found",
            path=adapter.directory,
            needed="a model class of transformers with a list of layers",
        )
    name, count = architecture.blocks
    last = max(end for _, end in ranges) - 1
    if last >= count:
        raise AdapterError(f"layer_replication names layer {last}", path=adapter.directory, needed=f"0 to {count - 1}")
    order = [layer for start, end in ranges for layer in range(start, end)]
    changes = Changes(config=_config(checkpoint.config, order, count))
    numbered = re.compile(rf"{re.escape(name)}\.(\d+)(\..+)")
    for tensor in checkpoint.tensors:
        match = next(filter(None, map(numbered.fullmatch, architecture.spellings(tensor))), None)
        if match is not None:
            _replicate(changes, tensor, int(match[1]), match[2], order)
    return DerivedCheckpoint(checkpoint, changes)


def _replicate(changes: Changes, name: str, layer: int, rest: str, order: list[int]) -> None:
    """Put a tensor of one layer at each place that the layer has in the new order."""
    before = name.removesuffix(f"{layer}{rest}")
    changes.left_out[name] = ("dropped", f"layer_replication leaves layer {layer} out")
    changes.copies |= {f"{before}{new}{rest}": name for new, old in enumerate(order) if old == layer}


def _config(config: dict[str, Any], order: list[int], count: int) -> dict[str, Any]:
    changed: dict[str, Any] = {key: len(order) for key in _COUNTS if config.get(key) == count}
    for key in _PER_LAYER:
        if isinstance(config.get(key), list) and len(config[key]) == count:
            changed[key] = [config[key][layer] for layer in order]
    return changed
