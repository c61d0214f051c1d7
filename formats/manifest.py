"""The manifest: what a .salr file says about itself, as canonical JSON.

Invariant: parsing checks every type and range that does not need another tensor; unknown keys are ignored, so a later
version may add some. A feature that a reader must know to be right is named in ``required_features``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from .dtypes import FLOAT_ENCODINGS
from .errors import FormatError, VersionError
from .values import ENCODINGS, QUANTIZED_BITS

FORMAT_VERSION = "1"
MANIFEST_NAME = "salr.manifest"
RESIDUAL = "residual"
PATTERNS = ("unstructured", "2:4", "dense")
VALUES_FROM = ("source", "source_minus_residual", "refit")
KNOWN_FEATURES: frozenset[str] = frozenset()
FATES = ("packed", "kept", "folded", "dropped")
_TOO_LARGE = 2**63
_MOST_SHARDS = 100_000

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]+")
_Value = TypeVar("_Value")
Json = dict[str, Any]


@dataclass(frozen=True)
class AdapterEntry:
    """One low-rank pair of a module: y += scaling * lora_B (lora_A x)."""

    name: str
    rank: int
    scaling: float
    origin: str
    alpha: float | None = None
    converted: str | None = None


@dataclass(frozen=True)
class ErrorEntry:
    """Squared Frobenius errors as shares of ``energy`` = |W0|^2, and the theorem's bound on ``residual``.

    ``output`` is the squared error of the module's output on calibration data as a share of the output, None without.
    """

    energy: float
    mask: float
    residual: float
    bound: float
    output: float | None = None


#: of a module whose weights are all kept, or whose error is not measured yet
NO_ERROR = ErrorEntry(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class ModuleEntry:
    """A packed module; ``shape`` is (N, K) or, for stacked experts, (E, N, K)."""

    source_tensor: str
    source_shape: tuple[int, ...]
    transposed: bool
    shape: tuple[int, ...]
    dtype: str
    nnz: int
    pattern: str
    encoding: str
    values_from: str
    error: ErrorEntry = NO_ERROR
    adapters: tuple[AdapterEntry, ...] = ()
    group_size: int | None = None

    @property
    def n_weights(self) -> int:
        """Weights of the module before pruning."""
        return math.prod(self.shape)

    @property
    def n_rows(self) -> int:
        """Rows over all experts."""
        return math.prod(self.shape[:-1])

    @property
    def n_columns(self) -> int:
        """in_features K."""
        return self.shape[-1]


@dataclass(frozen=True)
class LedgerLine:
    """What became of one input tensor or adapter key."""

    key: str
    fate: str
    reason: str
    file: str = ""


@dataclass(frozen=True)
class Manifest:
    """Everything a .salr file records besides its tensors."""

    generator: str
    modules: Mapping[str, ModuleEntry]
    checksums: Mapping[str, str]
    ledger: tuple[LedgerLine, ...] = ()
    options: Json = field(default_factory=dict)
    source: Json = field(default_factory=dict)
    environment: Json = field(default_factory=dict)
    required_features: tuple[str, ...] = ()
    #: (i, n): this is the i-th of the n files of one model, which share ``set_id``
    shard: tuple[int, int] | None = None
    set_id: str | None = None

    def to_json(self) -> bytes:
        """Return canonical JSON: sorted keys, no spaces, shortest round-trip floats, UTF-8."""
        value = asdict(self)
        if self.shard is None:
            del value["shard"], value["set_id"]
        for entry in value["modules"].values():
            if entry["error"]["output"] is None:
                del entry["error"]["output"]
        return canonical_json(value)


def canonical_json(value: object) -> bytes:
    """Return ``value`` as canonical JSON bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def is_adapter_name(name: str) -> bool:
    """Tell whether ``name`` may name an adapter: letters, digits, ``_`` and ``-`` only."""
    return _ADAPTER_NAME.fullmatch(name) is not None


