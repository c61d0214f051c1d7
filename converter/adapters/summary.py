"""What adapters a .salr file holds, over all of its modules.

Invariant: everything is read from the manifest and the tensors' sizes; no factor is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...formats import naming
from ...formats.errors import AdapterError
from ...formats.manifest import RESIDUAL, AdapterEntry
from ...formats.reader import SalrFile


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter over all modules that have it: its ranks, scalings, alphas and origins, each once, and its bytes."""

    name: str
    n_modules: int
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]
    alphas: tuple[float, ...]
    n_bytes: int
    origins: tuple[str, ...]


def list_adapters(path: str | Path) -> list[AdapterSummary]:
    """Return every adapter of a .salr file, the residual first, then by name.

    Raises:
        FormatError: it is not a sound .salr file.
    """
    file = SalrFile(path)
    names = {adapter.name for entry in file.modules.values() for adapter in entry.adapters}
    return [summarize(file, name) for name in sorted(names, key=lambda name: (name != RESIDUAL, name))]


def summarize(file: SalrFile, name: str) -> AdapterSummary:
    """Return one adapter over all modules.

    Raises:
        AdapterError: the file holds no adapter of this name.
    """
    uses = adapter_uses(file, name)
    sizes = [file.tensors[tensor].n_bytes for module in uses for tensor in _tensor_names(file, module, name)]
    entries = uses.values()
    return AdapterSummary(
        name=name,
        n_modules=len(uses),
        ranks=tuple(sorted({entry.rank for entry in entries})),
        scalings=tuple(sorted({entry.scaling for entry in entries})),
        alphas=tuple(sorted({entry.alpha for entry in entries if entry.alpha is not None})),
        n_bytes=sum(sizes),
        origins=tuple(sorted({entry.origin for entry in entries})),
    )


def adapter_uses(file: SalrFile, name: str) -> dict[str, AdapterEntry]:
    """Return module -> entry of one adapter."""
    every = {(module, a.name): a for module, entry in file.modules.items() for a in entry.adapters}
    uses = {module: entry for (module, adapter), entry in every.items() if adapter == name}
    if not uses:
        held = ", ".join(sorted({adapter for _, adapter in every})) or "none"
        raise AdapterError(f"there is no adapter '{name}'", path=file.path, needed=f"one of: {held}")
    return uses


def _tensor_names(file: SalrFile, module: str, name: str) -> list[str]:
    spelled = naming.lora_a_name, naming.lora_b_name, naming.rank_scales_name
    return [tensor for spell in spelled if (tensor := spell(module, name)) in file.tensors]
