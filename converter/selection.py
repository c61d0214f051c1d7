"""Which tensors are packed, and which adapter factors belong to them.

Invariant: every choice has a reason in words; a pattern or an adapter key that matches nothing is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..formats import naming
from ..formats.errors import AdapterError, OptionError, SourceError
from ..formats.manifest import AdapterEntry
from .adapters.records import TRAINED_ORIGIN
from .adapters.source import Adapter, LoraPair
from .module_options import matches
from .options import ConvertOptions
from .sources.architecture import Architecture, Role
from .sources.checkpoint import FLOAT_TORCH_DTYPES, Checkpoint, SourceTensor


@dataclass(frozen=True)
class Choice:
    """Whether a tensor is packed, and why."""

    tensor: SourceTensor
    role: Role
    is_packed: bool
    reason: str

    @property
    def module(self) -> str:
        """The module's name: the tensor's without ``.weight``."""
        return module_name(self.tensor.name)


@dataclass(frozen=True)
class TrainedPair:
    """One adapter's factors for one module."""

    adapter: Adapter
    key: str
    pair: LoraPair

    def factors(self, module: str) -> list[tuple[str, SourceTensor]]:
        """Return the names of both factors in the file, for the module of that name, with the trained tensors."""
        return [
            (naming.lora_a_name(module, self.adapter.name), self.pair.lora_A),
            (naming.lora_b_name(module, self.adapter.name), self.pair.lora_B),
        ]

    def entry(self) -> AdapterEntry:
        """Return what the manifest says of this pair."""
        pair = self.pair
        return AdapterEntry(self.adapter.name, pair.rank, pair.scaling, TRAINED_ORIGIN, pair.alpha, pair.converted)


def module_name(tensor: str) -> str:
    """Return the module a weight tensor belongs to; a bare parameter is its own."""
    return tensor.removesuffix(".weight")


def choose_tensors(checkpoint: Checkpoint, architecture: Architecture, options: ConvertOptions) -> dict[str, Choice]:
    """Decide for every tensor of the checkpoint.

    Raises:
        OptionError: an include, exclude or set pattern matches no module.
        SourceError: a tensor to be packed has the wrong shape or dtype.
    """
    choices = {name: _choose(tensor, checkpoint, architecture, options) for name, tensor in checkpoint.tensors.items()}
    modules = [module_name(name) for name in choices]
    for pattern in (*options.include, *options.exclude, *(pattern for pattern, _ in options.overrides)):
        if not any(matches(pattern, module) for module in modules):
            raise OptionError(
                f"pattern {pattern!r} matches no module",
                path=checkpoint.directory,
                fix="see the names with --dry-run; start a regular expression with re:",
            )
    for choice in choices.values():
        if choice.is_packed:
            check_packable(choice.tensor, choice.role, checkpoint)
    if not any(choice.is_packed for choice in choices.values()):
        raise SourceError(
            "nothing to pack",
            path=checkpoint.directory,
            needed="linear layers in numbered blocks",
            fix="give --include",
        )
    return choices


def _choose(
    tensor: SourceTensor, checkpoint: Checkpoint, architecture: Architecture, options: ConvertOptions
) -> Choice:
    role = architecture.role(tensor.name, tensor.shape)
    module = module_name(tensor.name)
    reason = ", ".join(filter(None, [role.reason, checkpoint.remark(tensor.name)]))
    is_weight = role.packable or (len(tensor.shape) in (2, 3) and tensor.dtype in FLOAT_TORCH_DTYPES)
    if any(matches(pattern, module) for pattern in options.exclude):
        return Choice(tensor, role, False, "excluded by --exclude")
    if not role.packable and is_weight and any(matches(pattern, module) for pattern in options.include):
        return Choice(tensor, role, True, "included by --include")
    return Choice(tensor, role, role.packable, reason)


def check_packable(tensor: SourceTensor, role: Role, checkpoint: Checkpoint) -> None:
    """Refuse a weight that cannot be packed.

    Raises:
        SourceError: its shape is not what the model class expects, or its dtype is no 16- or 32-bit float.
    """
    if len(tensor.shape) not in (2, 3) or (role.shape is not None and role.shape != tensor.shape):
        raise SourceError(
            f"shape {list(tensor.shape)}",
            path=checkpoint.directory / tensor.file,
            tensor=tensor.name,
            needed=f"{list(role.shape)} as its class has it" if role.shape else "a matrix",
            fix=f"keep it dense: --exclude {module_name(tensor.name)}",
        )
    if 0 in tensor.shape or tensor.dtype not in FLOAT_TORCH_DTYPES:
        raise SourceError(
            f"{tensor.dtype} {list(tensor.shape)}",
            path=checkpoint.directory / tensor.file,
            tensor=tensor.name,
            needed="BF16, F16 or F32 with at least one weight",
            fix=f"keep it dense: --exclude {module_name(tensor.name)}",
        )


def match_adapters(
    checkpoint: Checkpoint, architecture: Architecture, choices: dict[str, Choice], adapters: tuple[Adapter, ...]
) -> dict[str, list[TrainedPair]]:
    """Return the trained pairs of each weight tensor.

    Raises:
        AdapterError: a key matches no linear layer of the base, or shapes disagree.
    """
    trained: dict[str, list[TrainedPair]] = {}
    for adapter in adapters:
        for module, pair in adapter.pairs.items():
            spelled = architecture.spellings(module)
            names = [f"{spelling}.weight" for spelling in spelled] if len(pair.lora_A.shape) == 2 else spelled
            name = next((name for name in names if name in choices), None)
            if name is None:
                raise AdapterError(
                    f"the base in {checkpoint.directory} has no such module",
                    path=adapter.directory,
                    tensor=module,
                    fix="was the adapter trained on another model? give its own with --base",
                )
            _check_pair(adapter, module, pair, choices[name])
            trained.setdefault(name, []).append(TrainedPair(adapter, module, pair))
    return trained


def _check_pair(adapter: Adapter, module: str, pair: LoraPair, choice: Choice) -> None:
    role, shape = choice.role, choice.tensor.shape
    if not choice.is_packed and not role.linear:
        raise AdapterError(
            f"its base weight is a {role.reason}",
            path=adapter.directory,
            tensor=module,
            needed="a linear layer",
            fix="merge this adapter with peft and convert the result",
        )
    *experts, n_rows, n_columns = (*shape[:-2], *reversed(shape[-2:])) if role.transposed else shape
    fits = pair.lora_A.shape == (*experts, pair.rank, n_columns) and pair.lora_B.shape == (*experts, n_rows, pair.rank)
    if not fits:
        raise AdapterError(
            f"factors for a {pair.lora_B.shape[-2]} x {pair.lora_A.shape[-1]} weight",
            path=adapter.directory,
            tensor=module,
            needed=f"{n_rows} x {n_columns}",
            fix="the adapter was trained on another model: give its own with --base",
        )
