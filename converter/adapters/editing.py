"""Adapters of a finished .salr file: added, removed and rescaled, its base untouched.

Invariant: every tensor that stays keeps its bytes; an edit is written whole or not at all; a file to which an adapter
was added equals the one that a conversion with that adapter makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...formats import naming
from ...formats.container import TensorSpec
from ...formats.dtypes import FLOAT_ENCODINGS, Array
from ...formats.errors import AdapterError, OptionError
from ...formats.manifest import RESIDUAL, AdapterEntry, ErrorEntry, LedgerLine, Manifest, ModuleEntry
from ...formats.reader import SalrFile
from ...formats.rewriting import Destination, rewriting
from ..execution.packing import squared_norm
from ..sources.checkpoint import sha256
from ..sources.opening import locate
from . import records
from .matching import match_modules
from .source import Adapter
from .summary import AdapterSummary, adapter_uses, summarize

Progress = Callable[[int, int], None]
_IN_PLACE = Destination()


def add_adapter(
    path: str | Path,
    directory: str | Path,
    name: str | None = None,
    destination: Destination = _IN_PLACE,
    progress: Progress = lambda done, total: None,
) -> AdapterSummary:
    """Add a PEFT LoRA (a directory or a hub id) to a .salr file, bit for bit; ``name`` defaults to the directory's.

    Raises:
        AdapterError: the name is taken, a key matches no packed module, shapes disagree, or a weight is not finite.
        SalrError: file or directory cannot be read, or the output cannot be written.
    """
    file, adapter = SalrFile(path), Adapter(locate(directory).path, name or Path(directory).resolve().name)
    check_new_name(file, adapter.name)
    _check_is_factors(adapter)
    adapter.require_finite()
    matched = match_modules(file, adapter)
    modules = {
        module: replace(entry, adapters=(*entry.adapters, matched[module].entry())) if module in matched else entry
        for module, entry in file.modules.items()
    }
    factors = [(tensor, factor) for module, pair in matched.items() for tensor, factor in pair.factors(module)]
    specs = [TensorSpec(tensor, factor.dtype, factor.shape) for tensor, factor in factors]
    with rewriting(file, modules, specs, destination, progress) as writer:
        for tensor, factor in factors:
            writer.write_pieces(tensor, [adapter.raw(factor.name)])
        files = [
            {"name": records.input_file(adapter.name, path.name), "sha256": sha256(path)}
            for path in adapter.weight_paths()
        ]
        lines = adapter.ledger_lines()
        ledger, source = records.with_lines(file.manifest, lines), records.with_files(file.manifest, files)
        writer.finish(replace(file.manifest, modules=modules, ledger=ledger, source=source))
    return summarize(SalrFile(destination.of(file)), adapter.name)


def remove_adapter(
    path: str | Path, name: str, destination: Destination = _IN_PLACE, progress: Progress = lambda done, total: None
) -> AdapterSummary:
    """Take an adapter out of a .salr file and return what it was.

    Raises:
        AdapterError: there is none of this name, or it is a residual that the kept values were fitted to.
        SalrError: the file cannot be read, or the output cannot be written.
    """
    file = SalrFile(path)
    removed = summarize(file, name)
    check_is_separate(file, name, "removed")
    if name == RESIDUAL:
        _check_residual_is_free(file, "removed")
    modules = {module: _without(entry, name) for module, entry in file.modules.items()}
    loose = _packed_for_adapters_only(file, modules)
    kept = {module: entry for module, entry in modules.items() if module not in loose}
    specs = [TensorSpec(entry.source_tensor, entry.dtype, entry.source_shape) for entry in loose.values()]
    with rewriting(file, kept, specs, destination, progress) as writer:
        for module, entry in loose.items():
            writer.write(entry.source_tensor, _source_weight(file, module))
        manifest = _manifest_without(file.manifest, name, kept)
        ledger = tuple(_kept_line(line, loose.values()) for line in manifest.ledger)
        writer.finish(replace(manifest, ledger=ledger))
    return removed


def scale_adapter(
    path: str | Path,
    name: str,
    *,
    factor: float | None = None,
    scaling: float | None = None,
    destination: Destination = _IN_PLACE,
    progress: Progress = lambda done, total: None,
) -> AdapterSummary:
    """Multiply an adapter's scaling by ``factor``, or set it to ``scaling`` in every module; no tensor changes.

    Raises:
        OptionError: not exactly one of both is given, or the scaling would not be a finite float32.
        AdapterError: there is none of this name, or it is a residual that the kept values were fitted to.
        SalrError: the file cannot be read, or the output cannot be written.
    """
    file = SalrFile(path)
    if (factor is None) == (scaling is None):
        found = "a factor and a scaling" if factor is not None else "no factor and no scaling"
        raise OptionError(found, needed="one of both: FACTOR, or --scaling S")
    adapter_uses(file, name)
    check_is_separate(file, name, "scaled")
    if name == RESIDUAL:
        _check_residual_is_free(file, "scaled")
    modules = {}
    for module, entry in file.modules.items():
        new = {a.name: _new_scaling(file, module, a, factor, scaling) for a in entry.adapters if a.name == name}
        modules[module] = _with_scaling(file, module, entry, name, new[name]) if new else entry
    with rewriting(file, modules, [], destination, progress) as writer:
        writer.finish(replace(file.manifest, modules=modules))
    return summarize(SalrFile(destination.of(file)), name)


def check_new_name(file: SalrFile, name: str) -> None:
    """Refuse the name of an adapter that the file holds, or that was merged into another.

    Raises:
        AdapterError: see above.
    """
    if any(adapter.name == name for entry in file.modules.values() for adapter in entry.adapters):
        raise AdapterError(f"adapter '{name}' exists already", path=file.path, fix="give another name")
    prefix = records.input_file(name, "")
    if any(records.is_folded(line) and line.file.startswith(prefix) for line in file.manifest.ledger):
        raise AdapterError(
            f"the ledger lists an adapter '{name}' that was merged", path=file.path, fix="give another name"
        )


def _check_is_factors(adapter: Adapter) -> None:
    """Refuse an adapter of which a part belongs into the base."""
    if adapter.needs_base is not None:
        raise AdapterError(
            f"it has {adapter.needs_base}",
            path=adapter.directory,
            needed="factors of linear layers alone",
            fix="convert the source again with --adapter",
        )


def check_is_separate(file: SalrFile, name: str, done: str) -> None:
    """Refuse to touch an adapter of which a part is in the base: magnitudes, biases, embeddings, whole tensors.

    Raises:
        AdapterError: see above.
    """
    line = next((line for line in file.manifest.ledger if records.is_in_base(line, name)), None)
    if line is not None:
        raise AdapterError(
            f"adapter '{name}' cannot be {done}: a part of it is in the base ({line.key})",
            path=file.path,
            fix="convert the source again",
        )


def _check_residual_is_free(file: SalrFile, done: str) -> None:
    """Refuse to touch a residual where kept values make up for what it gets wrong, or are not the source's bits."""
    for module, entry in file.modules.items():
        if all(adapter.name != RESIDUAL for adapter in entry.adapters):
            continue
        if entry.values_from != "source":
            found = f"its kept values were chosen to be used with it (values_from '{entry.values_from}')"
        elif not _has_own_bits(entry):
            found = f"its values are rounded to {entry.encoding}, so the error without it is not known"
        else:
            continue
        raise AdapterError(
            f"the residual cannot be {done}: {found}",
            path=file.path,
            tensor=module,
            needed="values_from 'source' in the source's own type",
            fix="convert the source again with another --rank, or with --method magnitude",
        )


