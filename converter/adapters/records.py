"""What the manifest records about adapters: origins, ledger lines and input files.

Invariant: adding an adapter and removing it again leaves no trace, and so does scaling it forth and back; what was
merged cannot be undone, and says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...formats.manifest import RESIDUAL, AdapterEntry, LedgerLine, Manifest, ModuleEntry
from ...formats.version import VERSION

TRAINED_ORIGIN = "PEFT LoRA"
#: key of the manifest's ``source``: adapter -> settings it was trained with on the packed base
TRAINED = "trained"
#: key of an adapter's settings: those of the adapters that were merged into it, by name
MERGED_FROM = "merged_from"
_TRAINED_HERE = "trained by salr "
_MERGED = "merged from "
_MERGED_INTO = "factor merged into adapter "
_UNPRUNED = "an adapter targets it ("
_RESCALED = ", made with scaling "


def input_file(adapter: str, file: str) -> str:
    """Return the name under which the manifest lists a file of an adapter."""
    return f"{adapter}/{file}"


def packed_reason(adapter: str, how: str = "bit for bit") -> str:
    """Return why the ledger says ``packed`` of an adapter's key, and how it is stored."""
    return f"factor of adapter '{adapter}', {how}"


def base_reason(adapter: str, what: str) -> str:
    """Return why the ledger says ``folded`` of an adapter's key that is a part of the base now."""
    return f"{what}, which adapter '{adapter}' cannot be separated from"


def is_in_base(line: LedgerLine, adapter: str) -> bool:
    """Tell whether a ledger line is about a key of ``adapter`` that is a part of the base."""
    own_file = line.file.startswith(input_file(adapter, ""))
    return own_file and line.fate == "folded" and not line.reason.startswith(_MERGED_INTO)


def unpruned_reason(reason: str) -> str:
    """Return why a tensor is packed that ``reason`` would keep dense, had no adapter a factor for it."""
    return f"{_UNPRUNED}{reason}): stored unpruned"


def reason_to_keep(line: LedgerLine) -> str | None:
    """Return why a tensor is kept once no adapter has a factor for it; None where it was not packed for one."""
    return line.reason.removeprefix(_UNPRUNED).rpartition("): ")[0] if line.reason.startswith(_UNPRUNED) else None


def merged_reason(adapter: str) -> str:
    """Return why the ledger says ``folded`` of a key whose adapter was merged into ``adapter``."""
    return f"{_MERGED_INTO}'{adapter}'"


def merged_origin(names: Iterable[str]) -> str:
    """Return the origin of an adapter made from others."""
    return _MERGED + ", ".join(names)


def is_merged(adapter: AdapterEntry) -> bool:
    """Tell whether an adapter was made from others inside the file, so that no directory holds it."""
    return adapter.origin.startswith(_MERGED)


def trained_origin(before: AdapterEntry | None) -> str:
    """Return the origin of an adapter trained on the packed base; ``before``: what it was until then."""
    told = f"{_TRAINED_HERE}{VERSION}"
    return told if before is None or is_trained(before) else f"{before.origin}, {told}"


def is_trained(adapter: AdapterEntry) -> bool:
    """Tell whether an adapter was trained on the packed base, so that no directory holds it."""
    return _TRAINED_HERE in adapter.origin


def is_made_here(adapter: AdapterEntry) -> bool:
    """Tell whether an adapter was merged or trained inside the file."""
    return is_merged(adapter) or is_trained(adapter)


def residual_is_changed(entry: ModuleEntry) -> bool:
    """Tell whether a module's residual was trained or merged, so that its errors are those before."""
    return any(adapter.name == RESIDUAL and is_made_here(adapter) for adapter in entry.adapters)


def values_beside_a_changed_residual(entry: ModuleEntry) -> str:
    """Return ``values_from`` where the residual changes: values that followed from its factors do so no more."""
    return entry.values_from if entry.values_from == "source" else "refit"


