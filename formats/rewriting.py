"""A .salr file written again with other adapters.

Invariant: a tensor that stays keeps its bytes and its digest; one whose bytes no longer match their digest is refused,
never given a fresh one. Pieces of 16 MB go from the mapped file to the new one, so no tensor is held in memory. The
old file is replaced by a rename, so whoever has it mapped keeps reading the old bytes until they close it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import naming
from .container import TensorSpec, pieces_of
from .errors import OutputError
from .manifest import ModuleEntry
from .reader import SalrFile
from .validation import damaged
from .writer import SalrWriter


@dataclass(frozen=True)
class Destination:
    """Where an edited file goes.

    Args:
        out: another file; None replaces the one that was read (through a symbolic link, the file it leads to).
        force: replace an existing ``out``.
        fresh: discard what an interrupted run left in ``OUT.partial``.
    """

    out: Path | None = None
    force: bool = False
    fresh: bool = False

    def of(self, file: SalrFile) -> Path:
        """Return the path to write for an edited ``file``."""
        return file.path.resolve() if self.out is None else Path(self.out)


@contextmanager
def rewriting(
    file: SalrFile,
    modules: Mapping[str, ModuleEntry],
    added: Iterable[TensorSpec],
    destination: Destination,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[SalrWriter]:
    """Yield a writer that holds every tensor of ``file`` that ``modules`` still call for.

    The caller writes the tensors of ``added`` and calls ``finish``.

    Args:
        modules: the entries of the new file, for modules of the old one; others leave with all their tensors.
        added: tensors that the old file lacks, or that replace those of the same name.
        progress: called with tensors copied and to be copied.

    Raises:
        ChecksumError: a tensor to be copied is damaged.
        OutputError: see ``SalrWriter``; or ``file`` is to be replaced, and another edit did so since it was opened.
    """
    new = {spec.name: spec for spec in added}
    file.require_one_file("editing adapters")
    specs = _specs_in_order(file, modules, new)
    force = destination.force or destination.out is None
    with SalrWriter(destination.of(file), specs, force=force, fresh=destination.fresh) as writer:
        if destination.out is None and not file.is_current():  # the writer holds the lock from here on
            raise OutputError("was changed while it was edited", path=file.path, fix="run the command again")
        copied = [spec.name for spec in specs if spec.name not in new]
        for done, name in enumerate(copied, 1):
            copy_tensor(writer, name, file.raw(name), file.manifest.checksums, file.path)
            progress(done, len(copied))
        yield writer


def copy_tensor(writer: SalrWriter, name: str, raw: memoryview, checksums: Mapping[str, str], path: str | Path) -> None:
    """Copy a tensor from ``raw`` of the file at ``path``.

    Raises:
        ChecksumError: its bytes do not match their digest.
    """
    if writer.write_pieces(name, pieces_of(raw)) != checksums[name]:
        raise damaged(path, name)


def _specs_in_order(
    file: SalrFile, modules: Mapping[str, ModuleEntry], new: Mapping[str, TensorSpec]
) -> list[TensorSpec]:
    """Return every tensor of the new file in the order in which a conversion lists them, so that places agree."""
    tensors = file.tensors
    by_place = sorted(modules, key=lambda module: tensors[naming.values_name(module)].begin)
    held = {**tensors, **new}
    names = [name for module in by_place for name in naming.module_tensor_names(module, modules[module], held)]
    assets = [name for name in tensors if name.startswith(naming.ASSET_PREFIX)]
    names += sorted({*file.dense_tensors(), *(set(new) - set(names))})
    names += sorted(assets, key=lambda name: tensors[name].begin)
    return [new.get(name) or TensorSpec(name, tensors[name].dtype, tensors[name].shape) for name in names]
