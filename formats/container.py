"""The safetensors container: reading a header, and planning and writing a file whose offsets are known beforehand.

Invariant: every offset is fixed before the first byte of data is written, so tensors may be written in any order and
from several threads, and none is held in memory twice.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from safetensors import SafetensorError, safe_open

from .dtypes import DTYPE_BITS, Array, storage_dtype, tensor_bytes
from .errors import FormatError

ALIGNMENT = 64
#: bytes that are copied or digested at a time, so that no large tensor is held in memory
PIECE_BYTES = 1 << 24
_LENGTH_BYTES = 8
_LFS_POINTER = b"version https://git-lfs"
_LARGEST_OFFSET = 10**18


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the data in bytes."""
        return tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class StoredTensor(TensorSpec):
    """A tensor in a file: ``begin`` and ``end`` are byte positions from the start of the file."""

    begin: int
    end: int


def require_fetched(path: Path) -> None:
    """Refuse a file that parsers would give a wrong reason for.

    Raises:
        FormatError: it cannot be read, or is what Git LFS leaves where it has not fetched a file.
    """
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError as error:
        raise FormatError(f"cannot be read ({error.strerror})", path=path, fix="check the file") from error
    if is_pointer:
        raise FormatError("a Git LFS pointer, not the file (`git lfs pull` fetches it)", path=path, fix="fetch it")


class Container:
    """A safetensors file, memory-mapped read-only and checked by the safetensors parser.

    Raises:
        FormatError: the file is missing, is not safetensors, or uses a dtype this version does not know.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._check_with_safetensors()
        with self.path.open("rb") as file:
            self.identity = identity_of(os.fstat(file.fileno()))
            # Private and writable, because torch refuses read-only buffers; nothing ever writes to it.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.n_bytes = len(self._map)
        length = int.from_bytes(self._map[:_LENGTH_BYTES], "little")
        self.header_bytes = self._map[_LENGTH_BYTES : _LENGTH_BYTES + length]
        header = json.loads(self.header_bytes)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.data_start = _LENGTH_BYTES + length
        self.tensors = {name: self._stored_tensor(name, entry) for name, entry in header.items()}

    def _check_with_safetensors(self) -> None:
        if not self.path.is_file():
            raise FormatError("no such file", path=self.path, fix="check the path")
        require_fetched(self.path)  # safetensors calls every file that it cannot open a missing one
        try:
            with safe_open(self.path, framework="np"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(
                f"not a readable safetensors file ({error})",
                path=self.path,
                fix="it may be truncated or damaged: copy or make it again",
            ) from error

    def _stored_tensor(self, name: str, entry: dict[str, object]) -> StoredTensor:
        # The safetensors parser has checked these types already.
        dtype = cast(str, entry["dtype"])
        shape, offsets = cast("list[int]", entry["shape"]), cast("list[int]", entry["data_offsets"])
        if dtype not in DTYPE_BITS:
            raise FormatError(
                f"dtype {dtype} is unknown to this version", path=self.path, tensor=name, fix="upgrade salr"
            )
        begin, end = (self.data_start + offset for offset in offsets)
        return StoredTensor(name, dtype, tuple(shape), begin, end)

    def path_of(self, name: str) -> Path:
        """Return the file that holds a tensor: this one."""
        return self.path

    def raw(self, name: str) -> memoryview:
        """Return a tensor's bytes without a copy.

        Raises:
            FormatError: there is no such tensor.
        """
        if name not in self.tensors:
            raise FormatError("there is no such tensor", path=self.path, tensor=name)
        tensor = self.tensors[name]
        return memoryview(self._map)[tensor.begin : tensor.end]

    def array(self, name: str) -> Array:
        """Return a tensor as a read-only array without a copy; BF16 as uint16, 8-bit floats as uint8."""
        raw = self.raw(name)
        tensor = self.tensors[name]
        array = np.frombuffer(raw, storage_dtype(tensor.dtype))
        array.flags.writeable = False
        return array.reshape(tensor.shape) if DTYPE_BITS[tensor.dtype] >= 8 else array


def pieces_of(raw: memoryview) -> Iterator[memoryview]:
    """Yield bytes in pieces of at most 16 MB."""
    for start in range(0, len(raw), PIECE_BYTES):
        yield raw[start : start + PIECE_BYTES]


def identity_of(status: os.stat_result) -> tuple[int, ...]:
    """Return what tells a file from another that took its name, or from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def alignment_of(n_bytes: int) -> int:
    """Return the largest power of two up to 64 that divides ``n_bytes``: what a tensor's neighbours can rely on."""
    return min(ALIGNMENT, n_bytes & -n_bytes) if n_bytes else ALIGNMENT


@dataclass(frozen=True)
class Layout:
    """Where everything goes: byte positions from the start of the file, in the order of the data.

    ``last`` is written after all others and may have any size: the header keeps room for it.
    """

    header_length: int
    tensors: Mapping[str, StoredTensor]
    last: str | None

    @property
    def data_start(self) -> int:
        """Byte position of the first tensor."""
        return _LENGTH_BYTES + self.header_length

    @property
    def last_begin(self) -> int:
        """Byte position where the last tensor begins, or where the file ends without one."""
        return max((tensor.end for tensor in self.tensors.values()), default=self.data_start)

    def header(self, metadata: Mapping[str, str], last_bytes: int = 0) -> bytes:
        """Return the JSON header (without its length), padded with spaces to the planned length."""
        text = _header_json(metadata, self.tensors.values(), self.data_start, self.last, self.last_begin, last_bytes)
        assert len(text) <= self.header_length, "metadata grew after planning"
        return text.ljust(self.header_length)

    def prefix(self) -> bytes:
        """Return the 8 bytes before the header."""
        return self.header_length.to_bytes(_LENGTH_BYTES, "little")


def plan_layout(specs: Iterable[TensorSpec], metadata: Mapping[str, str], *, last: str | None = None) -> Layout:
    """Place tensors so that each starts at a multiple of the largest power of two (up to 64) dividing its size.

    Args:
        specs: tensors with sizes known in advance, in the order wanted within one alignment.
        metadata: strings of the length they will finally have.
        last: name of a U8 tensor of unknown size that ends the file.
    """
    ordered = sorted(specs, key=lambda spec: -alignment_of(spec.n_bytes))
    placed, position = [], 0
    for spec in ordered:
        placed.append(StoredTensor(spec.name, spec.dtype, spec.shape, position, position + spec.n_bytes))
        position += spec.n_bytes
    longest = len(_header_json(metadata, placed, 0, last, position, _LARGEST_OFFSET))
    length = -(-(_LENGTH_BYTES + longest) // ALIGNMENT) * ALIGNMENT - _LENGTH_BYTES
    start = _LENGTH_BYTES + length
    moved = {t.name: StoredTensor(t.name, t.dtype, t.shape, start + t.begin, start + t.end) for t in placed}
    return Layout(length, moved, last)


def _header_json(
    metadata: Mapping[str, str],
    tensors: Iterable[StoredTensor],
    start: int,
    last: str | None,
    last_begin: int,
    last_bytes: int,
) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for tensor in tensors:
        offsets = [tensor.begin - start, tensor.end - start]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    if last is not None:
        begin = last_begin - start
        header[last] = {"dtype": "U8", "shape": [last_bytes], "data_offsets": [begin, begin + last_bytes]}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
