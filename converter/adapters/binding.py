"""Adapters on their base: which tensors of it they change, and which factors remain beside it.

Invariant: base and factors together are the model that PEFT computes; each key of an adapter is a factor or has a
reason why it is in the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ...formats.errors import AdapterError
from ..sources.architecture import Architecture
from ..sources.checkpoint import FLOAT_TORCH_DTYPES, Checkpoint, SourceTensor
from ..sources.derived import Changes, Computed, DerivedCheckpoint
from .changes import TensorChange, Update
from .experts import SingleExperts, expert_pairs
from .initial import difference, initial_factors
from .records import base_reason, packed_reason
from .replication import with_replicated_layers
from .source import Adapter, Factor, LoraPair

_DORA = "lora_B times g = magnitude / |W + scaling B A| of each row; W's rows times g"
_INITIAL = "[A; A0] and [B, -B0], where {start} took scaling B0 A0 out of W"

_NUMBERED = re.compile(r"(^|\.)\d+\.")
#: computed pairs that are kept: those of a block are used several times while it is packed
_RECENT = 16


def bind(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> tuple[Checkpoint, list[Adapter]]:
    """Return the base with what the adapters change of it, and the adapters with the factors that remain.

    Raises:
        AdapterError: a key matches nothing of the base, shapes disagree, or two adapters replace one tensor.
    """
    checkpoint = with_replicated_layers(checkpoint, adapters)
    if all(_is_plain(adapter, checkpoint) for adapter in adapters):
        return checkpoint, list(adapters)
    base = _Base(checkpoint)
    binders = [_Binder(adapter, base) for adapter in adapters]
    for binder in binders:
        binder.collect()
    changed = base.changed()
    return changed, [binder.bound() for binder in binders]


def _is_plain(adapter: Adapter, checkpoint: Checkpoint) -> bool:
    """Tell whether an adapter is factors alone, of layers in numbered blocks, which are tied to nothing."""
    has_all = all(f"{m}.weight" in checkpoint.tensors and _NUMBERED.search(m) for m in adapter.pairs)
    return has_all and not adapter.settings.start and adapter.parts.beside_factors() is None


class _Base:
    """A checkpoint under change."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.architecture = checkpoint, Architecture(checkpoint)
        self.singles = SingleExperts(checkpoint, self.architecture)
        self.changes: dict[str, TensorChange] = {}
        #: the first adapter that updates a tensor
        self.updated_by: dict[str, str] = {}
        self._copies: dict[str, str] = {}
        self._is_untied = False

    def find(self, name: str) -> str | None:
        """Return the name of a tensor of the model, as the checkpoint or the model class spells it."""
        spelled = self.architecture.spellings(name)
        return next((n for n in spelled if n in self.checkpoint.tensors or self._tied_source(n)), None)

    def tensor(self, name: str) -> SourceTensor:
        """Return the checkpoint's tensor that ``find`` found, or the one that it is tied to."""
        return self.checkpoint.tensors[self._source(name)]

    def _source(self, name: str) -> str:
        return name if name in self.checkpoint.tensors else self._tied_source(name) or name

    def _tied_source(self, name: str) -> str | None:
        source = self.architecture.tied.get(name)
        spelled = self.architecture.spellings(source) if source else []
        return next((n for n in spelled if n in self.checkpoint.tensors), None)

    def separate(self, name: str) -> None:
        """Give a tensor bytes of its own where it is tied to another one."""
        if any(spelled in self.architecture.tied for spelled in self.architecture.spellings(name)):
            self._is_untied = True
            if name not in self.checkpoint.tensors:
                self._copies[name] = self._source(name)

    def untie(self, name: str, adapter: Adapter) -> None:
        """Give each tensor that is tied to ``name`` bytes of its own, so that ``name`` can change alone."""
        if self.architecture.model is None and self.checkpoint.config.get("tie_word_embeddings"):
            raise AdapterError(
                f"changes {name}, and transformers has no class that says what is tied to it", path=adapter.directory
            )
        for target, source in self.architecture.tied.items():
            found = self.find(target)
            if source in self.architecture.spellings(name) and found is not None:
                self.separate(found)

    def change(self, name: str, adapter: Adapter, *, transposed: bool | None = None) -> TensorChange:
        """Return the changes of a tensor, to be added to."""
        self.separate(name)
        if name not in self.changes:
            source = self._source(name)
            tensor = self.checkpoint.tensors[source]
            if tensor.dtype not in FLOAT_TORCH_DTYPES:
                raise AdapterError(
                    f"changes a tensor of {tensor.dtype}", path=adapter.directory, tensor=name, needed="a float tensor"
                )
            role = self.architecture.role(name, tensor.shape)
            read = self.checkpoint.rows
            self.changes[name] = TensorChange(
                tensor,
                tensor.dtype,
                role.transposed if transposed is None else transposed,
                lambda start, stop: read(source, start, stop),
            )
        return self.changes[name]

    def changed(self) -> Checkpoint:
        """Return the checkpoint with all changes."""
        if not self.changes and not self._is_untied:
            return self.checkpoint
        changes = Changes(copies=dict(self._copies))
        for name, change in self.changes.items():
            origin = self.checkpoint.origin(self._source(name))
            remark = ", ".join(change.remarks)
            changes.computed[name] = Computed(change.dtype, change.tensor.shape, origin, remark, change.rows)
        if self._is_untied:
            changes.config = _untied_config(self.checkpoint.config)
        return DerivedCheckpoint(self.checkpoint, changes)


