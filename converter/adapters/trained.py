"""Adapters that were trained on the packed base, written into a .salr file.

Invariant: every other tensor keeps its bytes and its digest; factors are stored in the dtype that they were trained in.
A residual that training changed says so in its origin: the errors of its module are then those before training, and
its kept values no longer follow from the factors (``values_from`` becomes ``refit`` unless it is ``source``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...formats import naming
from ...formats.container import TensorSpec
from ...formats.errors import AdapterError
from ...formats.manifest import RESIDUAL, AdapterEntry, ModuleEntry, is_adapter_name
from ...formats.reader import SalrFile
from ...formats.rewriting import Destination, rewriting
from ..execution.packing import to_numpy
from ..sources.checkpoint import FLOAT_TORCH_DTYPES
from . import records
from .editing import Progress, check_is_separate, check_new_name
from .summary import AdapterSummary, summarize

DTYPES = {dtype: name for name, dtype in FLOAT_TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TrainedFactors:
    """lora_A (r, K) and lora_B (N, r) of one packed module, in one float dtype, and their scaling."""

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    alpha: float | None = None


@dataclass(frozen=True)
class TrainedAdapter:
    """One adapter: factors by the packed module's name in the file; ``settings`` are recorded, JSON values only.

    ``replaces``: the file's adapter of this name is the one that was trained further.
    """

    name: str
    factors: Mapping[str, TrainedFactors]
    settings: Mapping[str, Any] = field(default_factory=dict)
    replaces: bool = False


def write_trained(
    file: SalrFile,
    adapters: Sequence[TrainedAdapter],
    destination: Destination,
    progress: Progress = lambda done, total: None,
) -> list[AdapterSummary]:
    """Write ``file`` again with ``adapters``; those that it holds under other names stay.

    Raises:
        AdapterError: a name is taken or no adapter's name, shapes or dtypes disagree, or a factor is not finite.
        SalrError: the file is damaged, or the output exists or cannot be written.
    """
    file.require_one_file("saving trained adapters")
    for adapter in adapters:
        _check(file, adapter)
    modules = dict(file.modules)
    for adapter in adapters:
        for module, factors in adapter.factors.items():
            modules[module] = _with(modules[module], adapter.name, factors)
    specs = [spec for adapter in adapters for m, f in adapter.factors.items() for spec in _specs(m, adapter.name, f)]
    with rewriting(file, modules, specs, destination, progress) as writer:
        for adapter in adapters:
            for module, factors in adapter.factors.items():
                writer.write(naming.lora_a_name(module, adapter.name), to_numpy(factors.lora_A))
                writer.write(naming.lora_b_name(module, adapter.name), to_numpy(factors.lora_B))
        source = file.manifest.source
        settings = {a.name: records.trained_settings(source, a.name, a.settings) for a in adapters}
        source = records.with_settings(source, settings, modules)
        writer.finish(replace(file.manifest, modules=modules, source=source))
    written = SalrFile(destination.of(file))
    return [summarize(written, adapter.name) for adapter in adapters]


def _check(file: SalrFile, adapter: TrainedAdapter) -> None:
    name = adapter.name
    if adapter.replaces:
        check_is_separate(file, name, "replaced")
    elif not is_adapter_name(name) or name == RESIDUAL:
        needed = f"letters, digits, '_' and '-', and not '{RESIDUAL}'"
        raise AdapterError(f"adapter name {name!r}", path=file.path, needed=needed)
    else:
        check_new_name(file, name)
    if not adapter.factors:
        raise AdapterError(f"adapter '{name}' has no factors on packed layers", path=file.path)
    for module, factors in adapter.factors.items():
        _check_factors(file, name, module, factors)


def _check_factors(file: SalrFile, name: str, module: str, factors: TrainedFactors) -> None:
    found = tuple(factors.lora_A.shape), tuple(factors.lora_B.shape)
    needed = naming.adapter_shapes(file.modules[module], factors.lora_A.shape[0])
    dtypes = {factors.lora_A.dtype, factors.lora_B.dtype}
    if found != needed or len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise AdapterError(
            f"adapter '{name}' has factors {found[0]} and {found[1]} in {', '.join(sorted(map(str, dtypes)))}",
            path=file.path,
            tensor=module,
            needed=f"{needed[0]} and {needed[1]} in one of bfloat16, float16 and float32",
        )
    for factor in (factors.lora_A, factors.lora_B):
        if not torch.isfinite(factor).all():
            raise AdapterError(
                f"adapter '{name}' holds NaN or infinity",
                tensor=module,
                needed="finite numbers",
                fix="the training diverged: train again at a lower rate",
            )


def _with(entry: ModuleEntry, name: str, factors: TrainedFactors) -> ModuleEntry:
    """Return a module's entry with an adapter in its old place, or at the end."""
    old = next((adapter for adapter in entry.adapters if adapter.name == name), None)
    new = AdapterEntry(name, factors.lora_A.shape[0], factors.scaling, records.trained_origin(old), factors.alpha)
    if old is None:
        return replace(entry, adapters=(*entry.adapters, new))
    adapters = tuple(new if adapter.name == name else adapter for adapter in entry.adapters)
    changed = records.values_beside_a_changed_residual(entry) if name == RESIDUAL else entry.values_from
    return replace(entry, adapters=adapters, values_from=changed)


def _specs(module: str, name: str, factors: TrainedFactors) -> list[TensorSpec]:
    dtype = DTYPES[factors.lora_A.dtype]
    return [
        TensorSpec(naming.lora_a_name(module, name), dtype, tuple(factors.lora_A.shape)),
        TensorSpec(naming.lora_b_name(module, name), dtype, tuple(factors.lora_B.shape)),
    ]
