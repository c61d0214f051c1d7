"""What a packed module's tensors look like before any of them is read: names, dtypes, shapes.

Invariant: a layout is plain data (it can be copied and pickled), and agrees with the manifest that it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..formats import naming
from ..formats.container import TensorSpec
from ..formats.manifest import ModuleEntry

TORCH_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "U64": torch.uint64, "BF16": torch.bfloat16, "F16": torch.float16,
    "F32": torch.float32,
}  # fmt: skip


#: what a factor is called in the file and in a torch module: peft takes every ``lora_`` in a model for its own
_STORED, _IN_TORCH = "lora_", "factor_"


def buffer_name(stored: str) -> str:
    """Return the name in a torch module of a tensor below a packed module's name: factor_A.x for lora_A.x."""
    return _IN_TORCH + stored.removeprefix(_STORED) if stored.startswith(_STORED) else stored


def stored_name(buffer: str) -> str:
    """Undo ``buffer_name``."""
    return _STORED + buffer.removeprefix(_IN_TORCH) if buffer.startswith(_IN_TORCH) else buffer


@dataclass(frozen=True)
class ModuleLayout:
    """One packed module: its entry, and the tensors below its name (``values``, ``lora_A.residual`` ...)."""

    entry: ModuleEntry
    tensors: tuple[TensorSpec, ...]

    @property
    def n_bytes(self) -> int:
        """Size of all its tensors."""
        return sum(spec.n_bytes for spec in self.tensors)


def module_layout(module: str, entry: ModuleEntry, tensors: Mapping[str, TensorSpec]) -> ModuleLayout:
    """Return the layout of module ``module`` among the ``tensors`` of a file; adapter dtypes are the file's choice."""
    names = [spec.name for spec in naming.module_specs(module, entry)]
    for adapter in entry.adapters:
        spelled = [spell(module, adapter.name) for spell in (naming.lora_a_name, naming.lora_b_name)]
        scales = naming.rank_scales_name(module, adapter.name)
        names += [*spelled, *([scales] if tensors[spelled[0]].dtype == "I8" else [])]
    specs = [TensorSpec(name.removeprefix(module + "."), tensors[name].dtype, tensors[name].shape) for name in names]
    return ModuleLayout(entry, tuple(specs))