def _without(entry: ModuleEntry, name: str) -> ModuleEntry:
    kept = tuple(adapter for adapter in entry.adapters if adapter.name != name)
    if name != RESIDUAL or len(kept) == len(entry.adapters):
        return replace(entry, adapters=kept)
    error = ErrorEntry(entry.error.energy, entry.error.mask, entry.error.mask, entry.error.mask)
    return replace(entry, adapters=kept, error=error)


def _packed_for_adapters_only(file: SalrFile, modules: dict[str, ModuleEntry]) -> dict[str, ModuleEntry]:
    """Return the modules that were packed, unpruned, because an adapter had factors for them, and none has any more."""
    keys = {line.key for line in file.manifest.ledger if records.reason_to_keep(line) is not None}
    bare = {module: entry for module, entry in modules.items() if not entry.adapters and file.modules[module].adapters}
    return {m: e for m, e in bare.items() if e.pattern == "dense" and e.source_tensor in keys and _has_own_bits(e)}


def _has_own_bits(entry: ModuleEntry) -> bool:
    return entry.values_from == "source" and FLOAT_ENCODINGS.get(entry.encoding) == entry.dtype


def _source_weight(file: SalrFile, module: str) -> Array:
    """Return the weight of a module without pruning, in the source's orientation and bits."""
    file.check_digest(naming.values_name(module))
    tensors = file.module(module)
    weight = tensors.stored().reshape(tensors.entry.shape)
    return weight.swapaxes(-1, -2) if tensors.entry.transposed else weight


