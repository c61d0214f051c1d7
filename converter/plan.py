"""The plan: what becomes of every input tensor, decided before a byte is written.

Invariant: each input tensor and each adapter key stands in the ledger exactly once, and every size is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..formats import naming
from ..formats.container import TensorSpec
from ..formats.dtypes import FLOAT_ENCODINGS
from ..formats.errors import OptionError, SourceError
from ..formats.manifest import MANIFEST_NAME, RESIDUAL, AdapterEntry, LedgerLine, ModuleEntry
from .adapters.records import unpruned_reason
from .adapters.source import Adapter
from .ledger import ledger_lines
from .methods.prune import global_kept_counts
from .module_options import SOURCE, ModuleOptions, check_rank
from .options import ConvertOptions
from .selection import Choice, TrainedPair, check_packable, choose_tensors, match_adapters
from .sources.architecture import Architecture
from .sources.checkpoint import Asset, Checkpoint, SourceTensor
from .sources.completeness import check_weights

_RESERVED = (MANIFEST_NAME, "__metadata__")
#: of float values as they are in the source
ENCODING_OF = {dtype: encoding for encoding, dtype in FLOAT_ENCODINGS.items()}
#: of the scales of int8 and nf4 values
SCALES_DTYPE = "F16"


@dataclass(frozen=True)
class PlannedModule:
    """A module to pack: its manifest entry, errors still unknown, and what it is made from."""

    name: str
    entry: ModuleEntry
    trained: tuple[TrainedPair, ...]
    reason: str
    residual_dtype: str = ""

    @property
    def residual_rank(self) -> int:
        """Rank of the residual adapter, 0 for none."""
        return next((adapter.rank for adapter in self.entry.adapters if adapter.name == RESIDUAL), 0)

    def specs(self) -> list[TensorSpec]:
        """Return every tensor the module will have."""
        scales = naming.scales_name(self.name)
        specs = [
            replace(spec, dtype=SCALES_DTYPE) if spec.name == scales else spec
            for spec in naming.module_specs(self.name, self.entry)
        ]
        dtypes = {t.adapter.name: (t.pair.lora_A.dtype, t.pair.lora_B.dtype) for t in self.trained}
        for adapter in self.entry.adapters:
            names = naming.lora_a_name(self.name, adapter.name), naming.lora_b_name(self.name, adapter.name)
            factor_dtypes = dtypes.get(adapter.name, (self.residual_dtype, self.residual_dtype))
            shapes = naming.adapter_shapes(self.entry, adapter.rank)
            specs += [TensorSpec(*spec) for spec in zip(names, factor_dtypes, shapes, strict=True)]
            if "I8" in factor_dtypes:
                specs.append(TensorSpec(naming.rank_scales_name(self.name, adapter.name), "F32", (adapter.rank,)))
        return specs


@dataclass(frozen=True)
class Plan:
    """All decisions of a conversion, the options they follow from, and what to know before it begins."""

    options: ConvertOptions
    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    class_name: str | None
    modules: tuple[PlannedModule, ...]
    kept: tuple[SourceTensor, ...]
    ledger: tuple[LedgerLine, ...]
    notes: tuple[str, ...] = ()

    def specs(self) -> list[TensorSpec]:
        """Return every tensor of the output except the manifest."""
        specs = [spec for module in self.modules for spec in module.specs()]
        specs += [TensorSpec(tensor.name, tensor.dtype, tensor.shape) for tensor in self.kept]
        specs += [TensorSpec(naming.ASSET_PREFIX + a.name, "U8", (a.n_bytes,)) for a in self.assets()]
        return specs

    def assets(self) -> list[Asset]:
        """Return each file to carry along."""
        return self.checkpoint.assets()


def make_plan(
    checkpoint: Checkpoint,
    adapters: Sequence[Adapter],
    options: ConvertOptions,
    kept_counts: Mapping[str, int] | None = None,
) -> Plan:
    """Decide what becomes of every tensor and adapter key.

    ``kept_counts`` are the modules' nnz where scope ``global`` has counted them before.

    Raises:
        OptionError: a pattern matches nothing, or a rank exceeds min(N, K).
        SourceError: a weight is missing, misshapen or cannot be packed, or a name collides with one of the format's.
        AdapterError: a key matches no linear layer of the base, or shapes disagree.
    """
    architecture = Architecture(checkpoint)
    notes = check_weights(checkpoint, architecture.model) if architecture.model is not None else []
    choices = choose_tensors(checkpoint, architecture, options)
    trained = match_adapters(checkpoint, architecture, choices, tuple(adapters))
    packed = [choice for name, choice in sorted(choices.items()) if choice.is_packed or name in trained]
    modules = [plan_module(choice, trained.get(choice.tensor.name, []), checkpoint, options) for choice in packed]
    if options.chosen_scope == "global":
        modules = _with_global_counts(modules, checkpoint, options, kept_counts)
    packed_names = {choice.tensor.name for choice in packed}
    kept = [choice for name, choice in sorted(choices.items()) if name not in packed_names]
    fates = {m.entry.source_tensor: ("packed", m.reason) for m in modules}
    fates |= {choice.tensor.name: ("kept", choice.reason) for choice in kept}
    ledger = [*ledger_lines(checkpoint, fates), *(line for adapter in adapters for line in adapter.ledger_lines())]
    plan = Plan(
        options,
        checkpoint,
        tuple(adapters),
        architecture.class_name,
        tuple(modules),
        tuple(choice.tensor for choice in kept),
        tuple(sorted(ledger, key=lambda line: (line.file, line.key))),
        tuple(notes),
    )
    _check_complete(plan)
    return plan


def plan_module(
    choice: Choice, trained: list[TrainedPair], checkpoint: Checkpoint, options: ConvertOptions
) -> PlannedModule:
    """Decide how one tensor is packed; ``trained`` are the adapter factors that target it."""
    tensor, transposed = choice.tensor, choice.role.transposed
    check_packable(tensor, choice.role, checkpoint)
    *experts, n_rows, n_columns = (*tensor.shape[:-2], *reversed(tensor.shape[-2:])) if transposed else tensor.shape
    settings = options.for_module(choice.module)
    reason = choice.reason
    if not choice.is_packed:
        settings, reason = ModuleOptions(sparsity=0.0), unpruned_reason(choice.reason)
    removed = n_removed(choice.module, settings, n_rows, n_columns, options)
    entry = ModuleEntry(
        source_tensor=tensor.name,
        source_shape=tensor.shape,
        transposed=transposed,
        shape=(*experts, n_rows, n_columns),
        dtype=tensor.dtype,
        nnz=(n_rows * n_columns - removed) * (experts[0] if experts else 1),
        pattern=options.pattern if removed else "dense",
        encoding=ENCODING_OF[tensor.dtype] if settings.values == SOURCE else settings.values,
        values_from="source",  # until it is packed: `packing.values_from` knows which method did it
        group_size=settings.group_size if settings.is_quantized else None,
    )
    rank = _residual_rank(choice.module, settings, min(n_rows, n_columns)) if is_solved(entry) else 0
    adapters = [AdapterEntry(RESIDUAL, rank, 1.0, f"low-rank part of {options.chosen_method}")] if rank else []
    adapters += [t.entry() for t in trained]
    entry = replace(entry, adapters=tuple(adapters))
    residual_dtype = "I8" if settings.adapter_values == "int8" else tensor.dtype
    if residual_dtype == "I8" and rank and experts:
        raise OptionError(
            "adapter_values int8 for stacked experts",
            tensor=choice.module,
            needed="float factors",
            fix=f"--set '{choice.module} adapter_values=source'",
        )
    return PlannedModule(choice.module, entry, tuple(trained), reason, residual_dtype)


def is_solved(entry: ModuleEntry) -> bool:
    """Tell whether a method decides about a module: it is pruned, or its values are quantized."""
    return entry.pattern != "dense" or entry.group_size is not None


def n_removed(module: str, settings: ModuleOptions, n_rows: int, n_columns: int, options: ConvertOptions) -> int:
    """Return how many weights of a matrix go, whole numbers in each of the groups that compete."""
    if options.pattern == "2:4" and settings.sparsity:
        if n_columns % 4:
            raise OptionError(
                f"{n_columns} columns", tensor=module, needed="a multiple of 4 for 2:4", fix=f"--exclude {module}"
            )
        return n_rows * n_columns // 2
    groups = n_rows if options.chosen_scope == "row" else 1
    return settings.n_removed(n_rows * n_columns // groups) * groups


def _residual_rank(module: str, settings: ModuleOptions, most: int) -> int:
    if settings.rank is None:
        return min(settings.default_rank, most)
    check_rank(settings.rank, most, module, f"lower --rank, or give --set '{module} rank={most}'")
    return settings.rank


class _GlobalWeights(Sequence[torch.Tensor]):
    """The weights of all planned modules, read again at each access so that one is in memory at a time."""

    def __init__(self, modules: list[PlannedModule], checkpoint: Checkpoint) -> None:
        self._names, self._checkpoint = [m.entry.source_tensor for m in modules], checkpoint

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        return self._checkpoint.read(self._names[index])


def _with_global_counts(
    modules: list[PlannedModule],
    checkpoint: Checkpoint,
    options: ConvertOptions,
    nnz: Mapping[str, int] | None,
) -> list[PlannedModule]:
    """Replace each module's nnz by what one magnitude threshold over all of them leaves it."""
    competing = [module for module in modules if module.entry.pattern != "dense"]
    if any(len(module.entry.shape) == 3 for module in competing) or options.overrides:
        raise OptionError("scope 'global'", needed="2-D weights and no --set", fix="use --scope layer")
    if nnz is None:
        n_removed = options.module.n_removed(sum(module.entry.n_weights for module in competing))
        counts = global_kept_counts(_GlobalWeights(competing, checkpoint), n_removed)
        nnz = {module.name: count for module, count in zip(competing, counts, strict=True)}
    return [replace(m, entry=replace(m.entry, nnz=nnz[m.name])) if m.name in nnz else m for m in modules]


