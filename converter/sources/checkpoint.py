"""Checkpoints on disk: Hugging Face directories with safetensors (one file or shards) or with torch .bin files.

Invariant: nothing is read before it is asked for, tensors keep their own names and bytes, and no code from a
checkpoint is ever run.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from ...formats.container import PIECE_BYTES, Container, pieces_of, require_fetched
from ...formats.dtypes import FLOAT_ENCODINGS, storage_dtype
from ...formats.errors import FormatError, SourceError

TORCH_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
}  # fmt: skip
FLOAT_TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TORCH_ENCODINGS = {encoding: FLOAT_TORCH_DTYPES[dtype] for encoding, dtype in FLOAT_ENCODINGS.items()}

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
_ASSETS = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", *LICENCES, "additional_chat_templates/*.jinja",
    "[0-9]_*/config.json",
)  # fmt: skip
_NOT_ASSETS = re.compile(r".*\.index\.json|adapter_config\.json|trainer_state\.json|training_args\..*")
#: of float32 that are computed at a time; sums over parts, and so their last bits, depend on it
_PART_BYTES = 1 << 24


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of a checkpoint: name, safetensors dtype, shape, and the file it lies in.

    Of a tensor that is computed, the dtype is what it is rounded to where it is stored as it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


class WeightFile(ABC):
    """One file with tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def tensors(self) -> dict[str, SourceTensor]:
        """Return what the file holds."""

    @abstractmethod
    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes, memory-mapped."""


@contextmanager
def refusing_unreadable(path: Path) -> Iterator[None]:
    """Say of a checkpoint's file what is wrong with a file."""
    try:
        yield
    except FormatError as error:
        raise SourceError(error.found, path=path, fix="download or save this checkpoint file again") from error


class SafetensorsFile(WeightFile):
    """A .safetensors file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with refusing_unreadable(path):
            self._container = Container(path)

    def tensors(self) -> dict[str, SourceTensor]:  # noqa: D102 - as in the base class
        return {
            t.name: SourceTensor(t.name, t.dtype, t.shape, self.path.name) for t in self._container.tensors.values()
        }

    def raw(self, name: str) -> memoryview:  # noqa: D102 - as in the base class
        return self._container.raw(name)


class TorchFile(WeightFile):
    """A torch .bin file, read with ``weights_only`` so that no pickled code runs."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with refusing_unreadable(path):
            require_fetched(path)
        try:
            loaded = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises many types for damaged or unsafe pickles; all mean the same here
            raise SourceError(
                f"torch cannot load it safely ({str(error).splitlines()[0][:120]})",
                path=path,
                fix="save the checkpoint as safetensors",
            ) from error
        self._tensors: dict[str, torch.Tensor] = _table_of_tensors(loaded, path)

    def tensors(self) -> dict[str, SourceTensor]:  # noqa: D102 - as in the base class
        for name, tensor in self._tensors.items():
            if tensor.dtype not in TORCH_DTYPES:
                raise SourceError(f"dtype {tensor.dtype} has no safetensors form", path=self.path, tensor=name)
        return {
            name: SourceTensor(name, TORCH_DTYPES[tensor.dtype], tuple(tensor.shape), self.path.name)
            for name, tensor in self._tensors.items()
        }

    def raw(self, name: str) -> memoryview:  # noqa: D102 - as in the base class
        flat = self._tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
        return flat.numpy().data


def _table_of_tensors(loaded: object, path: Path) -> dict[str, torch.Tensor]:
    """Refuse what torch loaded from ``path`` unless it is a table of plain tensors by name."""
    fix = "save the model's state_dict, or save it as safetensors"
    if not isinstance(loaded, dict):
        raise SourceError(f"holds a {type(loaded).__name__}", path=path, needed="a table of tensors", fix=fix)
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            found = f"is a {type(value).__name__}" if isinstance(name, str) else "has no name"
            raise SourceError(found, path=path, tensor=str(name), needed="a dense tensor by name", fix=fix)
    return loaded


@dataclass(frozen=True)
class Asset:
    """A small file to carry along: its relative name, where it came from, and its content where that was changed."""

    name: str
    path: Path
    content: bytes | None = None

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return self.path.stat().st_size if self.content is None else len(self.content)

    def read(self) -> bytes:
        """Return its bytes."""
        return self.path.read_bytes() if self.content is None else self.content


