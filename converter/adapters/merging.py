"""Several adapters of a .salr file as one; with the residual among them, they become the residual.

Invariant: without a rank the merged product is the sum of the old ones: factors are concatenated along the rank, bit
for bit where scalings and dtypes agree, otherwise widened to float32 with each lora_B times its scaling (one rounding
an entry). With a rank the sum is fitted again by a truncated SVD, computed in float64 from the factors alone, and its
error is measured with the factors as stored. A residual that others were merged into says so in its origin: the errors
of its module are those before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ...formats import naming
from ...formats.container import TensorSpec
from ...formats.dtypes import Array, to_float32
from ...formats.errors import AdapterError, OptionError
from ...formats.manifest import RESIDUAL, AdapterEntry, Manifest, ModuleEntry, is_adapter_name
from ...formats.module import LowRankPair
from ...formats.reader import SalrFile
from ...formats.rewriting import Destination, rewriting
from ..execution.threads import one_thread
from ..methods.lowrank import fix_signs
from . import records
from .editing import Progress, check_is_separate, check_new_name
from .summary import AdapterSummary, summarize

_IN_PLACE = Destination()
_STACKED = "lora_A stacked along the rank, lora_B side by side"


@dataclass(frozen=True)
class MergeReport:
    """What merging made: ``adapter``, and how many of its modules hold the sum exactly, folded, or fitted again.

    ``n_exact``: the old factors, their bits widened at most. ``n_folded``: scalings multiplied into lora_B in float32.
    ``n_fitted``: truncated to the rank asked for; ``error`` is |sum - fit|^2 as a share of |sum|^2 over all modules,
    ``worst_error`` that of ``worst_module``.
    """

    adapter: AdapterSummary
    n_exact: int
    n_folded: int
    n_fitted: int
    error: float
    worst_module: str | None
    worst_error: float


@dataclass(frozen=True)
class _Recipe:
    """How one module is merged: ``kind`` is exact, folded or fitted."""

    kind: str
    rank: int
    dtype: str
    scaling: float

    def entry(self, names: Sequence[str], into: str) -> AdapterEntry:
        how = {
            "exact": _STACKED,
            "folded": f"{_STACKED}, each lora_B times its scaling, in float32",
            "fitted": f"truncated SVD of the sum, rank {self.rank}, in float32 (torch {torch.__version__})",
        }
        alpha = None if into == RESIDUAL else self.scaling * self.rank
        return AdapterEntry(into, self.rank, self.scaling, records.merged_origin(names), alpha, how[self.kind])

    def specs(self, module: str, into: str, entry: ModuleEntry) -> list[TensorSpec]:
        shape_a, shape_b = naming.adapter_shapes(entry, self.rank)
        spelled = (naming.lora_a_name(module, into), shape_a), (naming.lora_b_name(module, into), shape_b)
        return [TensorSpec(name, self.dtype, shape) for name, shape in spelled]


def merge_adapters(
    path: str | Path,
    names: Sequence[str],
    into: str,
    *,
    rank: int | None = None,
    destination: Destination = _IN_PLACE,
    progress: Progress = lambda done, total: None,
) -> MergeReport:
    """Replace the adapters ``names`` by one adapter ``into`` with the sum of their products.

    Args:
        names: two or more; with ``residual`` among them ``into`` has to be ``residual`` too, and the others cannot be
            switched off any more.
        rank: at most this rank a module; a module whose ranks add up to no more is merged without loss.

    Raises:
        OptionError: fewer than two different names, or a rank below 1.
        AdapterError: an adapter is missing or holds NaN, or ``into`` is taken or no adapter's name, or one of ``names``
            and ``into`` is the residual and the other is not.
        SalrError: the file cannot be read, or the output cannot be written.
    """
    file = SalrFile(path)
    _check_request(file, names, into, rank)
    recipes = {
        module: _recipe(file, module, chosen, rank)
        for module, entry in file.modules.items()
        if (chosen := [adapter for adapter in entry.adapters if adapter.name in names])
        and not _stays(chosen, into, rank)
    }
    modules = {m: _merged_entry(e, names, into, recipes.get(m)) for m, e in file.modules.items()}
    specs = [spec for m, recipe in recipes.items() for spec in recipe.specs(m, into, file.modules[m])]
    found: dict[str, tuple[float, float]] = {}
    with one_thread(), rewriting(file, modules, specs, destination, progress) as writer:
        for module, recipe in recipes.items():
            factors = _merge(file, module, names, recipe)
            writer.write(naming.lora_a_name(module, into), factors.lora_A)
            writer.write(naming.lora_b_name(module, into), factors.lora_B)
            found[module] = factors.error, factors.energy
        writer.finish(_manifest(file.manifest, modules, names, into))
    return _report(summarize(SalrFile(destination.of(file)), into), recipes, found)


def _check_request(file: SalrFile, names: Sequence[str], into: str, rank: int | None) -> None:
    if len(set(names)) != len(names) or len(names) < 2:
        raise OptionError(f"adapters {', '.join(names)}", path=file.path, needed="two or more, each once")
    if (RESIDUAL in names) != (into == RESIDUAL):
        found = "the residual merged into another adapter" if RESIDUAL in names else f"adapter name {into!r}"
        raise AdapterError(
            found,
            path=file.path,
            needed=f"'{RESIDUAL}' on both sides, or on none",
            fix=f"name {RESIDUAL} among the adapters and give --into {RESIDUAL}, or merge the others",
        )
    for name in names:
        summarize(file, name)
        check_is_separate(file, name, "merged")
    if not is_adapter_name(into):
        raise AdapterError(f"adapter name {into!r}", path=file.path, needed="letters, digits, '_' and '-'")
    if into not in names:
        check_new_name(file, into)
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank}", path=file.path, needed="1 or more")


def _stays(chosen: list[AdapterEntry], into: str, rank: int | None) -> bool:
    """Tell whether a module's residual is alone and small enough, so that nothing changes there."""
    return into == RESIDUAL and [a.name for a in chosen] == [RESIDUAL] and (rank is None or chosen[0].rank <= rank)


