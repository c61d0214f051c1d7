"""Options of ``salr finetune``; those of the command line carry the same names.

Invariant: options are valid in themselves; what depends on the model is checked when it is prepared.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..formats.errors import OptionError

#: numpy, which transformers seeds too, takes no larger one
_LARGEST_SEED = 2**32 - 1
_LARGEST_COUNT = 2**31 - 1


@dataclass(frozen=True)
class FinetuneOptions:
    """How a file is fine-tuned.

    Args:
        rank, alpha, target, dropout, name: of the new adapter, see ``prepare_for_training``.
        freeze_residual: leave the residual as it is.
        lr: of the adapters; it rises over the first 3 % of the steps and falls along a cosine.
        residual_lr: of the residual; None for a tenth of ``lr``.
        epochs: passes over the data; max_steps: optimizer steps at most.
        batch: examples at once; accumulate: batches a step.
        max_length: tokens an example; longer ones are cut.
        checkpointing: recompute activations in the backward pass, for less memory.
        seed: of the adapter's start and the data's order.
        device: ``cpu`` (float32) or ``cuda`` (bf16, factors in float32).
        save_every: steps between checkpoints, from which an interrupted run goes on.
    """

    rank: int = 16
    alpha: float | None = None
    target: str = "all-linear"
    dropout: float = 0.0
    name: str = "default"
    freeze_residual: bool = False
    lr: float = 2e-4
    residual_lr: float | None = None
    epochs: float = 1.0
    max_steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    max_length: int = 1024
    checkpointing: bool = False
    seed: int = 0
    device: str = "cpu"
    save_every: int = 100

    def __post_init__(self) -> None:
        counts = "rank", "batch", "accumulate", "max_steps", "save_every"
        for name, least in (*((count, 1) for count in counts), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and not least <= value <= _LARGEST_COUNT:
                needed = f"{least} or more" if value < least else f"at most {_LARGEST_COUNT}"
                raise OptionError(f"{name.replace('_', '-')} {value}", needed=needed)
        if not 0 <= self.seed <= _LARGEST_SEED:
            raise OptionError(f"seed {self.seed}", needed=f"0 to {_LARGEST_SEED}")
        for name in ("lr", "residual_lr", "epochs"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise OptionError(f"{name.replace('_', '-')} {value}", needed="a finite number above 0")
        if self.device not in ("cpu", "cuda", "cuda:0"):
            fix = "choose another GPU with CUDA_VISIBLE_DEVICES"
            raise OptionError(f"device {self.device!r}", needed="cpu or cuda (one GPU)", fix=fix)

    @property
    def target_modules(self) -> str | list[str]:
        """The target as ``prepare_for_training`` takes it: names between commas, or a word."""
        parts = [part.strip() for part in self.target.split(",") if part.strip()]
        return parts if len(parts) > 1 or self.target != "all-linear" else self.target

    def recorded(self) -> dict[str, Any]:
        """Return what shapes the result besides the adapter's name, for the manifest and for resuming."""
        return {key: value for key, value in asdict(self).items() if key not in ("save_every", "name", "checkpointing")}