class Checkpoint:
    """A Hugging Face model directory.

    ``inputs`` are the tensors of its files and ``tensors`` those of the model, by name: the same ones here, not so in
    checkpoints that are derived from others.

    Raises:
        SourceError: config or weights are missing, truncated, or the index names what is not there.
    """

    #: where it came from and its licence, as far as that is known: ``repository``, ``revision``, ``license``
    provenance: Mapping[str, str] = MappingProxyType({})

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            is_ours = self.directory.suffix == ".salr" and self.directory.is_file()
            raise SourceError(
                "is a .salr file already" if is_ours else "a file" if self.directory.exists() else "no such directory",
                path=self.directory,
                needed="a Hugging Face model directory",
                fix="make it dense first: salr unpack" if is_ours else None,
            )
        self.config: dict[str, Any] = read_json(self.directory / "config.json", "every model directory has one")
        self._files = {file.path.name: file for file in open_weights(self.directory, "model", "pytorch_model")}
        self.tensors = self._collect_tensors()

    def _collect_tensors(self) -> dict[str, SourceTensor]:
        tensors: dict[str, SourceTensor] = {}
        for file in self._files.values():
            for name, tensor in file.tensors().items():
                if name in tensors:
                    raise SourceError(
                        f"stands in {tensors[name].file} and in {tensor.file}", path=self.directory, tensor=name
                    )
                tensors[name] = tensor
        return tensors

    @property
    def inputs(self) -> Mapping[str, SourceTensor]:
        """The tensors of the files, by the names they have there."""
        return self.tensors

    def origin(self, name: str) -> str:
        """Return the input that tensor ``name`` is made from."""
        return name

    def remark(self, name: str) -> str:
        """Return what was done to a tensor before it is packed or kept, in words; empty for nothing."""
        return ""

    def set_aside(self) -> Mapping[str, tuple[str, str]]:
        """Return fate and reason of each input that no tensor is made from."""
        return {}

    @property
    def named(self) -> str:
        """How to name it again: the hub's id, or the path of the directory or file."""
        return self.provenance.get("repository") or str(self.location)

    @property
    def location(self) -> Path:
        """The directory or file it is."""
        return self.directory

    @property
    def folder(self) -> Path:
        """Where config and tokenizer lie."""
        return self.directory

    @property
    def architecture(self) -> str | None:
        """The class that config.json names, if any."""
        return architecture_of(self.config)

    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes in its own dtype, memory-mapped."""
        return self._files[self.tensors[name].file].raw(name)

    def read(self, name: str) -> torch.Tensor:
        """Return a float tensor, memory-mapped, in its own dtype; in float32 where it is computed."""
        tensor = self.tensors[name]
        return tensor_from_bytes(self.raw(name), tensor.dtype, tensor.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Return a part of a float tensor along its first dimension, as ``read`` does."""
        return self.read(name)[start:stop]

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Return a tensor's bytes in pieces of at most 16 MB."""
        return pieces_of(self.raw(name))

    def weight_paths(self) -> list[Path]:
        """Return the weight files in name order."""
        return [file.path for _, file in sorted(self._files.items())]

    def source_paths(self) -> list[Path]:
        """Return the files that shape the bytes: config and weights."""
        return [self.directory / "config.json", *self.weight_paths()]

    def assets(self) -> list[Asset]:
        """Return config, tokenizer, chat template, processor and licence files, by relative name."""
        found = {path for pattern in _ASSETS for path in self.directory.glob(pattern)}
        paths = sorted(path for path in found if path.is_file() and not _NOT_ASSETS.fullmatch(path.name))
        return [Asset(path.relative_to(self.directory).as_posix(), path) for path in paths]


def parts_of(tensor: SourceTensor) -> Iterator[tuple[int, int]]:
    """Yield ranges along the first dimension of about 16 MB in float32."""
    step = max(1, _PART_BYTES // (4 * max(1, prod(tensor.shape[1:]))))
    for start in range(0, tensor.shape[0], step):
        yield start, min(start + step, tensor.shape[0])


def architecture_of(config: Mapping[str, Any]) -> str | None:
    """Return the class that a config.json names, if any."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def tensor_from_bytes(raw: memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """View bytes as a BF16, F16 or F32 tensor, without a copy where they are aligned; callers must not write to it."""
    array = np.frombuffer(raw, storage_dtype(dtype))
    if not array.flags.aligned:
        array = array.copy()
    # int16 stands for BF16, which NumPy does not have.
    tensor = torch.from_numpy(array.view(np.int16) if dtype == "BF16" else array)
    return tensor.view(FLOAT_TORCH_DTYPES[dtype]).reshape(shape)


def read_json(path: Path, why: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        SourceError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot be read ({error.strerror})", path=path, fix=why) from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"is not JSON ({error})", path=path, fix="save it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"holds a {type(value).__name__}", path=path, needed="a JSON object")
    return value


def open_weights(directory: Path, *stems: str) -> list[WeightFile]:
    """Open the weight files of a directory: safetensors first, then .bin, one file or what an index lists.

    Raises:
        SourceError: there are none, one cannot be read, or the index names a file or a tensor that is missing.
    """
    for suffix in (".safetensors", ".bin"):
        for stem in stems:
            single = directory / f"{stem}{suffix}"
            index = directory / f"{stem}{suffix}.index.json"
            if single.is_file():
                return [_open_weight_file(single)]
            if index.is_file():
                return _open_indexed(index)
    wanted = " or ".join(f"{stem}.safetensors" for stem in stems)
    raise SourceError("there are no weights here", path=directory, needed=f"{wanted}, shards with an index, or .bin")


def _open_indexed(index: Path) -> list[WeightFile]:
    weight_map = read_json(index, "the index lists the shards").get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise SourceError("has no weight_map", path=index, fix="save the checkpoint again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise SourceError(f"names shard {name!r}, which is not there", path=index, fix="download the missing shard")
    files = {name: _open_weight_file(index.parent / name) for name in names}
    held = {name: set(file.tensors()) for name, file in files.items()}
    for tensor, name in weight_map.items():
        if tensor not in held[str(name)]:
            raise SourceError(
                f"the index lists it in {name}, which lacks it",
                path=index,
                tensor=tensor,
                fix="download or save the checkpoint again",
            )
    return list(files.values())


def _open_weight_file(path: Path) -> WeightFile:
    """Open a .safetensors or .bin file."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else TorchFile(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 digest of a file."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            state.update(piece)
    return state.hexdigest()