def _recipe(file: SalrFile, module: str, chosen: list[AdapterEntry], rank: int | None) -> _Recipe:
    total = sum(adapter.rank for adapter in chosen)
    if rank is not None and total > rank:
        return _Recipe("fitted", min(rank, *file.modules[module].shape[-2:]), "F32", 1.0)
    dtypes = {file.tensors[naming.lora_a_name(module, adapter.name)].dtype for adapter in chosen}
    if len({adapter.scaling for adapter in chosen}) > 1 or "I8" in dtypes:
        return _Recipe("folded", total, "F32", 1.0)
    return _Recipe("exact", total, dtypes.pop() if len(dtypes) == 1 else "F32", chosen[0].scaling)


def _merged_entry(entry: ModuleEntry, names: Sequence[str], into: str, recipe: _Recipe | None) -> ModuleEntry:
    if recipe is None:
        return entry
    kept = [adapter for adapter in entry.adapters if adapter.name not in names]
    new = recipe.entry(names, into)
    if into != RESIDUAL:
        return replace(entry, adapters=(*kept, new))
    return replace(entry, adapters=(new, *kept), values_from=records.values_beside_a_changed_residual(entry))


class _Factors(NamedTuple):
    """lora_A ([E,] r, K) and lora_B ([E,] N, r) as stored, |sum - B A|^2 and |sum|^2 (both 0 unless fitted)."""

    lora_A: Array
    lora_B: Array
    error: float = 0.0
    energy: float = 0.0


def _merge(file: SalrFile, module: str, names: Sequence[str], recipe: _Recipe) -> _Factors:
    pairs = [pair for pair in file.pairs(module) if pair.name in names]
    if recipe.kind == "exact":
        widen = len({pair.dtype for pair in pairs}) > 1
        both = [(to_float32(p.lora_A, p.dtype), to_float32(p.lora_B, p.dtype)) if widen else p[2:4] for p in pairs]
        return _Factors(np.concatenate([a for a, _ in both], -2), np.concatenate([b for _, b in both], -1))
    lora_a = np.concatenate([to_float32(pair.lora_A, pair.dtype) for pair in pairs], -2)
    scaled = [to_float32(p.lora_B, p.dtype).astype(np.float64) * _scaling(file, module, p) for p in pairs]
    lora_b = np.concatenate(scaled, -1)
    if not np.isfinite(lora_a).all() or not np.all(np.abs(lora_b) <= float(np.finfo(np.float32).max)):
        raise AdapterError(
            "factors times their scaling are beyond float32",
            path=file.path,
            tensor=module,
            needed="finite numbers",
            fix="scale the adapter first",
        )
    if recipe.kind == "folded":
        return _Factors(lora_a, lora_b.astype(np.float32))
    return _fit(torch.from_numpy(lora_b), torch.from_numpy(lora_a).double(), recipe.rank)