def _kept_line(line: LedgerLine, loose: Collection[ModuleEntry]) -> LedgerLine:
    reason = records.reason_to_keep(line)
    if reason is None or all(entry.source_tensor != line.key for entry in loose):
        return line
    return replace(line, fate="kept", reason=reason)


def _manifest_without(manifest: Manifest, name: str, modules: dict[str, ModuleEntry]) -> Manifest:
    """Return the manifest of a conversion that was not given this adapter, or no rank for the residual."""
    if name == RESIDUAL:
        source = records.with_settings(manifest.source, {}, modules)
        return replace(manifest, modules=modules, options=_options_without_rank(manifest.options), source=source)
    gone = [line for line in manifest.ledger if records.owns(line, name)]
    ledger = tuple(line for line in manifest.ledger if not records.owns(line, name))
    source = records.with_settings(records.without_files(manifest, gone), {}, modules)
    return replace(manifest, modules=modules, ledger=ledger, source=source)


def _options_without_rank(options: dict[str, Any]) -> dict[str, Any]:
    changed = {**options, "rank": 0}
    if isinstance(options.get("set"), list):
        pairs = [pair for pair in options["set"] if isinstance(pair, list) and len(pair) == 2]
        without = [[p, {k: v for k, v in s.items() if k != "rank"}] for p, s in pairs if isinstance(s, dict)]
        changed["set"] = [pair for pair in without if pair[1]]
    return changed


def _new_scaling(
    file: SalrFile, module: str, adapter: AdapterEntry, factor: float | None, scaling: float | None
) -> float:
    new = float(adapter.scaling * factor if factor is not None else scaling or 0.0)
    if not math.isfinite(new) or abs(new) > float(np.finfo(np.float32).max):
        raise OptionError(f"scaling {new}", path=file.path, tensor=module, needed="a finite float32")
    if adapter.name == RESIDUAL and 0.0 in (new, adapter.scaling):
        raise OptionError("a residual of scaling 0", path=file.path, tensor=module, fix="use remove, which saves space")
    return new


def _with_scaling(file: SalrFile, module: str, entry: ModuleEntry, name: str, scaling: float) -> ModuleEntry:
    adapters = tuple(records.rescaled(a, scaling) if a.name == name else a for a in entry.adapters)
    if name != RESIDUAL or records.residual_is_changed(entry):  # a changed one's errors are those before
        return replace(entry, adapters=adapters)
    return replace(entry, adapters=adapters, error=_rescaled_error(file, module, entry, scaling))


def _rescaled_error(file: SalrFile, module: str, entry: ModuleEntry, scaling: float) -> ErrorEntry:
    """Return the errors with another scaling of the residual, without the source.

    With E the removed weights and P = B A, |E - sP|^2 = |E|^2 - 2s<E, P> + s^2|P|^2 is known at the old scaling, which
    gives <E, P>. What it does to outputs is no longer known.
    """
    old = next(adapter.scaling for adapter in entry.adapters if adapter.name == RESIDUAL)
    product = torch.from_numpy(file.adapters(module, [RESIDUAL]).product()).reshape(entry.n_rows, -1)
    unit = squared_norm(product) / old**2 / (entry.error.energy or 1.0)
    inner = (entry.error.mask - entry.error.residual + old**2 * unit) / (2 * old)
    residual = max(0.0, entry.error.mask - 2 * scaling * inner + scaling**2 * unit)
    return replace(entry.error, residual=residual, output=None)
