"""adapter_config.json of a LoRA: rank, scaling and tokens of each module, as PEFT resolves them.

Invariant: a value that makes no sense is refused with the key and the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...formats.errors import AdapterError

CONFIG_NAME = "adapter_config.json"
_LARGEST_ALPHA = 1e30


class LoraSettings:
    """The settings of one adapter directory."""

    def __init__(self, config: Mapping[str, Any], directory: Path) -> None:
        self._config, self._directory = config, directory

    @property
    def use_dora(self) -> bool:
        """Magnitudes rescale the rows of the base."""
        return bool(self._config.get("use_dora"))

    @property
    def start(self) -> str | None:
        """``pissa`` or ``olora`` where factors were taken out of the base before training, else None."""
        start = self._config.get("init_lora_weights")
        found = start.lower() if isinstance(start, str) else None
        return found if found in ("pissa", "olora") else None

    def rank(self, module: str) -> int:
        """Return the rank of a module."""
        rank = self._resolve("rank_pattern", "r", module)
        if type(rank) is not int or rank < 1:
            raise self._senseless("r", rank, "a positive integer")
        return rank

    def alpha(self, module: str) -> float:
        """Return lora_alpha of a module."""
        alpha = self._resolve("alpha_pattern", "lora_alpha", module)
        if type(alpha) not in (int, float) or not abs(alpha) < _LARGEST_ALPHA:
            raise self._senseless("lora_alpha", alpha, "a finite number")
        return float(alpha)

    def scaling(self, module: str) -> float:
        """Return alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self._config.get("use_rslora") else rank)

    def tokens(self, module: str) -> list[int]:
        """Return the rows of an embedding that trainable_token_indices replaces."""
        indices = self._config.get("trainable_token_indices")
        if isinstance(indices, Mapping):
            indices = next((rows for name, rows in indices.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(indices, list) or not all(type(index) is int and index >= 0 for index in indices):
            raise self._senseless("trainable_token_indices", indices, f"the rows of {module}")
        return indices

    def owns_parameters(self, module: str) -> bool:
        """Tell whether target_parameters adapts a bare parameter of ``module``."""
        targets = self._config.get("target_parameters") or []
        if not isinstance(targets, list):
            raise self._senseless("target_parameters", targets, "a list of names")
        owners = {str(target).rpartition(".")[0] for target in targets}
        return any(f".{module}".endswith(f".{owner}") for owner in owners)

    def layer_ranges(self) -> list[tuple[int, int]] | None:
        """Return the ranges [start, end) of layers that layer_replication stacks, None without."""
        ranges = self._config.get("layer_replication")
        if not ranges:
            return None
        if not isinstance(ranges, list) or not all(_is_range(part) for part in ranges):
            raise self._senseless("layer_replication", ranges, "pairs [start, end] of layers")
        return [(start, end) for start, end in ranges]

    def _resolve(self, pattern_key: str, default_key: str, module: str) -> Any:
        """Return a module's setting as PEFT resolves it: the first pattern that ends its name, or the default."""
        patterns = self._config.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            raise self._senseless(pattern_key, patterns, "an object")
        for pattern, value in patterns.items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return value
            except re.error as error:
                raise self._senseless(pattern_key, pattern, "regular expressions") from error
        return self._config.get(default_key)

    def _senseless(self, key: str, value: object, needed: str) -> AdapterError:
        found = f"{key} is {value!r:.80}" if key in self._config else f"{key} is missing"
        return AdapterError(found, path=self._directory / CONFIG_NAME, needed=needed, fix="save the adapter again")


def _is_range(part: object) -> bool:
    return (
        isinstance(part, list)
        and len(part) == 2
        and all(type(bound) is int for bound in part)
        and 0 <= part[0] < part[1]
    )
