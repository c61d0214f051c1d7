"""Checkpoints made from others: tensors computed, copied under other names or left out, and a changed config.

Invariant: nothing is computed before it is asked for, and then a part at a time; every input keeps an account of what
became of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...formats.dtypes import byte_view
from .checkpoint import FLOAT_TORCH_DTYPES, Asset, Checkpoint, SourceTensor, parts_of

#: from (start, stop) to that part of a tensor along its first dimension, in float32
Rows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Computed:
    """A tensor that is computed in float32: its dtype once stored, its shape, the input it is made from, and how."""

    dtype: str
    shape: tuple[int, ...]
    origin: str
    remark: str
    rows: Rows


@dataclass
class Changes:
    """What a derived checkpoint has besides or instead of its base's tensors.

    ``copies`` maps a name to the base's tensor that it is; ``left_out`` gives fate and reason of tensors that are none
    of the model's any more; ``config`` replaces keys.
    """

    computed: dict[str, Computed] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, tuple[str, str]] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    dropped_config: tuple[str, ...] = ()


class DerivedCheckpoint(Checkpoint):
    """``base`` with ``changes``."""

    def __init__(self, base: Checkpoint, changes: Changes) -> None:
        self._base, self._changes, self.provenance = base, changes, base.provenance
        self.directory = base.directory
        kept = {key: value for key, value in base.config.items() if key not in changes.dropped_config}
        self.config = kept | changes.config
        self.tensors = {name: tensor for name, tensor in base.tensors.items() if name not in changes.left_out}
        self.tensors |= {name: replace(base.tensors[source], name=name) for name, source in changes.copies.items()}
        for name, made in changes.computed.items():
            file = base.inputs[made.origin].file
            self.tensors[name] = SourceTensor(name, made.dtype, made.shape, file)

    @property
    def inputs(self) -> Mapping[str, SourceTensor]:
        """The tensors of the base's files."""
        return self._base.inputs

    @property
    def location(self) -> Path:
        """The directory or file that the base is."""
        return self._base.location

    @property
    def folder(self) -> Path:
        """Where the base's config and tokenizer lie."""
        return self._base.folder

    def origin(self, name: str) -> str:
        """Return the input that tensor ``name`` is made from."""
        if name in self._changes.computed:
            return self._changes.computed[name].origin
        return self._base.origin(self._changes.copies.get(name, name))

    def remark(self, name: str) -> str:
        """Return what was done to a tensor, by the base and here."""
        source = self._changes.copies.get(name, name)
        own = self._changes.computed[name].remark if name in self._changes.computed else ""
        before = self._base.remark(source) if source in self._base.tensors else ""
        return ", ".join(filter(None, [before, own, self._changes.remarks.get(name, "")]))

    def set_aside(self) -> Mapping[str, tuple[str, str]]:
        """Return fate and reason of each input that no tensor is made from."""
        used = {self.origin(name) for name in self.tensors}
        own = {self._base.origin(name): fate for name, fate in self._changes.left_out.items()}
        return {key: fate for key, fate in {**self._base.set_aside(), **own}.items() if key not in used}

    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes in its dtype; memory-mapped where it is not computed."""
        if name in self._changes.computed:
            return memoryview(b"".join(self.pieces(name)))
        return self._base.raw(self._changes.copies.get(name, name))

    def read(self, name: str) -> torch.Tensor:
        """Return a float tensor; in float32 where it is computed."""
        if name in self._changes.computed:
            return self.rows(name, 0, self.tensors[name].shape[0])
        return self._base.read(self._changes.copies.get(name, name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a part of a float tensor along its first dimension, as ``read`` does."""
        if name in self._changes.computed:
            return self._changes.computed[name].rows(start, stop)
        return self._base.rows(self._changes.copies.get(name, name), start, stop)

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in pieces of about 16 MB; a computed one part by part."""
        if name not in self._changes.computed:
            yield from self._base.pieces(self._changes.copies.get(name, name))
            return
        tensor = self.tensors[name]
        dtype = FLOAT_TORCH_DTYPES[tensor.dtype]
        for start, stop in parts_of(tensor):
            part = self.rows(name, start, stop)
            yield byte_view(part.to(dtype).contiguous().view(torch.uint8).numpy())

    def weight_paths(self) -> list[Path]:
        """Return the base's weight files in name order."""
        return self._base.weight_paths()

    def source_paths(self) -> list[Path]:
        """Return the base's files that shape the bytes."""
        return self._base.source_paths()

    def assets(self) -> list[Asset]:
        """Return the base's files, config.json with what was changed."""
        if self.config == self._base.config:
            return self._base.assets()
        data = (json.dumps(self.config, indent=2) + "\n").encode()
        return [replace(a, content=data) if a.name == "config.json" else a for a in self._base.assets()]
