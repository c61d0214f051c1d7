"""Dividing a plan into shards: what lies in which file.

Invariant: a module never spans files, every tensor lies in one, assets lie in the first, and names run in their natural
order (layers.2 before layers.10), so that a block's modules lie together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...formats import naming
from ...formats.container import TensorSpec
from ...formats.errors import OptionError
from ...formats.sharding import ShardContent
from ..plan import Plan


@dataclass(frozen=True)
class _Unit:
    """What cannot be divided: a module's tensors, or one other tensor."""

    specs: list[TensorSpec]
    source: str | None = None

    @property
    def n_bytes(self) -> int:
        return sum(spec.n_bytes for spec in self.specs)


def contents_by_size(plan: Plan, most_bytes: int) -> list[ShardContent]:
    """Return shards of at most ``most_bytes`` of tensors, except where one module or tensor is larger."""
    assets, units = _units(plan)
    shards, used = [[assets]], assets.n_bytes
    for unit in units:
        if used and used + unit.n_bytes > most_bytes:
            shards.append([])
            used = 0
        shards[-1].append(unit)
        used += unit.n_bytes
    return [_content(units) for units in shards]


def contents_in_parts(plan: Plan, n_parts: int) -> list[ShardContent]:
    """Return ``n_parts`` shards with about the same work each.

    Raises:
        OptionError: there are fewer modules than parts.
    """
    if n_parts > len(plan.modules):
        raise OptionError(f"{n_parts} parts", needed=f"at most {len(plan.modules)}, the number of modules to pack")
    assets, units = _units(plan)
    weights = {module.entry.source_tensor: module.entry.n_weights for module in plan.modules}
    total, done, n_left = sum(weights.values()), 0, len(weights)
    shards = [[assets]]
    for unit in units:
        if unit.source is not None:
            is_due = done * n_parts >= total * len(shards) or n_left <= n_parts - len(shards)
            if is_due and any(u.source for u in shards[-1]) and len(shards) < n_parts:
                shards.append([])
            done, n_left = done + weights[unit.source], n_left - 1
        shards[-1].append(unit)
    return [_content(units) for units in shards]


def _units(plan: Plan) -> tuple[_Unit, list[_Unit]]:
    """Return the assets, and everything else in natural order."""
    units = {m.entry.source_tensor: _Unit(m.specs(), m.entry.source_tensor) for m in plan.modules}
    inside = {spec.name for unit in units.values() for spec in unit.specs}
    assets = []
    for spec in plan.specs():
        if spec.name.startswith(naming.ASSET_PREFIX):
            assets.append(spec)
        elif spec.name not in inside:
            units[spec.name] = _Unit([spec])
    return _Unit(assets), [units[name] for name in sorted(units, key=lambda name: list(_natural(name)))]


def _natural(name: str) -> Iterator[tuple[int, str]]:
    """Yield what names are sorted by, numbers by their size."""
    for piece in re.split(r"(\d+)", name):
        yield (int(piece), "") if piece.isdecimal() else (-1, piece)


def _content(units: Sequence[_Unit]) -> ShardContent:
    specs = tuple(spec for unit in units for spec in unit.specs)
    return ShardContent(specs, frozenset(unit.source for unit in units if unit.source))