class _Fields:
    """Typed access to a JSON object; each complaint names the file and the key."""

    def __init__(self, value: object, where: str, path: str) -> None:
        self.where, self.path = where, path
        if not isinstance(value, dict):
            raise self.error("", f"{type(value).__name__}", "an object")
        self.value: Json = value

    def error(self, key: str, found: str, needed: str) -> FormatError:
        place = f"{self.where}.{key}" if key else self.where
        return FormatError(
            f"manifest {place} is {found[:80]}", path=self.path, needed=needed, fix="make the file again"
        )

    def get(self, key: str, kind: type[_Value]) -> _Value:
        value = self.value.get(key)
        if kind is float and type(value) is int:
            # an integer beyond the floats counts as infinite, and is refused below
            value = float(value) if abs(value) < 10**308 else math.inf
        if type(value) is not kind:
            raise self.error(key, repr(value), kind.__name__)
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(key, repr(value), "a finite number")
        return value

    def maybe(self, key: str, kind: type[_Value]) -> _Value | None:
        return None if self.value.get(key) is None else self.get(key, kind)

    def count(self, key: str, least: int = 0) -> int:
        value = self.get(key, int)
        if not least <= value < _TOO_LARGE:
            raise self.error(key, str(value), f"at least {least} and less than 2**63")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.get(key, str)
        if value not in choices:
            raise self.error(key, repr(value), "one of " + ", ".join(choices))
        return value

    def shape(self, key: str) -> tuple[int, ...]:
        value = self.get(key, list)
        if not value or not all(type(extent) is int and 0 < extent < _TOO_LARGE for extent in value):
            raise self.error(key, repr(value), "a list of positive integers less than 2**63")
        return tuple(value)


def why_not_json(value: object) -> str | None:
    """Return why a manifest cannot hold ``value``, None where it can."""
    try:
        json.loads(canonical_json(value), object_pairs_hook=_unique_keys)
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    return None