def with_settings(source: dict[str, Any], settings: Mapping[str, Any], modules: Mapping[str, ModuleEntry]) -> Any:
    """Return the manifest's source with more training settings, and without those of adapters that are gone."""
    held = {adapter.name for entry in modules.values() for adapter in entry.adapters}
    every = {**_settings(source), **settings}
    kept = {name: value for name, value in every.items() if name in held}
    rest = {key: value for key, value in source.items() if key != TRAINED}
    return {**rest, TRAINED: kept} if kept else rest


def merged_settings(source: Mapping[str, Any], names: Sequence[str], into: str) -> dict[str, Any]:
    """Return the training settings of what was merged into ``into``: those of each adapter by its name."""
    known = _settings(source)
    kept = {name: known[name] for name in names if name in known}
    return {into: {MERGED_FROM: kept}} if kept else {}


def trained_settings(source: Mapping[str, Any], name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of adapter ``name``, trained with ``settings``: beside them stays what was merged into it."""
    before = _settings(source).get(name)
    merged = before.get(MERGED_FROM) if isinstance(before, dict) else None
    return dict(settings) if merged is None else {**settings, MERGED_FROM: merged}


def _settings(source: Mapping[str, Any]) -> dict[str, Any]:
    known = source.get(TRAINED)
    return known if isinstance(known, dict) else {}


def rescaled(adapter: AdapterEntry, scaling: float) -> AdapterEntry:
    """Return the entry with another scaling; its origin keeps the first one, its alpha stays as it was trained."""
    origin, was_rescaled, first = adapter.origin.partition(_RESCALED)
    made_with = first if was_rescaled else repr(adapter.scaling)
    changed = origin if repr(scaling) == made_with else f"{origin}{_RESCALED}{made_with}"
    return replace(adapter, scaling=scaling, origin=changed)


def as_made(adapters: Sequence[AdapterEntry], planned: Sequence[AdapterEntry]) -> tuple[AdapterEntry, ...]:
    """Return a module's adapters as a conversion that ``planned`` them made them.

    Merged ones and those trained here go, a changed residual is the planned one again, scalings are set back.
    """
    own = {adapter.name: adapter for adapter in planned}
    kept = [own[a.name] if a.name in own and a.name == RESIDUAL and is_made_here(a) else a for a in adapters]
    kept = [adapter for adapter in kept if not is_made_here(adapter)]
    return tuple(own[a.name] if a.name in own and rescaled(own[a.name], a.scaling) == a else a for a in kept)


def owns(line: LedgerLine, adapter: str) -> bool:
    """Tell whether a ledger line is about a key that lives in ``adapter`` now."""
    own_file = line.file.startswith(input_file(adapter, ""))
    is_own = line.fate == "dropped" or line.reason.startswith(packed_reason(adapter, ""))
    return (own_file and is_own) or line.reason == merged_reason(adapter)


def is_folded(line: LedgerLine) -> bool:
    """Tell whether a ledger line is about a key that was merged with others."""
    return line.fate == "folded" and line.reason.startswith(_MERGED_INTO)


def with_lines(manifest: Manifest, lines: Iterable[LedgerLine]) -> tuple[LedgerLine, ...]:
    """Return the ledger with ``lines`` besides, in its order."""
    return tuple(sorted([*manifest.ledger, *lines], key=lambda line: (line.file, line.key)))


def with_files(manifest: Manifest, files: list[dict[str, str]]) -> dict[str, Any]:
    """Return the manifest's source with more input files."""
    return {**manifest.source, "files": [*_files(manifest), *files]}


def without_files(manifest: Manifest, lines: Iterable[LedgerLine]) -> dict[str, Any]:
    """Return the manifest's source without the files of ledger ``lines``."""
    gone = {line.file for line in lines}
    kept = [file for file in _files(manifest) if not (isinstance(file, dict) and file.get("name") in gone)]
    return {**manifest.source, "files": kept} if "files" in manifest.source else manifest.source


def _files(manifest: Manifest) -> list[Any]:
    files = manifest.source.get("files")
    return files if isinstance(files, list) else []
