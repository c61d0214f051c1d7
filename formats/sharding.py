"""A model in several .salr files: their names, their manifests, the index beside them, and reading them as one.

Invariant: each shard is a valid .salr file of its own, a module lies in one shard, and ``set_id`` is a digest of what
all shards of a set agree on, the tensors of each included; the index says nothing that the shards do not say too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from . import naming
from .container import Container, StoredTensor, TensorSpec
from .dtypes import Array
from .errors import FormatError, OutputError
from .manifest import MANIFEST_NAME, Manifest, canonical_json
from .opening import open_checked
from .validation import digest

INDEX_NAME = "model.salr.index.json"
_LARGEST_INDEX = 1 << 28
_REMAKE = "copy or make the shards again"


@dataclass(frozen=True)
class ShardContent:
    """What one shard holds: its tensors, and the names that those packed in it had in the source."""

    specs: tuple[TensorSpec, ...]
    sources: frozenset[str]

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return [spec.name for spec in self.specs]


def shard_name(position: int, count: int) -> str:
    """Return the file name of shard ``position`` (from 1) of ``count``."""
    return f"model-{position:05d}-of-{count:05d}.salr"


def shard_manifests(whole: Manifest, contents: Sequence[ShardContent]) -> list[Manifest]:
    """Return the manifest of each shard, without checksums, from that of the whole model.

    A ledger line of what no shard holds under its name (an adapter's key, what was dropped) goes to the first.
    """
    set_id = _set_id(whole, [content.names() for content in contents])
    home = {name: i for i, content in enumerate(contents) for name in (*content.names(), *content.sources)}
    manifests = []
    for index, content in enumerate(contents):
        held = set(content.names())
        modules = {name: entry for name, entry in whole.modules.items() if naming.values_name(name) in held}
        ledger = tuple(line for line in whole.ledger if home.get(line.key, 0) == index)
        shard = (index + 1, len(contents))
        manifests.append(replace(whole, modules=modules, ledger=ledger, shard=shard, set_id=set_id, checksums={}))
    return manifests


def _set_id(whole: Manifest, names: Iterable[Iterable[str]]) -> str:
    facts = [whole.generator, whole.options, whole.source, whole.environment, list(whole.required_features)]
    return digest(canonical_json([*facts, [sorted(tensors) for tensors in names]]))


def merged_manifest(manifests: Sequence[Manifest]) -> Manifest:
    """Return the manifest of the whole model from those of all its shards, in their order."""
    ledger = sorted(chain.from_iterable(m.ledger for m in manifests), key=lambda line: (line.file, line.key))
    return replace(
        manifests[0],
        modules={name: entry for manifest in manifests for name, entry in manifest.modules.items()},
        checksums={name: stored for manifest in manifests for name, stored in manifest.checksums.items()},
        ledger=tuple(ledger),
        shard=None,
        set_id=None,
    )


def index_json(tensors: Mapping[str, str], total_bytes: int) -> bytes:
    """Return the index of shards, as Hugging Face spells it; ``tensors`` maps each tensor to its file."""
    return canonical_json({"metadata": {"total_size": total_bytes}, "weight_map": dict(tensors)}) + b"\n"


class ShardSet:
    """The shards of one model, read as if they were one container.

    Raises:
        FormatError: shards are missing, come from different runs, or hold one name twice.
    """

    def __init__(self, path: Path, shards: Sequence[tuple[Container, Manifest]]) -> None:
        self.path = path
        ordered = _in_order(path, shards)
        self.containers = [container for container, _ in ordered]
        self.manifest = merged_manifest([manifest for _, manifest in ordered])
        self.tensors: dict[str, StoredTensor] = {}
        self._homes: dict[str, Container] = {}
        for container in self.containers:
            for name, tensor in container.tensors.items():
                if name == MANIFEST_NAME:
                    continue
                if name in self.tensors:
                    found = f"stands in {self._homes[name].path.name} too"
                    raise FormatError(found, path=container.path, tensor=name, fix=_REMAKE)
                self.tensors[name], self._homes[name] = tensor, container
        if _set_id(self.manifest, [set(c.tensors) - {MANIFEST_NAME} for c in self.containers]) != ordered[0][1].set_id:
            raise FormatError("the shards are not those of their set_id", path=path, fix=_REMAKE)
        self.n_bytes = sum(container.n_bytes for container in self.containers)
        self.identity = tuple(chain.from_iterable(container.identity for container in self.containers))

    def path_of(self, name: str) -> Path:
        """Return the shard that holds a tensor, or the set's own path."""
        return self._homes[name].path if name in self._homes else self.path

    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes without a copy.

        Raises:
            FormatError: there is no such tensor.
        """
        return self._home(name).raw(name)

    def array(self, name: str) -> Array:
        """Return a tensor as a read-only array without a copy, as ``Container.array`` does."""
        return self._home(name).array(name)

    def _home(self, name: str) -> Container:
        if name not in self._homes:
            raise FormatError("there is no such tensor", path=self.path, tensor=name)
        return self._homes[name]

    def index(self) -> bytes:
        """Return the index that belongs to these shards."""
        files = {name: container.path.name for name, container in self._homes.items()}
        return index_json(files, sum(tensor.n_bytes for tensor in self.tensors.values()))


def _in_order(path: Path, shards: Sequence[tuple[Container, Manifest]]) -> list[tuple[Container, Manifest]]:
    """Return the shards by number, exactly one of each."""
    by_number: dict[int, tuple[Container, Manifest]] = {}
    for container, manifest in shards:
        if manifest.shard is None:
            raise FormatError("is no shard: its manifest names no set", path=container.path, needed="shards of one set")
        first = shards[0][1]
        if manifest.set_id != first.set_id or (first.shard and manifest.shard[1] != first.shard[1]):
            raise FormatError(
                f"belongs to another set than {shards[0][0].path.name}",
                path=container.path,
                needed="shards made from one input, with the same options, versions and kind of device",
                fix="make them again",
            )
        if manifest.shard[0] in by_number:
            raise FormatError(f"shard {manifest.shard[0]} is given twice", path=container.path, fix="give it once")
        by_number[manifest.shard[0]] = container, manifest
    count = shards[0][1].shard[1] if shards and shards[0][1].shard else 0
    missing = [number for number in range(1, count + 1) if number not in by_number]
    if missing or not shards:
        found = f"shard {missing[0]} of {count} is missing" if shards else "there are no shards"
        raise FormatError(found, path=path, needed="every shard", fix="copy it beside the others, or make it")
    return [by_number[number] for number in range(1, count + 1)]


def complete_set(folder: Path) -> bool:
    """Write the index of the shards in ``folder`` if all of one set are there; tell whether they are.

    Raises:
        FormatError: shards of different sets lie there.
        OutputError: the index cannot be written.
    """
    paths = sorted(folder.glob("model-*-of-*.salr"))
    count = paths[0].stem.rpartition("-")[2] if paths else "0"
    if not count.isdecimal() or len(paths) != int(count) or not paths:
        return False
    temporary = folder / f"{INDEX_NAME}.{os.getpid()}.partial"
    try:
        temporary.write_bytes(ShardSet(folder, [open_checked(path) for path in paths]).index())
        temporary.replace(folder / INDEX_NAME)
    except OSError as error:
        raise OutputError(f"writing failed ({error.strerror})", path=folder / INDEX_NAME) from error
    return True


def index_path(path: Path) -> Path | None:
    """Return the index that ``path`` (a directory of shards, or the index itself) stands for, None for a file."""
    if path.is_dir():
        return path / INDEX_NAME
    return path if path.name.endswith(".index.json") else None


def open_shards(index: Path) -> ShardSet:
    """Open the shards that an index lists.

    Raises:
        FormatError: the index is missing or damaged, leads out of its folder, or contradicts the shards.
    """
    listed = _read_index(index)
    for name in listed:
        if Path(name).name != name or "\\" in name or "\0" in name:
            raise FormatError(f"shard {name!r} could lie elsewhere", path=index, needed="plain file names")
    shards = ShardSet(index.parent, [open_checked(index.parent / name) for name in listed])
    if json.loads(shards.index()) != json.loads(index.read_bytes()):
        raise FormatError(
            "the index contradicts its shards", path=index, fix="copy it again, or `salr join` the shards"
        )
    return shards


def _read_index(index: Path) -> list[str]:
    """Return the names of the files that an index lists."""
    if not index.is_file():
        is_model = (index.parent / "config.json").is_file()
        raise FormatError(
            f"a directory without {INDEX_NAME}",
            path=index.parent,
            needed="a .salr file, or a directory of shards",
            fix="`salr convert DIR OUT.salr` makes one of a model"
            if is_model
            else "`salr join DIR OUT.salr` takes shards without an index",
        )
    try:
        too_large = index.stat().st_size > _LARGEST_INDEX
        value = None if too_large else json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"the index cannot be read ({error})", path=index, fix=_REMAKE) from error
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise FormatError("the index has no weight_map", path=index, fix=_REMAKE)
    return sorted(set(weight_map.values()))