def _untied_config(config: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {"tie_word_embeddings": False}
    for key in ("text_config", "decoder"):
        if isinstance(config.get(key), dict):
            changed[key] = {**config[key], "tie_word_embeddings": False}
    return changed


@dataclass(frozen=True)
class _Initial:
    """A weight that factors were taken out of, and the pair that was trained then."""

    tensor: str
    transposed: bool
    start: str
    pair: LoraPair


class _Binder:
    """One adapter on its base: changes are added to the base first, factors are resolved after that."""

    def __init__(self, adapter: Adapter, base: _Base) -> None:
        self._adapter, self._base = adapter, base
        self._parts = adapter.parts
        self._pairs: dict[str, LoraPair] = dict(adapter.pairs)
        self._computed: dict[str, Factor] = {}
        self._fates: dict[str, tuple[str, str]] = {}
        self._recent = lru_cache(_RECENT)(self._difference)

    def collect(self) -> None:
        """Add to the base what the adapter changes of it."""
        for name, tensor in self._parts.replacements.items():
            self._replace(name, tensor)
        for module, tensor in self._parts.tokens.items():
            self._replace_rows(module, tensor)
        for module, factors in self._parts.embeddings.items():
            self._fold_embedding(module, self._adapter.pair(module, factors), factors)
        for module, tensor in self._parts.biases.items():
            self._add_bias(module, tensor)
        for path, factors in self._parts.parameters.items():
            self._split_experts(path, factors)
        for module in self._adapter.pairs:
            name = self._required(f"{module}.weight", module)
            self._base.separate(name)
            self._claim(module, name)
            if self._adapter.settings.use_dora:
                self._rescale(module, name)
            elif self._adapter.settings.start:
                self._subtract_initial(module, name)

    def bound(self) -> Adapter:
        """Return the adapter with what remains of it."""
        return self._adapter.bound(self._pairs, self._computed, self._fates)

    def _required(self, name: str, key: str) -> str:
        found = self._base.find(name)
        if found is None:
            raise AdapterError(
                f"the base in {self._base.checkpoint.directory} has no such module or tensor as {name}",
                path=self._adapter.directory,
                tensor=key,
                fix="was the adapter trained on another model? give its own with --base",
            )
        return found

    def _claim(self, module: str, name: str) -> None:
        """Note that the adapter updates a tensor; PEFT's DoRA rescales what stands before it, so it has to be first."""
        before = self._base.updated_by.setdefault(name, self._adapter.name)
        if module in self._parts.magnitudes and before != self._adapter.name:
            raise AdapterError(
                f"is a DoRA, which would rescale adapter '{before}' too",
                path=self._adapter.directory,
                tensor=module,
                needed="the DoRA first, and only one",
                fix="change the order of --adapter, or convert with one of them",
            )

    def _fold(self, tensor: SourceTensor, what: str) -> None:
        self._fates[tensor.name] = "folded", base_reason(self._adapter.name, what)

    def _check_shape(self, tensor: SourceTensor, needed: tuple[int, ...], fix: str | None = None) -> None:
        if tensor.shape != needed:
            raise AdapterError(
                f"{list(tensor.shape)}",
                path=self._adapter.directory,
                tensor=tensor.name,
                needed=str(list(needed)),
                fix=fix,
            )

    def _replace(self, name: str, tensor: SourceTensor) -> None:
        found = self._required(name, tensor.name)
        own = self._base.tensor(found)
        self._check_shape(tensor, own.shape, "give the base that the adapter was trained on, resized as it was")
        if self._equals_base(own, tensor):
            self._fates[tensor.name] = "dropped", f"equals {found} of the base"
            return
        change = self._base.change(found, self._adapter)
        if change.replaced_by is not None:
            raise AdapterError(
                f"replaces {found}, and adapter '{change.replaced_by}' does too",
                path=self._adapter.directory,
                tensor=tensor.name,
                fix="convert with one of them",
            )
        self._base.untie(found, self._adapter)
        change.replaced_by, change.dtype = self._adapter.name, tensor.dtype
        change.source = lambda start, stop: self._adapter.read(tensor)[start:stop]
        change.remarks.append(f"replaced by adapter '{self._adapter.name}'")
        self._fold(tensor, f"replaces {found}")

    def _equals_base(self, own: SourceTensor, tensor: SourceTensor) -> bool:
        if own.dtype == tensor.dtype:
            return self._adapter.raw(tensor.name) == self._base.checkpoint.raw(own.name)
        if own.dtype not in FLOAT_TORCH_DTYPES:
            return False
        return torch.equal(self._adapter.read(tensor).float(), self._base.checkpoint.read(own.name).float())

    def _replace_rows(self, module: str, tensor: SourceTensor) -> None:
        name = self._required(f"{module}.weight", tensor.name)
        change = self._base.change(name, self._adapter)
        rows = self._adapter.settings.tokens(module)
        self._check_shape(tensor, (len(rows), change.tensor.shape[1]))
        taken = sorted(set(rows) & set(change.token_rows))
        if taken or max(rows, default=0) >= change.tensor.shape[0]:
            found = f"row {taken[0]}, which another adapter replaces" if taken else f"row {max(rows)}"
            raise AdapterError(
                found, path=self._adapter.directory, tensor=tensor.name, needed="rows of its own in the base"
            )
        # PEFT keeps both ends tied unless the other has rows of its own.
        tied = {t for t, s in self._base.architecture.tied.items() if s in self._base.architecture.spellings(name)}
        if any(f"{other}.weight" in tied for other in self._parts.tokens):
            self._base.untie(name, self._adapter)
        for index, row in enumerate(rows):
            change.token_rows[row] = self._row(tensor, index)
        change.remarks.append(f"{len(rows)} rows replaced by adapter '{self._adapter.name}'")
        self._fold(tensor, f"replaces rows of {name}")

    def _row(self, tensor: SourceTensor, index: int) -> Factor:
        return lambda: self._adapter.read(tensor)[index].float()

    def _fold_embedding(self, module: str, pair: LoraPair, factors: dict[str, SourceTensor]) -> None:
        name = self._required(f"{module}.weight", module)
        self._base.untie(name, self._adapter)
        change = self._base.change(name, self._adapter, transposed=True)
        n_words, width = change.tensor.shape
        self._check_shape(factors["A"], (pair.rank, n_words))
        self._check_shape(factors["B"], (width, pair.rank))
        self._claim(module, name)
        change.updates.append(self._update(module, pair, is_folded=True))
        change.remarks.append(f"with the update of adapter '{self._adapter.name}'")
        for tensor in factors.values():
            self._fold(tensor, f"added to {name}")

    def _update(self, module: str, pair: LoraPair, *, is_folded: bool) -> Update:
        magnitude = self._parts.magnitudes.get(module)
        if magnitude is not None:
            self._check_shape(magnitude, (pair.lora_B.shape[0],))
            self._fold(magnitude, f"rescales {module}.weight")
        return Update(
            self._reader(pair.lora_A),
            self._reader(pair.lora_B),
            pair.scaling,
            None if magnitude is None else self._reader(magnitude),
            is_folded,
        )

    def _reader(self, tensor: SourceTensor) -> Callable[[], torch.Tensor]:
        return lambda: self._adapter.read(tensor).float()

    def _add_bias(self, module: str, tensor: SourceTensor) -> None:
        name = self._required(f"{module}.bias", tensor.name)
        change = self._base.change(name, self._adapter)
        self._check_shape(tensor, change.tensor.shape)
        scaling = self._adapter.pairs[module].scaling
        change.additions.append(lambda: scaling * self._adapter.read(tensor).float())
        change.remarks.append(f"with the bias of adapter '{self._adapter.name}'")
        self._fold(tensor, f"added to {name}")

    def _split_experts(self, path: str, factors: dict[str, SourceTensor]) -> None:
        base = self._base
        for found in expert_pairs(path, factors, self._adapter, base.singles):
            self._pairs[found.tensor.removesuffix(".weight")] = found.pair
            self._computed |= {found.pair.lora_A.name: found.make_a, found.pair.lora_B.name: found.make_b}
        for tensor in factors.values():
            self._fates[tensor.name] = "packed", packed_reason(self._adapter.name, "bit for bit, expert by expert")

    def _check_pair(self, module: str, name: str) -> None:
        """Refuse factors of another size than the tensor's."""
        pair, change = self._adapter.pairs[module], self._base.change(name, self._adapter)
        sides = (pair.lora_B.shape[0], pair.lora_A.shape[1])
        if change.tensor.shape != (sides[::-1] if change.transposed else sides):
            raise AdapterError(
                f"factors for a {sides[0]} x {sides[1]} weight",
                path=self._adapter.directory,
                tensor=module,
                needed=" x ".join(map(str, change.tensor.shape)),
                fix="the adapter was trained on another model: give its own with --base",
            )

    def _rescale(self, module: str, name: str) -> None:
        """DoRA: the base's rows and lora_B times g; the magnitude is in both."""
        self._check_pair(module, name)
        pair, change = self._adapter.pairs[module], self._base.change(name, self._adapter)
        update = self._update(module, pair, is_folded=False)
        change.updates.append(update)
        change.remarks.append(f"rows rescaled by the magnitudes of adapter '{self._adapter.name}'")
        self._store(module, pair, pair.rank, _DORA, update.lora_A, lambda: update.lora_B() * change.gain()[:, None])
        self._fates[pair.lora_B.name] = "packed", packed_reason(self._adapter.name, "with its rows rescaled")

    def _subtract_initial(self, module: str, name: str) -> None:
        """PiSSA, OLoRA: a pair of twice the rank, which takes the initial factors out again."""
        pair, tensor = self._adapter.pairs[module], self._base.tensor(name)
        transposed = self._base.architecture.role(name, tensor.shape).transposed
        sides = tensor.shape[::-1] if transposed else tensor.shape
        was_saved = f"{module}.weight" in self._parts.replacements  # what PEFT saved has lost those factors already
        if was_saved or sides != (pair.lora_B.shape[0], pair.lora_A.shape[1]):  # the plan names both shapes
            return
        start, recent = str(self._adapter.settings.start), self._recent
        key = _Initial(tensor.name, transposed, start, pair)
        formula = _INITIAL.format(start=start)
        self._store(module, pair, 2 * pair.rank, formula, lambda: recent(key)[0], lambda: recent(key)[1])
        for factor in (pair.lora_A, pair.lora_B):
            self._fates[factor.name] = "packed", packed_reason(self._adapter.name, f"beside those of {start}'s start")

    def _difference(self, key: _Initial) -> tuple[torch.Tensor, torch.Tensor]:
        weight, pair = self._base.checkpoint.read(key.tensor).float(), key.pair
        oriented = weight.T if key.transposed else weight
        trained = self._adapter.read(pair.lora_A).float(), self._adapter.read(pair.lora_B).float()
        return difference(trained, initial_factors(key.start, oriented, pair.rank, pair.scaling))

    def _store(self, module: str, pair: LoraPair, rank: int, formula: str, make_a: Factor, make_b: Factor) -> None:
        """Put computed factors in float32 in the place of the trained ones."""
        n_rows, n_columns = pair.lora_B.shape[0], pair.lora_A.shape[1]
        lora_a = SourceTensor(f"{pair.lora_A.name} converted", "F32", (rank, n_columns), pair.lora_A.file)
        lora_b = SourceTensor(f"{pair.lora_B.name} converted", "F32", (n_rows, rank), pair.lora_B.file)
        self._computed |= {lora_a.name: make_a, lora_b.name: make_b}
        self._pairs[module] = LoraPair(lora_a, lora_b, rank, pair.alpha, pair.scaling, formula)
