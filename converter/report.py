"""What a conversion did, measured: sizes, errors, and what the user might do next.

Invariant: every number is read from the finished file's manifest and tensor sizes, none is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..formats import naming
from ..formats.manifest import RESIDUAL, ModuleEntry
from ..formats.reader import SalrFile
from .adapters.records import residual_is_changed

BEFORE_CHANGE = "before the residual was trained or merged"
NO_BOUND = "the bound is for the mask and the residual; it says nothing about rounding values to int8 or nf4"


@dataclass(frozen=True)
class SizeReport:
    """Bytes by what they hold; ``source_bytes`` counts the input's weight and adapter tensors."""

    values_bytes: int
    bitmap_bytes: int
    row_offsets_bytes: int
    scales_bytes: int
    residual_bytes: int
    adapter_bytes: int
    kept_bytes: int
    asset_bytes: int
    file_bytes: int
    packed_weights: int
    packed_source_bytes: int

    @property
    def packed_bytes(self) -> int:
        """All bytes of the packed modules, adapters included."""
        return self.packed_bytes_without_adapters + self.residual_bytes + self.adapter_bytes

    @property
    def packed_bytes_without_adapters(self) -> int:
        """Bitmap, values, row offsets and scales."""
        return self.values_bytes + self.bitmap_bytes + self.row_offsets_bytes + self.scales_bytes

    @property
    def overhead_bytes(self) -> int:
        """Header, manifest and padding between them."""
        return self.file_bytes - self.packed_bytes - self.kept_bytes - self.asset_bytes

    @property
    def source_bytes(self) -> int:
        """The same model before: packed weights dense, the rest as it is."""
        return self.packed_source_bytes + self.adapter_bytes + self.kept_bytes

    @property
    def bits_per_weight(self) -> float:
        """Bits per packed weight, adapters counted."""
        return 8 * self.packed_bytes / (self.packed_weights or 1)

    @property
    def bits_without_adapters(self) -> float:
        """Bits per packed weight without any adapter."""
        return 8 * self.packed_bytes_without_adapters / (self.packed_weights or 1)


@dataclass(frozen=True)
class ErrorReport:
    """Squared errors over all packed modules as shares of |W0|^2, weighted by energy.

    ``bound`` is None where some modules have none, and ``no_bound_because`` says why. ``before``: the residual was
    trained or merged since, and the errors are those before.
    """

    mask: float
    residual: float
    bound: float | None
    no_bound_because: str | None
    before: str | None = None


@dataclass(frozen=True)
class ConvertReport:
    """The outcome of a conversion."""

    path: str
    sizes: SizeReport
    error: ErrorReport
    n_modules: int
    n_kept: int
    n_inputs: int
    seconds: float
    notes: tuple[str, ...] = ()


def size_report(file: SalrFile) -> SizeReport:
    """Add up a file's bytes by what they hold."""
    sizes = {name: tensor.n_bytes for name, tensor in file.tensors.items()}
    modules = file.modules

    def total(names: list[str]) -> int:
        return sum(sizes.get(name, 0) for name in names)

    def adapters(residual: bool) -> int:
        return total([n for m, e in modules.items() for n in adapter_tensor_names(m, e, residual=residual)])

    return SizeReport(
        values_bytes=total([naming.values_name(m) for m in modules]),
        bitmap_bytes=total([naming.bitmap_name(m) for m in modules]),
        row_offsets_bytes=total([naming.row_offsets_name(m) for m in modules]),
        scales_bytes=total([naming.scales_name(m) for m in modules]),
        residual_bytes=adapters(residual=True),
        adapter_bytes=adapters(residual=False),
        kept_bytes=total(file.dense_tensors()),
        asset_bytes=total([naming.ASSET_PREFIX + name for name in file.assets]),
        file_bytes=file.n_bytes,
        packed_weights=sum(entry.n_weights for entry in modules.values()),
        packed_source_bytes=sum(entry.n_weights * (4 if entry.dtype == "F32" else 2) for entry in modules.values()),
    )


def adapter_tensor_names(module: str, entry: ModuleEntry, *, residual: bool) -> list[str]:
    """Return the tensor names of a module's residual adapter, or of its trained ones."""
    return [
        name(module, adapter.name)
        for adapter in entry.adapters
        if (adapter.name == RESIDUAL) == residual
        for name in (naming.lora_a_name, naming.lora_b_name, naming.rank_scales_name)
    ]


def error_report(modules: Mapping[str, ModuleEntry]) -> ErrorReport:
    """Average the modules' errors, weighted by |W0|^2."""
    energy = sum(entry.error.energy for entry in modules.values()) or 1.0
    errors = [entry.error for entry in modules.values()]
    bounds = [bound_of(entry) for entry in modules.values()]
    known = [bound * e.energy for bound, e in zip(bounds, errors, strict=True) if bound is not None]
    complete = len(known) == len(errors)
    return ErrorReport(
        mask=sum(e.mask * e.energy for e in errors) / energy,
        residual=sum(e.residual * e.energy for e in errors) / energy,
        bound=sum(known) / energy if complete else None,
        no_bound_because=None if complete else NO_BOUND,
        before=BEFORE_CHANGE if any(map(residual_is_changed, modules.values())) else None,
    )


def bound_of(entry: ModuleEntry) -> float | None:
    """Return the theorem's bound on what a module's residual leaves, None where its values are rounded to codes."""
    return None if entry.group_size is not None else entry.error.bound


def worst_modules(modules: Mapping[str, ModuleEntry], count: int = 2) -> list[tuple[str, float]]:
    """Return the modules with the largest remaining error."""
    ranked = sorted(modules.items(), key=lambda item: -item[1].error.residual)
    return [(name, entry.error.residual) for name, entry in ranked[:count]]
