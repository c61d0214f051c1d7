"""What a .salr file says about itself, arranged for people: headline numbers, and modules by layer and kind.

Invariant: every number is read from the file's manifest, its tensor sizes or its stored factors; none is assumed.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..converter.report import adapter_tensor_names, error_report, size_report
from ..formats.manifest import RESIDUAL, ModuleEntry
from ..formats.reader import SalrFile

#: kinds of layers in the order a block uses them; others follow by name
_ORDER = (
    "q_proj", "query", "k_proj", "key", "v_proj", "value", "qkv", "qkv_proj", "c_attn", "o_proj", "out_proj",
    "attn.c_proj", "gate_proj", "gate_up_proj", "w1", "up_proj", "w3", "fc1", "c_fc", "down_proj", "w2", "fc2",
)  # fmt: skip


@dataclass(frozen=True)
class Headline:
    """The numbers of one file; bits are per packed weight, errors shares of |W0|^2 over all packed modules.

    ``error_output`` is the median over modules of the output's squared error on calibration data, None without any.
    ``error_before`` says that errors are older than the residual, None where they are not.
    """

    path: str
    architecture: str
    method: str
    source_bytes: int
    file_bytes: int
    ratio: float
    packed_weights: int
    n_modules: int
    packed_source_bytes: int
    packed_bytes: int
    residual_bytes: int
    adapter_bytes: int
    kept_bytes: int
    bits_per_weight: float
    bits_without_adapters: float
    source_bits_per_weight: float
    sparsity: float
    ranks: tuple[int, int]
    error_mask: float
    error_residual: float
    error_bound: float | None
    error_output: float | None
    error_before: str | None


@dataclass(frozen=True)
class ModuleRow:
    """One packed module; ``layer`` is the number of its block, None outside any; ``n_bytes`` counts adapters."""

    name: str
    kind: str
    layer: int | None
    entry: ModuleEntry
    n_bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1 - self.entry.nnz / self.entry.n_weights

    @property
    def rank(self) -> int:
        """Rank of the residual adapter, 0 without."""
        return next((adapter.rank for adapter in self.entry.adapters if adapter.name == RESIDUAL), 0)

    @property
    def bits(self) -> float:
        """Bits per weight, adapters counted."""
        return 8 * self.n_bytes / self.entry.n_weights


@dataclass(frozen=True)
class AdapterRow:
    """One adapter over all modules that have it; ``trained`` is False for the residual."""

    name: str
    trained: bool
    n_modules: int
    ranks: tuple[int, int]
    scalings: tuple[float, ...]
    dtypes: tuple[str, ...]
    origin: str
    n_bytes: int


def headline(file: SalrFile) -> Headline:
    """Return the numbers of a file."""
    sizes, error = size_report(file), error_report(file.modules)
    rows = module_rows(file)
    ranks = [row.rank for row in rows] or [0]
    outputs = [entry.error.output for entry in file.modules.values() if entry.error.output is not None]
    weights = sizes.packed_weights or 1
    return Headline(
        path=str(file.path),
        architecture=str(file.manifest.source.get("architecture") or "no model class"),
        method=str(file.manifest.options.get("method") or "unknown"),
        source_bytes=sizes.source_bytes,
        file_bytes=sizes.file_bytes,
        ratio=sizes.file_bytes / (sizes.source_bytes or sizes.file_bytes),
        packed_weights=sizes.packed_weights,
        n_modules=len(rows),
        packed_source_bytes=sizes.packed_source_bytes,
        packed_bytes=sizes.packed_bytes,
        residual_bytes=sizes.residual_bytes,
        adapter_bytes=sizes.adapter_bytes,
        kept_bytes=sizes.kept_bytes,
        bits_per_weight=8 * sizes.packed_bytes / weights,
        bits_without_adapters=8 * sizes.packed_bytes_without_adapters / weights,
        source_bits_per_weight=8 * sizes.packed_source_bytes / weights,
        sparsity=1 - sum(row.entry.nnz for row in rows) / weights if rows else 0.0,
        ranks=(min(ranks), max(ranks)),
        error_mask=error.mask,
        error_residual=error.residual,
        error_bound=error.bound,
        error_output=statistics.median(outputs) if outputs else None,
        error_before=error.before,
    )


def module_rows(file: SalrFile) -> list[ModuleRow]:
    """Return the packed modules by layer, in the order of a block's kinds."""
    rows = []
    for name, entry in file.modules.items():
        layer, kind = split_name(name)
        n_bytes = sum(file.tensors[tensor].n_bytes for tensor in file.module_tensor_names(name))
        rows.append(ModuleRow(name, kind, layer, entry, n_bytes))
    return sorted(rows, key=lambda row: (row.layer is None, row.layer or 0, _kind_order(row.kind), row.name))


def split_name(module: str) -> tuple[int | None, str]:
    """Return (layer, kind) of a module's name: model.layers.3.mlp.experts.7.w1 is layer 3, kind mlp.experts.w1."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", module)
    if found is None:
        return None, module
    kind = ".".join(part for part in module[found.end() :].split(".") if not part.isdigit())
    return int(found[1]), kind or "weight"


def kinds(rows: Sequence[ModuleRow]) -> list[str]:
    """Return the kinds of layers in the order of a block."""
    return sorted({row.kind for row in rows}, key=_kind_order)


def kind_labels(names: Sequence[str]) -> dict[str, str]:
    """Return a short label for each kind: its last part, or all of it where two would be the same."""
    leaves = [name.rsplit(".", 1)[-1] for name in names]
    return {name: leaf if leaves.count(leaf) == 1 else name for name, leaf in zip(names, leaves, strict=True)}


def _kind_order(kind: str) -> tuple[int, str]:
    return next((i for i, known in enumerate(_ORDER) if f".{kind}".endswith(f".{known}")), len(_ORDER)), kind


def adapter_rows(file: SalrFile) -> list[AdapterRow]:
    """Return the adapters of a file, the residual first."""
    names = sorted({a.name for e in file.modules.values() for a in e.adapters}, key=lambda n: (n != RESIDUAL, n))
    return [_adapter_row(file, name) for name in names]


def _adapter_row(file: SalrFile, name: str) -> AdapterRow:
    uses = [(module, a) for module, e in file.modules.items() for a in e.adapters if a.name == name]
    tensors = [
        file.tensors[tensor]
        for module, _ in uses
        for tensor in adapter_tensor_names(module, file.modules[module], residual=name == RESIDUAL)
        if tensor.endswith(f".{name}") and tensor in file.tensors
    ]
    return AdapterRow(
        name=name,
        trained=name != RESIDUAL,
        n_modules=len(uses),
        ranks=(min(a.rank for _, a in uses), max(a.rank for _, a in uses)),
        scalings=tuple(sorted({a.scaling for _, a in uses})),
        dtypes=tuple(sorted({t.dtype for t in tensors if ".rank_scales." not in t.name})),
        origin=uses[0][1].origin,
        n_bytes=sum(tensor.n_bytes for tensor in tensors),
    )
