"""Shards, or the parts that several jobs made, joined to one .salr file.

Invariant: the file is the very one that a conversion without shards or parts gives; a tensor whose bytes do not match
their digest is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from . import naming
from .container import TensorSpec
from .errors import FormatError
from .opening import open_checked
from .partial_output import check_is_no_input
from .rewriting import copy_tensor
from .sharding import INDEX_NAME, ShardSet
from .writer import SalrWriter


def join(
    sources: Iterable[str | Path],
    out: str | Path,
    *,
    force: bool = False,
    fresh: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Write one file from all shards of a set, and return its size in bytes.

    Args:
        sources: the shards in any order, or directories (or indices) that hold them.
        force: replace an existing ``out``.
        fresh: discard what an interrupted run left.
        progress: called with tensors copied and to be copied.

    Raises:
        FormatError: a shard is missing, damaged, or belongs to another set.
        OutputError: ``out`` is one of the shards; or see ``SalrWriter``.
    """
    paths = [path for source in sources for path in _shard_paths(Path(source))]
    if not paths:
        raise FormatError("no shards were given", needed="every shard of one set")
    check_is_no_input(Path(out), paths)
    shards = ShardSet(paths[0].parent, [open_checked(path) for path in paths])
    specs = _specs_in_order(shards)
    with SalrWriter(out, specs, force=force, fresh=fresh) as writer:
        for done, spec in enumerate(specs, 1):
            copy_tensor(writer, spec.name, shards.raw(spec.name), shards.manifest.checksums, shards.path_of(spec.name))
            progress(done, len(specs))
        return writer.finish(shards.manifest)


def _shard_paths(source: Path) -> list[Path]:
    if source.name == INDEX_NAME:
        source = source.parent
    if not source.is_dir():
        return [source]
    found = sorted(source.glob("*.salr"))
    if not found:
        raise FormatError("there are no .salr files", path=source, needed="the shards of one set")
    return found


def _specs_in_order(shards: ShardSet) -> list[TensorSpec]:
    """Return every tensor in the order in which a conversion lists them, so that places agree."""
    modules = sorted(shards.manifest.modules.items(), key=lambda item: item[1].source_tensor)
    names = [name for module, entry in modules for name in naming.module_tensor_names(module, entry, shards.tensors)]
    others = sorted(set(shards.tensors) - set(names))
    assets = [name for name in others if name.startswith(naming.ASSET_PREFIX)]
    names += [name for name in others if not name.startswith(naming.ASSET_PREFIX)]
    names += sorted(assets, key=lambda name: shards.tensors[name].begin)
    return [TensorSpec(name, shards.tensors[name].dtype, shards.tensors[name].shape) for name in names]
