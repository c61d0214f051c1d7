"""PEFT LoRA directories: their factors as trained, bit for bit, and each module's scaling.

Invariant: an adapter is either understood completely or refused with the reason; no key is ever ignored.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...formats.errors import AdapterError
from ...formats.manifest import RESIDUAL, is_adapter_name
from ..sources import SourceTensor, open_weights, read_json

CONFIG_NAME = "adapter_config.json"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
_FLOATS = ("BF16", "F16", "F32")
_LARGEST_ALPHA = 1e30

#: settings that change the result in a way which this version has no exact form for
_REFUSED = {
    "use_dora": "DoRA rescales the rows of the base",
    "lora_bias": "lora_bias adds a bias to lora_B",
    "modules_to_save": "modules_to_save replaces whole modules",
    "trainable_token_indices": "trainable_token_indices replaces embedding rows",
    "target_parameters": "target_parameters adapts bare parameters",
    "layer_replication": "layer_replication repeats layers",
    "alora_invocation_tokens": "aLoRA is active for a part of the prompt only",
    "use_qalora": "QALoRA pools its inputs",
    "arrow_config": "Arrow routes between adapters",
}
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraPair:
    """The factors of one module: lora_A (r, K), lora_B (N, r), and y += scaling * lora_B (lora_A x)."""

    lora_A: SourceTensor
    lora_B: SourceTensor
    rank: int
    alpha: float
    scaling: float


class Adapter:
    """A PEFT LoRA directory.

    ``pairs`` maps the adapter's module names (as in the transformers model it was trained on) to their factors.

    Raises:
        AdapterError: another PEFT type, a refused feature, a factor without its partner, or an unknown key.
        SourceError: the directory or a file in it cannot be read.
    """

    def __init__(self, directory: str | Path, name: str) -> None:
        self.directory, self.name = Path(directory), name
        if not is_adapter_name(name) or name == RESIDUAL:
            raise AdapterError(
                f"adapter name {name!r}",
                path=directory,
                needed=f"letters, digits, '_' and '-', and not '{RESIDUAL}'",
                fix="give another one: --adapter NAME=DIR",
            )
        self.config = read_json(self.directory / CONFIG_NAME, "a PEFT adapter directory has one")
        self._check_config()
        self._files = open_weights(self.directory, "adapter_model")
        self.keys = {key: tensor for file in self._files for key, tensor in file.tensors().items()}
        self.pairs = self._read_pairs()

    @property
    def base_model(self) -> str | None:
        """The base the adapter was trained on: a path or a hub id."""
        base = self.config.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None

    def raw(self, key: str) -> memoryview:
        """Return a factor's bytes, memory-mapped."""
        file = next(file for file in self._files if file.path.name == self.keys[key].file)
        return file.raw(key)

    def weight_paths(self) -> list[Path]:
        """Return the files with factors."""
        return [file.path for file in self._files]

    def _check_config(self) -> None:
        kind = self.config.get("peft_type")
        if kind != "LORA":
            raise self._refused(f"PEFT type {kind} is not a plain LoRA")
        for key, reason in _REFUSED.items():
            if self.config.get(key):
                raise self._refused(reason)
        if self.config.get("bias", "none") != "none":
            raise self._refused(f"bias={self.config['bias']!r} trains biases of the base")
        init = self.config.get("init_lora_weights")
        if isinstance(init, str) and init.startswith(_BASE_CHANGING_INITS):
            raise self._refused(f"init_lora_weights={init!r} changed the base weights it was trained on")

    def _refused(self, reason: str) -> AdapterError:
        return AdapterError(
            f"{reason}, which has no exact form here yet",
            path=self.directory,
            needed="a plain LoRA",
            fix="merge it into its base with peft's merge_and_unload and convert the result",
        )

    def _read_pairs(self) -> dict[str, LoraPair]:
        factors: dict[str, dict[str, SourceTensor]] = {}
        for key, tensor in self.keys.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise AdapterError(
                    "is no lora_A or lora_B weight of a linear layer",
                    path=self.directory,
                    tensor=key,
                    fix="merge this adapter with peft and convert the result",
                )
            if tensor.dtype not in _FLOATS or len(tensor.shape) != 2:
                raise AdapterError(
                    f"{tensor.dtype} {list(tensor.shape)}", path=self.directory, tensor=key, needed="a float matrix"
                )
            factors.setdefault(match["module"], {})[match["factor"]] = tensor
        return {module: self._pair(module, both) for module, both in sorted(factors.items())}

    def _pair(self, module: str, factors: dict[str, SourceTensor]) -> LoraPair:
        if len(factors) != 2:
            missing = "lora_B" if "A" in factors else "lora_A"
            raise AdapterError(
                f"{missing} is missing", path=self.directory, tensor=module, fix="save the adapter again"
            )
        rank, alpha = self._rank(module), self._alpha(module)
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
        scaling = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        return LoraPair(lora_a, lora_b, rank, alpha, scaling)

    def _rank(self, module: str) -> int:
        rank = self._resolve("rank_pattern", "r", module)
        if type(rank) is not int or rank < 1:
            raise self._senseless("r", rank, "a positive integer")
        return rank

    def _alpha(self, module: str) -> float:
        alpha = self._resolve("alpha_pattern", "lora_alpha", module)
        if type(alpha) not in (int, float) or not abs(alpha) < _LARGEST_ALPHA:
            raise self._senseless("lora_alpha", alpha, "a finite number")
        return float(alpha)

    def _resolve(self, pattern_key: str, default_key: str, module: str) -> Any:
        """Return a module's setting as PEFT resolves it: the first pattern that ends its name, or the default."""
        patterns = self.config.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            raise self._senseless(pattern_key, patterns, "an object")
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise self._senseless(pattern_key, pattern, "regular expressions") from error
        return self.config.get(default_key)

    def _senseless(self, key: str, value: object, needed: str) -> AdapterError:
        found = f"{key} is {value!r:.80}" if key in self.config else f"{key} is missing"
        return AdapterError(found, path=self.directory / CONFIG_NAME, needed=needed, fix="save the adapter again")


def is_adapter_directory(path: Path) -> bool:
    """Tell whether ``path`` holds a PEFT adapter and not a whole model."""
    return (path / CONFIG_NAME).is_file() and not (path / "config.json").is_file()
