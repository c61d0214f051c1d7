"""PEFT LoRA directories: their factors as trained, bit for bit, and each module's scaling.

Invariant: an adapter is either understood completely or refused with the reason; no key is ever ignored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ...formats.dtypes import byte_view
from ...formats.errors import AdapterError
from ...formats.manifest import RESIDUAL, LedgerLine, is_adapter_name
from ..sources.checkpoint import SourceTensor, WeightFile, open_weights, read_json, tensor_from_bytes
from .keys import Factors, Parts, sort_keys
from .records import input_file, packed_reason
from .refusals import check_config
from .settings import CONFIG_NAME, LoraSettings

#: computes a factor in the dtype of its tensor
Factor = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class LoraPair:
    """The factors of one module: lora_A ([E,] r, K), lora_B ([E,] N, r), and y += scaling * lora_B (lora_A x).

    ``converted`` is the formula by which they follow from the trained tensors; None where they are those.
    """

    lora_A: SourceTensor
    lora_B: SourceTensor
    rank: int
    alpha: float
    scaling: float
    converted: str | None = None


class Adapter:
    """A PEFT LoRA directory.

    ``pairs`` maps the adapter's module names (as in the transformers model it was trained on) to their factors.
    ``parts`` holds everything else; what depends on the base is resolved by ``binding.bind``.

    Raises:
        AdapterError: another PEFT type, a refused feature, a factor without its partner, or an unknown key.
        SourceError: the directory or a file in it cannot be read.
    """

    def __init__(self, directory: str | Path, name: str) -> None:
        self.directory, self.name = Path(directory), name
        if self.directory.is_file():
            raise AdapterError("is a file", path=directory, needed="the directory of a PEFT adapter")
        if not is_adapter_name(name) or name == RESIDUAL:
            raise AdapterError(
                f"adapter name {name!r}",
                path=directory,
                needed=f"letters, digits, '_' and '-', and not '{RESIDUAL}'",
                fix="give another one: --adapter NAME=DIR",
            )
        self.config = read_json(self.directory / CONFIG_NAME, "a PEFT adapter directory has one")
        check_config(self.config, self.directory)
        self.settings = LoraSettings(self.config, self.directory)
        self._files = open_weights(self.directory, "adapter_model")
        self.keys = {key: tensor for file in self._files for key, tensor in file.tensors().items()}
        self.parts: Parts = sort_keys(self.keys, self.settings, self.directory)
        self.pairs = {module: self.pair(module, both) for module, both in sorted(self.parts.linear.items())}
        self._computed: Mapping[str, Factor] = {}
        self._fates: Mapping[str, tuple[str, str]] = {}

    @property
    def base_model(self) -> str | None:
        """The base the adapter was trained on: a path or a hub id."""
        base = self.config.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    @property
    def needs_base(self) -> str | None:
        """What of it can only be converted together with its base, in words; None where it is factors alone."""
        if self.settings.start:
            return f"factors that {self.settings.start} took out of the base"
        return "repeated layers" if self.settings.layer_ranges() else self.parts.beside_factors()

    def raw(self, key: str) -> memoryview:
        """Return a factor's bytes, memory-mapped unless it is computed."""
        if key in self._computed:
            return byte_view(self._computed[key]().contiguous().reshape(-1).view(torch.uint8).numpy())
        return self._file_of(key).raw(key)

    def read(self, tensor: SourceTensor) -> torch.Tensor:
        """Return one of its tensors in its own dtype; callers must not write to it."""
        return tensor_from_bytes(self.raw(tensor.name), tensor.dtype, tensor.shape)

    def require_finite(self) -> None:
        """Look at every weight.

        Raises:
            AdapterError: one holds NaN or infinity.
        """
        for name, tensor in self.keys.items():
            weight = tensor_from_bytes(self._file_of(name).raw(name), tensor.dtype, tensor.shape)
            if weight.is_floating_point() and not bool(weight.float().isfinite().all()):
                raise AdapterError(
                    "holds NaN or infinity", path=self.directory, tensor=name, fix="take an earlier checkpoint of it"
                )

    def _file_of(self, key: str) -> WeightFile:
        return next(file for file in self._files if file.path.name == self.keys[key].file)

    def weight_paths(self) -> list[Path]:
        """Return the files with factors."""
        return [file.path for file in self._files]

    def bound(
        self, pairs: Mapping[str, LoraPair], computed: Mapping[str, Factor], fates: Mapping[str, tuple[str, str]]
    ) -> Adapter:
        """Return it with the pairs it has on a certain base.

        Args:
            pairs: by module.
            computed: factors by the name of their tensor.
            fates: fate and reason of each key that is no factor bit for bit.
        """
        twin = copy.copy(self)
        twin.pairs, twin._computed, twin._fates = dict(pairs), dict(computed), dict(fates)
        return twin

    def ledger_lines(self) -> list[LedgerLine]:
        """Return the ledger's line for each key."""
        usual = "packed", packed_reason(self.name)
        return [
            LedgerLine(key, *self._fates.get(key, usual), input_file(self.name, tensor.file))
            for key, tensor in self.keys.items()
        ]

    def pair(self, module: str, factors: Factors) -> LoraPair:
        """Return both factors of a module as they were trained.

        Raises:
            AdapterError: their shapes or dtypes do not fit each other or the settings.
        """
        rank = self.settings.rank(module)
        lora_a, lora_b = factors["A"], factors["B"]
        if lora_a.shape[0] != rank or lora_b.shape[1] != rank:
            raise AdapterError(
                f"lora_A {list(lora_a.shape)}, lora_B {list(lora_b.shape)}",
                path=self.directory,
                tensor=module,
                needed=f"rank {rank}, which {CONFIG_NAME} gives",
                fix="config and weights belong to different adapters",
            )
        if lora_a.dtype != lora_b.dtype:
            raise AdapterError(
                f"lora_A {lora_a.dtype}, lora_B {lora_b.dtype}",
                path=self.directory,
                tensor=module,
                needed="one dtype for both",
                fix="save the adapter again",
            )
        return LoraPair(lora_a, lora_b, rank, self.settings.alpha(module), self.settings.scaling(module))


def is_adapter_directory(path: Path) -> bool:
    """Tell whether ``path`` holds a PEFT adapter and not a whole model."""
    return (path / CONFIG_NAME).is_file() and not (path / "config.json").is_file()