def parse_manifest(data: bytes, path: str) -> Manifest:
    """Parse and check the manifest of the file at ``path``.

    Raises:
        FormatError: it is not JSON, or a key has the wrong type or range.
        VersionError: it requires a feature this version does not know.
    """
    try:
        value = json.loads(data, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the manifest is not JSON ({error})", path=path, fix="make the file again") from error
    top = _Fields(value, "", path)
    features = tuple(str(feature) for feature in top.get("required_features", list))
    unknown = sorted(set(features) - KNOWN_FEATURES)
    if unknown:
        raise VersionError(f"the file requires feature {', '.join(unknown)}", path=path, fix="upgrade salr")
    modules = {name: parse_module(entry, name, path) for name, entry in top.get("modules", dict).items()}
    _check_source_tensors(modules, top)
    return Manifest(
        generator=top.get("generator", str),
        modules=modules,
        checksums={key: str(digest) for key, digest in top.get("checksums", dict).items()},
        ledger=tuple(_parse_ledger_line(line, path) for line in top.get("ledger", list)),
        options=top.get("options", dict),
        source=top.get("source", dict),
        environment=top.get("environment", dict),
        required_features=features,
        shard=_parse_shard(top),
        set_id=top.maybe("set_id", str),
    )


def _parse_shard(top: _Fields) -> tuple[int, int] | None:
    shard = top.maybe("shard", list)
    if shard is None:
        return None
    if len(shard) != 2 or not all(type(n) is int for n in shard) or not 1 <= shard[0] <= shard[1] < _MOST_SHARDS:
        raise top.error("shard", repr(shard), "[i, n] with 1 <= i <= n")
    top.get("set_id", str)
    return shard[0], shard[1]


def _check_source_tensors(modules: Mapping[str, ModuleEntry], top: _Fields) -> None:
    """Refuse two modules made from one tensor: unpacking would lose one of them."""
    owners: dict[str, str] = {}
    for name, entry in modules.items():
        first = owners.setdefault(entry.source_tensor, name)
        if first != name:
            found = f"{entry.source_tensor!r}, as in module {first}"
            raise top.error(f"modules.{name}.source_tensor", found, "a tensor of its own")


def _unique_keys(pairs: list[tuple[str, Any]]) -> Json:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object holds a key twice")
    return found


def parse_module(value: object, name: str, path: str) -> ModuleEntry:
    """Parse and check the entry of module ``name``; ``path`` is what errors name.

    Raises:
        FormatError: a key has the wrong type or range.
    """
    fields = _Fields(value, f"modules.{name}", path)
    shape, source_shape, transposed = _parse_shapes(fields)
    encoding = fields.choice("encoding", ENCODINGS)
    nnz = fields.count("nnz")
    if nnz > math.prod(shape):
        raise fields.error("nnz", str(nnz), f"at most {math.prod(shape)}")
    error = _Fields(fields.value.get("error"), f"modules.{name}.error", path)
    return ModuleEntry(
        source_tensor=fields.get("source_tensor", str),
        source_shape=source_shape,
        transposed=transposed,
        shape=shape,
        dtype=fields.choice("dtype", tuple(FLOAT_ENCODINGS.values())),
        nnz=nnz,
        pattern=fields.choice("pattern", PATTERNS),
        encoding=encoding,
        values_from=fields.choice("values_from", VALUES_FROM),
        error=ErrorEntry(
            energy=error.get("energy", float),
            mask=error.get("mask", float),
            residual=error.get("residual", float),
            bound=error.get("bound", float),
            output=error.maybe("output", float),
        ),
        adapters=_parse_adapters(fields),
        group_size=_parse_group_size(fields, encoding),
    )


def _parse_shapes(fields: _Fields) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Return shape, source_shape and transposed, which have to agree."""
    shape, source_shape, transposed = (
        fields.shape("shape"),
        fields.shape("source_shape"),
        fields.get("transposed", bool),
    )
    if len(shape) not in (2, 3):
        raise fields.error("shape", repr(list(shape)), "[N, K] or [E, N, K]")
    expected = (*shape[:-2], shape[-1], shape[-2]) if transposed else shape
    if source_shape != expected:
        raise fields.error("source_shape", repr(list(source_shape)), f"{list(expected)}, as shape and transposed say")
    return shape, source_shape, transposed


def _parse_group_size(fields: _Fields, encoding: str) -> int | None:
    group_size = fields.maybe("group_size", int)
    if (encoding in QUANTIZED_BITS) != (group_size is not None and 0 < group_size < _TOO_LARGE):
        raise fields.error("group_size", repr(group_size), "a positive integer exactly when values are int8 or nf4")
    return group_size


def _parse_adapters(fields: _Fields) -> tuple[AdapterEntry, ...]:
    adapters = tuple(
        _parse_adapter(adapter, f"{fields.where}.adapters[{index}]", fields.path)
        for index, adapter in enumerate(fields.get("adapters", list))
    )
    if len({adapter.name for adapter in adapters}) != len(adapters):
        raise fields.error("adapters", "holding one name twice", "each name once")
    return adapters


def _parse_adapter(value: object, where: str, path: str) -> AdapterEntry:
    fields = _Fields(value, where, path)
    name = fields.get("name", str)
    if not is_adapter_name(name):
        raise fields.error("name", repr(name), "letters, digits, '_' and '-' only")
    return AdapterEntry(
        name=name,
        rank=fields.count("rank", least=1),
        scaling=fields.get("scaling", float),
        origin=fields.get("origin", str),
        alpha=fields.maybe("alpha", float),
        converted=fields.maybe("converted", str),
    )


def _parse_ledger_line(value: object, path: str) -> LedgerLine:
    fields = _Fields(value, "ledger[]", path)
    return LedgerLine(
        key=fields.get("key", str),
        fate=fields.choice("fate", FATES),
        reason=fields.get("reason", str),
        file=fields.get("file", str),
    )