def _check_complete(plan: Plan) -> None:
    """Refuse a plan that forgets an input, or that would write one name twice."""
    n_inputs = len(plan.checkpoint.inputs) + sum(len(adapter.keys) for adapter in plan.adapters)
    if len(plan.ledger) != n_inputs:
        raise SourceError(
            f"{len(plan.ledger)} of {n_inputs} input tensors accounted for",
            path=plan.checkpoint.directory,
            fix="report this: the plan has lost a tensor",
        )
    for asset in plan.assets():
        if not naming.is_asset_name(asset.name):
            raise SourceError(
                "a file of this name cannot be carried along",
                path=asset.path,
                needed="no ':', no backslash, and Unicode only",
                fix="rename it, or take it out of the directory",
            )
    _check_names(plan)


def _check_names(plan: Plan) -> None:
    """Refuse source tensors whose names mean something else in the file."""
    names = Counter([spec.name for spec in plan.specs()])
    taken = sorted(name for name, count in names.items() if count > 1 or name in _RESERVED)
    taken += [tensor.name for tensor in plan.kept if tensor.name.startswith(naming.ASSET_PREFIX)]
    if taken:
        raise SourceError(
            "collides with a name of the format",
            path=plan.checkpoint.directory,
            tensor=taken[0],
            fix="rename the tensor",
        )
