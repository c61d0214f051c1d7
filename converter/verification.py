"""Comparing a .salr file with the checkpoint it was made from.

Invariant: the plan is made again from the recorded options; what ``values_from`` says is derivable is recomputed and
compared bit for bit, and every error is measured again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..formats import naming
from ..formats.dtypes import Array, BoolArray, to_float32
from ..formats.errors import MismatchError, OptionError
from ..formats.manifest import MANIFEST_NAME, NO_ERROR, RESIDUAL, ModuleEntry
from ..formats.module import ModuleTensors
from ..formats.reader import SalrFile
from .adapters import records
from .execution.packing import error_bound, groups_of, packed_codes, squared_norm, to_numpy, used_method, values_from
from .methods.prune import Groups, keep_in_groups
from .methods.quantization import Quantizer
from .methods.weighted import minus_product
from .options import ConvertOptions
from .pipeline import plan_conversion
from .plan import Plan, PlannedModule
from .sources.checkpoint import TORCH_ENCODINGS

_RELATIVE = 1e-3
_SMALLEST_SHARE = 1e-9

Finding = tuple[str, MismatchError | None]


def compare_with_source(
    file: SalrFile, source: str | Path, adapters: Sequence[tuple[str, Path]] = (), base: Path | None = None
) -> Iterator[Finding]:
    """Yield ledger, modules, kept tensors and assets, each with what differs from the source, or None.

    Adapters that were merged or trained inside the file are left out: no source holds them.

    Args:
        source, adapters, base: as they were given to ``convert``; adapters added later count too.

    Raises:
        OptionError: the file holds an adapter that was not given.
        SalrError: the source cannot be read.
    """
    merged = [line for line in file.manifest.ledger if records.is_folded(line)]
    given = tuple(pair for pair in adapters if not any(line.file.startswith(f"{pair[0]}/") for line in merged))
    options = _recorded_options(file, given, base)
    recorded = file.manifest.source
    if recorded.get("repository") == str(source) and isinstance(recorded.get("revision"), str):
        options = replace(options, revision=recorded["revision"])
    plan = plan_conversion(source, options)
    _require_adapters(file, plan)
    same = plan.ledger == tuple(line for line in file.manifest.ledger if line not in merged)
    yield "ledger", None if same else _mismatch(file, "ledger", "the source has other tensors")
    for module in plan.modules:
        yield module.name, _compare_module(file, module, plan)
    for tensor in plan.kept:
        same = tensor.name in file.tensors and plan.checkpoint.raw(tensor.name) == file.raw(tensor.name)
        yield tensor.name, None if same else _mismatch(file, tensor.name, "differs from the source's tensor")
    for asset in plan.assets():
        same = asset.name in file.assets and file.asset(asset.name) == asset.read()
        yield asset.name, None if same else _mismatch(file, asset.name, "differs from the source's file")
    known = {spec.name for spec in plan.specs()} | _tensors_made_here(file) | {MANIFEST_NAME}
    for name in sorted(set(file.tensors) - known):
        yield name, _mismatch(file, name, "the source has nothing of this name")


def _recorded_options(file: SalrFile, adapters: tuple[tuple[str, Path], ...], base: Path | None) -> ConvertOptions:
    """Return the options that the file records.

    Raises:
        MismatchError: they are missing or make no sense.
    """
    try:
        options = ConvertOptions.from_recorded(file.manifest.options, adapters=adapters, base=base)
        patterns = (*options.include, *options.exclude, *(pattern for pattern, _ in options.overrides))
        if not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError("a pattern is no text")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise MismatchError(
            f"the recorded options make no sense ({type(error).__name__}: {error})",
            path=file.path,
            fix="convert the source again",
        ) from error
    return options


def _require_adapters(file: SalrFile, plan: Plan) -> None:
    every = [adapter for entry in file.modules.values() for adapter in entry.adapters]
    held = {adapter.name for adapter in every if adapter.name != RESIDUAL and not records.is_made_here(adapter)}
    for name in sorted(held - {adapter.name for adapter in plan.adapters}):
        raise OptionError(f"the file holds adapter '{name}'", path=file.path, fix=f"give --adapter {name}=DIR")


def _tensors_made_here(file: SalrFile) -> set[str]:
    """Return the factors of adapters that were merged or trained inside the file."""
    made = [(m, a.name) for m, entry in file.modules.items() for a in entry.adapters if records.is_made_here(a)]
    return {spell(m, name) for m, name in made for spell in (naming.lora_a_name, naming.lora_b_name)}


def _mismatch(file: SalrFile, name: str, found: str) -> MismatchError:
    return MismatchError(found, path=file.path, tensor=name, fix="convert the source again, or compare with its own")


def _compare_module(file: SalrFile, planned: PlannedModule, plan: Plan) -> MismatchError | None:
    name, entry = planned.name, file.modules.get(planned.name)
    if entry is None or _as_made(entry, planned) != _expected_entry(planned, entry, plan.options):
        return _mismatch(file, name, "the manifest's entry is not what the source and the options give")
    weight = plan.checkpoint.read(entry.source_tensor)
    source = weight.mT if entry.transposed else weight
    mask = file.module(name).mask()
    expected = _expected_values(file, name, source, mask)
    if expected is not None and not np.array_equal(expected, file.module(name).stored()):
        return _mismatch(file, name, f"kept values are not what values_from {entry.values_from!r} gives")
    if plan.options.chosen_method == "magnitude" and entry.pattern != "dense":
        groups = groups_of(entry.pattern, plan.options.chosen_scope)
        if not np.array_equal(mask, _expected_mask(planned, source, groups)):
            return _mismatch(file, name, "the mask differs from the one that the method chooses")
    return _compare_trained(file, planned) or _compare_errors(file, planned, source.float(), mask)


def _as_made(entry: ModuleEntry, planned: PlannedModule) -> ModuleEntry:
    """Return an entry without its measured errors and without what editing its adapters did."""
    return replace(entry, error=NO_ERROR, adapters=records.as_made(entry.adapters, planned.entry.adapters))


def _expected_entry(planned: PlannedModule, entry: ModuleEntry, options: ConvertOptions) -> ModuleEntry:
    """Return the entry that the recorded options give; an output error tells that the module had statistics."""
    method = used_method(options.chosen_method, entry.error.output is not None)
    made_from = values_from(planned, method)
    if records.residual_is_changed(entry) and made_from != "source":
        made_from = "refit"
    return replace(planned.entry, values_from=made_from)


def _compare_trained(file: SalrFile, planned: PlannedModule) -> MismatchError | None:
    for trained in planned.trained:
        for tensor_name, factor in trained.factors(planned.name):
            if file.raw(tensor_name) != trained.adapter.raw(factor.name):
                return _mismatch(file, tensor_name, "differs from the trained factor")
    return None


def _expected_values(file: SalrFile, name: str, source: torch.Tensor, mask: BoolArray) -> Array | None:
    """Return the kept values (nnz,) that follow from the source and the stored factors; None for refitted ones."""
    entry = file.modules[name]
    if entry.values_from == "refit":
        return None
    if entry.group_size is not None:
        return _expected_codes(file.module(name), source, mask)
    dtype = TORCH_ENCODINGS[entry.encoding]
    if entry.values_from == "source":
        return to_numpy(source.to(dtype))[mask]
    pair = next(pair for pair in file.pairs(name) if pair.name == RESIDUAL)
    lora_b, lora_a = (torch.from_numpy(to_float32(factor, pair.dtype)) for factor in (pair.lora_B, pair.lora_A))
    lora_b = lora_b * torch.from_numpy(pair.scaling)
    if source.ndim == 3:
        parts = zip(source.float(), lora_b, lora_a, strict=True)
        exact = torch.stack([minus_product(*part) for part in parts])
    else:
        exact = minus_product(source.float(), lora_b, lora_a)
    return to_numpy(exact.to(dtype))[mask]


def _expected_codes(tensors: ModuleTensors, source: torch.Tensor, mask: BoolArray) -> Array:
    """Return the codes nearest to the source's kept weights, under the stored scales."""
    entry, scales = tensors.entry, tensors.scales
    assert entry.group_size is not None and scales is not None
    quantizer = Quantizer(entry.encoding, entry.group_size)
    scale = quantizer.each(torch.from_numpy(scales).flatten(0, -2), entry.n_columns)
    codes = quantizer.codes(source.float().reshape(scale.shape), scale)
    return packed_codes(codes[torch.from_numpy(mask).reshape(scale.shape)], entry.encoding).numpy()