def _scaling(file: SalrFile, module: str, pair: LowRankPair) -> Array | float:
    """Return an adapter's scaling in float64; of int8 factors, one for each rank (r,)."""
    scaling = next(adapter.scaling for adapter in file.modules[module].adapters if adapter.name == pair.name)
    if pair.dtype != "I8":
        return scaling
    scales: Array = file.tensor(naming.rank_scales_name(module, pair.name)).astype(np.float64)
    return scales * scaling


def _fit(lora_b: torch.Tensor, lora_a: torch.Tensor, rank: int) -> _Factors:
    """Return the best rank-``rank`` factors of B A, from QR decompositions of both, so that B A is never formed."""
    left, core_b = torch.linalg.qr(lora_b)
    right, core_a = torch.linalg.qr(lora_a.mT)
    u, singular, vt = torch.linalg.svd(core_b @ core_a.mT, full_matrices=False)
    root = singular[..., :rank].sqrt()
    new_b = (left @ u[..., :rank] * root[..., None, :]).float()
    new_a = (root[..., :, None] * (vt[..., :rank, :] @ right.mT)).float()
    new_b, new_a = _with_fixed_signs(new_b, new_a)
    difference = torch.cat([lora_b, -new_b.double()], -1), torch.cat([lora_a, new_a.double()], -2)
    error = max(0.0, _squared_norm(*difference))
    return _Factors(new_a.numpy(), new_b.numpy(), error, _squared_norm(lora_b, lora_a))


def _with_fixed_signs(lora_b: torch.Tensor, lora_a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the largest entry of each column of B positive, expert by expert."""
    if lora_b.ndim == 2:
        return fix_signs(lora_b, lora_a)
    pairs = [fix_signs(b, a) for b, a in zip(lora_b, lora_a, strict=True)]
    return torch.stack([b for b, _ in pairs]), torch.stack([a for _, a in pairs])


def _squared_norm(lora_b: torch.Tensor, lora_a: torch.Tensor) -> float:
    """Return |B A|^2 from the Gram matrices of float64 factors."""
    return float((lora_b.mT @ lora_b * (lora_a @ lora_a.mT)).sum())


def _manifest(manifest: Manifest, modules: dict[str, ModuleEntry], names: Sequence[str], into: str) -> Manifest:
    """Return the manifest with the merged keys folded in its ledger, and the settings of all that were merged."""
    folded = {"fate": "folded", "reason": records.merged_reason(into)}
    ledger = tuple(
        replace(line, **folded) if any(records.owns(line, name) for name in names) else line for line in manifest.ledger
    )
    settings = records.merged_settings(manifest.source, names, into)
    source = records.with_settings(manifest.source, settings, modules)
    return replace(manifest, modules=modules, ledger=ledger, source=source)


def _report(adapter: AdapterSummary, recipes: dict[str, _Recipe], found: dict[str, tuple[float, float]]) -> MergeReport:
    kinds = Counter(recipe.kind for recipe in recipes.values())
    shares = {
        module: found[module][0] / (found[module][1] or 1.0) for module, r in recipes.items() if r.kind == "fitted"
    }
    total = sum(energy for _, energy in found.values()) or 1.0
    worst = max(shares, key=lambda module: shares[module], default=None)
    return MergeReport(
        adapter=adapter,
        n_exact=kinds["exact"],
        n_folded=kinds["folded"],
        n_fitted=kinds["fitted"],
        error=sum(error for error, _ in found.values()) / total,
        worst_module=worst,
        worst_error=shares[worst] if worst is not None else 0.0,
    )
