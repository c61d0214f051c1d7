"""Reading a .salr file: lazily, memory-mapped, and trusting nothing.

Invariant: opening checks header and manifest; a module's tensors are checked at their first access, before any of
their bytes is handed out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from . import naming, validation
from .checking import Finding, IntegrityCheck
from .container import Container, StoredTensor, identity_of
from .dtypes import Array, F32Array, to_float32
from .errors import ChecksumError, FormatError
from .manifest import MANIFEST_NAME, RESIDUAL, Manifest, ModuleEntry
from .module import AdapterStack, LowRankPair, ModuleTensors, stack_adapters
from .opening import open_checked
from .sharding import ShardSet, index_path, open_shards
from .values import QUANTIZED_BITS


class SalrFile:
    """A .salr file, opened for reading; or a directory of shards (or its index), read as if it were one file.

    Raises:
        FormatError: header or manifest break a rule of docs/format.md (also VersionError and ChecksumError), or shards
            are missing or do not belong together.
    """

    def __init__(self, path: str | Path) -> None:
        index = index_path(Path(path))
        self._container: Container | ShardSet
        self.manifest: Manifest
        if index is None:
            self._container, self.manifest = open_checked(path)
        else:
            self._container = open_shards(index)
            self.manifest = self._container.manifest
        self._checked: set[str] = set()

    @property
    def path(self) -> Path:
        """The file's path, or that of the shards' directory."""
        return self._container.path

    @property
    def is_sharded(self) -> bool:
        """Tell whether this is a directory of shards."""
        return isinstance(self._container, ShardSet)

    def path_of(self, name: str) -> Path:
        """Return the file that holds a tensor: a shard of them, or this one."""
        return self._container.path_of(name)

    def require_one_file(self, purpose: str) -> None:
        """Refuse shards for a ``purpose`` that needs one file.

        Raises:
            FormatError: this is a directory of shards, or one of them.
        """
        if self.is_sharded or self.manifest.shard is not None:
            folder = self.path if self.is_sharded else self.path.parent
            found = f"{purpose} needs one file"
            raise FormatError(found, path=self.path, fix=f"make it with `salr join {folder} OUT.salr`")

    def require_whole(self, purpose: str) -> None:
        """Refuse one shard of several for a ``purpose`` that needs the whole model; their directory is whole.

        Raises:
            FormatError: see above.
        """
        number, n_shards = self.manifest.shard or (1, 1)
        if not self.is_sharded and n_shards > 1:
            raise FormatError(
                f"is shard {number} of {n_shards}",
                path=self.path,
                needed=f"the whole model for {purpose}",
                fix=f"give the directory of all shards, {self.path.parent}",
            )

    def is_current(self) -> bool:
        """Tell whether the path still leads to the very file that was opened."""
        return self.path.exists() and identity_of(self.path.stat()) == self._container.identity

    @property
    def n_bytes(self) -> int:
        """Size of the file in bytes."""
        return self._container.n_bytes

    @property
    def modules(self) -> Mapping[str, ModuleEntry]:
        """The packed modules by name."""
        return self.manifest.modules

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Every tensor of the file with dtype, shape and byte positions."""
        return self._container.tensors

    @property
    def assets(self) -> list[str]:
        """Names of the files carried along (config.json, tokenizer ...)."""
        prefix = naming.ASSET_PREFIX
        return sorted(name.removeprefix(prefix) for name in self.tensors if name.startswith(prefix))

    def asset(self, name: str) -> bytes:
        """Return the bytes of a carried file, whose digest is checked first.

        Raises:
            FormatError: there is no such file, or it is damaged (ChecksumError).
        """
        data = bytes(self._container.raw(naming.ASSET_PREFIX + name))
        self.check_digest(naming.ASSET_PREFIX + name)
        return data

    def dense_tensors(self) -> list[str]:
        """Return the names of the tensors kept as they were in the source."""
        packed = {name for module in self.modules for name in self.module_tensor_names(module)}
        return [
            name
            for name in self.tensors
            if name not in packed and name != MANIFEST_NAME and not name.startswith(naming.ASSET_PREFIX)
        ]

    def module_tensor_names(self, module: str) -> list[str]:
        """Return the names of all tensors of a packed module, adapters included."""
        return naming.module_tensor_names(module, self._entry(module), self.tensors)

    def tensor(self, name: str) -> Array:
        """Return a tensor without a copy, read-only; BF16 as uint16, 8-bit floats as uint8.

        Raises:
            FormatError: there is no such tensor.
        """
        return self._container.array(name)

    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes without a copy."""
        return self._container.raw(name)

    def module(self, name: str) -> ModuleTensors:
        """Return a module's tensors, checked at the first access.

        Raises:
            FormatError: there is no such module, or its tensors contradict each other.
        """
        entry = self._entry(name)
        sparse = entry.pattern != "dense"
        scales = naming.scales_name(name)
        tensors = ModuleTensors(
            entry,
            self.tensor(naming.values_name(name)),
            self.tensor(naming.bitmap_name(name)) if sparse else None,
            self.tensor(naming.row_offsets_name(name)) if sparse else None,
            to_float32(self.tensor(scales), self.tensors[scales].dtype) if entry.encoding in QUANTIZED_BITS else None,
        )
        if name not in self._checked:
            validation.check_module(tensors, str(self.path_of(naming.values_name(name))), name)
            self._checked.add(name)
        return tensors

    def pairs(self, module: str) -> list[LowRankPair]:
        """Return a module's adapters as stored, in the manifest's order."""
        pairs = []
        for adapter in self._entry(module).adapters:
            name_a, name_b = naming.lora_a_name(module, adapter.name), naming.lora_b_name(module, adapter.name)
            with np.errstate(over="ignore"):
                scaling = np.full(adapter.rank, adapter.scaling, np.float32)
                if self._is_int8(module, adapter.name):
                    scaling = scaling * self.tensor(naming.rank_scales_name(module, adapter.name))
            validation.check_scaling(scaling, str(self.path_of(name_a)), module, adapter.name)
            dtype = self.tensors[name_a].dtype
            pairs.append(LowRankPair(adapter.name, dtype, self.tensor(name_a), self.tensor(name_b), scaling))
        return pairs

    def adapters(self, module: str, names: list[str] | None = None) -> AdapterStack:
        """Return a module's adapters concatenated along the rank, as runtimes use them; ``names`` selects some."""
        pairs = [pair for pair in self.pairs(module) if names is None or pair.name in names]
        return stack_adapters(pairs, self._entry(module).shape)

    def dense(self, module: str, *, residual: bool = True, adapters: bool = False) -> F32Array:
        """Return the weight ([E,] N, K) in float32: kept weights, plus the residual, plus trained adapters if asked."""
        weight = self.module(module).dense()
        names = [a.name for a in self._entry(module).adapters if (residual if a.name == RESIDUAL else adapters)]
        return weight + self.adapters(module, names).product() if names else weight

    def slice(self, module: str, *, rows: slice = slice(None), columns: slice = slice(None)) -> ModuleTensors:
        """Return the canonical tensors of a part of a module, for tensor parallelism.

        Raises:
            FormatError: the part is empty, skips rows or columns, or begins inside a group of scales.
        """
        validation.check_part(self._entry(module), rows, columns, str(self.path), module)
        return self.module(module).part(rows, columns)

    def check_digest(self, name: str) -> None:
        """Check one tensor's bytes.

        Raises:
            ChecksumError: they differ from their digest.
        """
        problem = self.digest_problem(name)
        if problem is not None:
            raise problem

    def digest_problem(self, name: str) -> ChecksumError | None:
        """Return what is wrong with a tensor's digest."""
        if validation.digest(self.raw(name)) == self.manifest.checksums[name]:
            return None
        return validation.damaged(self.path_of(name), name)

    def module_problem(self, name: str) -> FormatError | None:
        """Return the first thing that is wrong with a module's structure."""
        try:
            self.module(name)
            self.pairs(name)
        except FormatError as error:
            return error
        return None

    def check_all(self) -> Iterator[Finding]:
        """Check every tensor's digest and every module's structure on threads; yield each name with its error or None.

        Digests come first, in the order of their names.
        """
        with IntegrityCheck(self) as check:
            yield from check.findings()

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Check the whole file on threads while the body works with it; leaving the body waits for the check.

        Raises:
            FormatError: a digest or a module's structure is wrong.
        """
        with IntegrityCheck(self) as check, check.awaited():
            yield

    def _is_int8(self, module: str, adapter: str) -> bool:
        """Tell whether an adapter's factors are int8 and have rank_scales."""
        return self.tensors[naming.lora_a_name(module, adapter)].dtype == "I8"

    def _entry(self, module: str) -> ModuleEntry:
        if module not in self.modules:
            raise FormatError("there is no packed module of this name", path=self.path, tensor=module)
        return self.modules[module]