def _expected_mask(planned: PlannedModule, source: torch.Tensor, groups: Groups) -> BoolArray:
    matrices = list(source) if source.ndim == 3 else [source]
    n_kept = planned.entry.nnz // len(matrices)
    masks = [keep_in_groups(matrix.float().abs(), n_kept, groups).numpy() for matrix in matrices]
    return np.stack(masks).reshape(planned.entry.shape)


def _compare_errors(
    file: SalrFile, planned: PlannedModule, weight: torch.Tensor, mask: BoolArray
) -> MismatchError | None:
    name, stored = planned.name, file.modules[planned.name].error
    energy = squared_norm(weight)
    masked = squared_norm(weight.masked_fill(torch.from_numpy(mask), 0)) / (energy or 1.0)
    remaining = squared_norm(weight - torch.from_numpy(file.dense(name))) / (energy or 1.0)
    bound = error_bound(planned, masked)
    measured = {"energy": energy, "mask": masked, "residual": remaining, "bound": bound}
    if records.residual_is_changed(file.modules[name]):
        del measured["residual"]  # what it says was so before the change
    for key, found in measured.items():
        claimed = getattr(stored, key)
        if abs(found - claimed) > _RELATIVE * abs(claimed) + _SMALLEST_SHARE:
            return _mismatch(file, name, f"its {key} error is {found:.6g}, the manifest says {claimed:.6g}")
    return None
