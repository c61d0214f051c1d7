"""How single modules are stored: their settings, presets of them, and overrides by pattern from a command line or file.

Invariant: settings are valid in themselves; what depends on a module's shape is checked by the plan.
"""

from __future__ import annotations

import fnmatch
import math
import re
import sys
from dataclasses import dataclass, fields, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..formats.errors import OptionError
from ..formats.values import ENCODINGS, QUANTIZED_BITS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_RANK = 64
MAX_SPARSITY = 0.95
MAX_GROUP_SIZE = 2**31 - 1
SOURCE = "source"
VALUES = (SOURCE, *ENCODINGS)
ADAPTER_VALUES = (SOURCE, "int8")


@dataclass(frozen=True)
class ModuleOptions:
    """How one module is pruned and stored.

    Args:
        sparsity: fraction removed, 0 to 0.95.
        rank: of the residual adapter; 0 for none; None for ``default_rank``. One above min(N, K) is refused.
        values: encoding of kept weights: ``source`` for the checkpoint's own dtype, a float type, int8 or nf4.
        group_size: columns that share a scale, for int8 and nf4.
        adapter_values: the residual's storage, ``source`` or ``int8``; trained adapters always stay exact.
        default_rank: the rank that nobody asked for, as a preset has one; min(N, K) where that is less.
    """

    sparsity: float = 0.5
    rank: int | None = None
    values: str = SOURCE
    group_size: int = 128
    adapter_values: str = SOURCE
    default_rank: int = DEFAULT_RANK

    def __post_init__(self) -> None:
        if not (isinstance(self.sparsity, (int, float)) and 0 <= self.sparsity <= MAX_SPARSITY):
            raise OptionError(f"sparsity {self.sparsity}", needed=f"0 to {MAX_SPARSITY} (the fraction removed)")
        for rank in (self.rank, self.default_rank):
            if rank is not None and (type(rank) is not int or rank < 0):
                raise OptionError(f"rank {rank}", needed="an integer, 0 or more")
        for name, value, choices in (
            ("values", self.values, VALUES),
            ("adapter_values", self.adapter_values, ADAPTER_VALUES),
        ):
            if value not in choices:
                raise OptionError(f"{name} {value!r}", needed="one of " + ", ".join(choices))
        if type(self.group_size) is not int or not 1 <= self.group_size <= MAX_GROUP_SIZE:
            raise OptionError(
                f"group_size {self.group_size!r}", needed=f"an integer, 1 or more, up to {MAX_GROUP_SIZE}"
            )

    @property
    def is_quantized(self) -> bool:
        """Values are int8 or nf4, with scales."""
        return self.values in QUANTIZED_BITS

    def n_removed(self, n_elements: int) -> int:
        """Return floor(sparsity * n) in decimal arithmetic, so that 0.7 of 10 is 7."""
        return math.floor(Decimal(repr(float(self.sparsity))) * n_elements)


#: recommended recipes: see docs/choosing.md for their sizes and qualities
PRESETS = {
    "exact": ModuleOptions(),
    "balanced": ModuleOptions(sparsity=0.0, default_rank=0, values="int8"),
    "small": ModuleOptions(sparsity=0.0, default_rank=16, values="nf4", adapter_values="int8"),
}


def module_options(preset: str | None = None, **settings: Any) -> ModuleOptions:
    """Return a preset's settings, or the defaults, with those of ``settings`` that are not None in their place.

    Raises:
        OptionError: no such preset, or a setting is out of range.
    """
    if preset is not None and preset not in PRESETS:
        raise OptionError(f"preset {preset!r}", needed="one of " + ", ".join(PRESETS))
    chosen = {name: value for name, value in settings.items() if value is not None}
    return replace(PRESETS[preset] if preset else ModuleOptions(), **chosen)


#: names of the settings, and how ``--set`` reads each
_PARSERS: dict[str, type] = {"sparsity": float, "rank": int, "values": str, "group_size": int, "adapter_values": str}
SETTINGS = tuple(_PARSERS)
#: of what is recorded, those that make up the defaults of every module
RECORDED = tuple(field.name for field in fields(ModuleOptions))


def check_rank(rank: int | None, most: int, tensor: str, fix: str) -> None:
    """Refuse a rank that no update of a matrix can have: beyond min(N, K), ``most``, it costs memory and adds nothing.

    Raises:
        OptionError: see above; ``fix`` is what to do.
    """
    if rank is not None and rank > most:
        raise OptionError(f"rank {rank}", tensor=tensor, needed=f"at most min(N, K) = {most}", fix=fix)


def matches(pattern: str, name: str) -> bool:
    """Tell whether a glob, or a regular expression after ``re:``, matches a whole module name.

    Raises:
        OptionError: the regular expression is invalid.
    """
    if not pattern.startswith("re:"):
        return fnmatch.fnmatchcase(name, pattern)
    try:
        return re.fullmatch(pattern[3:], name) is not None
    except re.error as error:
        raise OptionError(f"pattern {pattern!r} is no regular expression ({error})") from error


def parse_override(text: str) -> tuple[str, dict[str, Any]]:
    """Parse ``PATTERN k=v,k=v``.

    Raises:
        OptionError: it has another form, or a value is no number.
    """
    pattern, _, settings = text.strip().partition(" ")
    parsed: dict[str, Any] = {}
    for part in filter(None, settings.replace(" ", "").split(",")):
        key, _, value = part.partition("=")
        try:
            parsed[key] = _PARSERS.get(key, str)(value)
        except ValueError as error:
            needed = "an integer" if _PARSERS.get(key) is int else "a number"
            raise OptionError(f"--set {text!r}: {part!r}", needed=f"{key}= and {needed}") from error
    if not parsed:
        raise OptionError(f"--set {text!r}", needed="'PATTERN key=value,key=value'")
    return pattern, parsed


def read_recipe(path: Path) -> tuple[tuple[str, dict[str, Any]], ...]:
    """Read overrides from TOML: a table for each pattern, its keys the settings, later tables winning.

    Raises:
        OptionError: the file is missing, is not TOML, or a top-level key is no table.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"cannot be read ({error.strerror})", path=path) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"is not TOML ({error})", path=path) from error
    for pattern, settings in tables.items():
        if not isinstance(settings, dict):
            raise OptionError(f"key {pattern!r} is no table", path=path, needed='["PATTERN"] with sparsity = or rank =')
    return tuple(tables.items())
