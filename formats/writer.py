"""Writing .salr files: tensors in any order, digests as they go, header and manifest last.

Invariant: until ``finish`` returns, no file of the final name exists (or the old one is untouched).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import xxhash

from .container import Layout, StoredTensor, TensorSpec, plan_layout
from .dtypes import Array, byte_view
from .errors import OutputError
from .manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from .output_file import DataFile
from .partial_output import PartialOutput, new_output, sync_directory
from .sharding import INDEX_NAME, index_json
from .validation import ZERO_DIGEST, digest, header_digest

_SINGLE = ""


def salr_metadata(manifest_digest: str = ZERO_DIGEST, header: str = ZERO_DIGEST) -> dict[str, str]:
    """Return the safetensors metadata of a .salr file."""
    return {
        "format": "pt",
        "salr_version": FORMAT_VERSION,
        "salr_manifest_xxh3": manifest_digest,
        "salr_header_xxh3": header,
    }


@dataclass(frozen=True)
class _Target:
    """One file that is being written."""

    layout: Layout
    data: DataFile


class TensorStream:
    """Writes one tensor from consecutive pieces, from one thread."""

    def __init__(self, writer: SalrWriter, name: str) -> None:
        self._writer, self._name = writer, name
        self._target, self._tensor = writer.place(name)
        self._position, self._state = self._tensor.begin, xxhash.xxh3_128()

    def write(self, piece: memoryview | bytes) -> None:
        """Write the next piece.

        Raises:
            OutputError: the disk is full or failing, or more bytes come than were planned.
        """
        self._check(self._position + len(piece) <= self._tensor.end, len(piece))
        self._state.update(piece)
        self._target.data.write(self._position, piece)
        self._position += len(piece)

    def close(self) -> str:
        """End the tensor and return its digest.

        Raises:
            OutputError: fewer bytes came than were planned.
        """
        self._check(self._position == self._tensor.end)
        self._writer.written(self._name, self._state.hexdigest())
        return self._state.hexdigest()

    def _check(self, is_right: bool, more: int = 0) -> None:
        if not is_right:
            raise OutputError(
                f"{self._position + more - self._tensor.begin} bytes were produced",
                path=self._writer.path,
                tensor=self._name,
                needed=f"{self._tensor.n_bytes}",
            )


class SalrWriter:
    """Writes tensors at planned places; a context manager that leaves nothing behind unless ``finish`` was called.

    Args:
        target: the file to make; or the locked folder of an output that the caller opened and closes.
        specs: every tensor except the manifest; or those of each shard by the shard's file name, and ``target``
            becomes a directory.
        force: replace an existing file.
        fresh: discard what an interrupted run left.

    Raises:
        OutputError: see ``PartialOutput``; or the disk is too small.
    """

    def __init__(
        self,
        target: str | Path | PartialOutput,
        specs: Iterable[TensorSpec] | Mapping[str, Iterable[TensorSpec]],
        *,
        force: bool = False,
        fresh: bool = False,
    ) -> None:
        is_mine = not isinstance(target, PartialOutput)
        self._partial = target if isinstance(target, PartialOutput) else new_output(target, force=force, fresh=fresh)
        by_file = specs if isinstance(specs, Mapping) else {_SINGLE: specs}
        self._checksums: dict[str, str] = {}
        self._lock = threading.Lock()
        self._targets: dict[str, _Target] = {}
        try:
            self._open(by_file)
        except BaseException:
            self._close_files()
            if is_mine:
                self._partial.close()
            raise
        self._places = {name: target for target in self._targets.values() for name in target.layout.tensors}

    def _open(self, by_file: Mapping[str, Iterable[TensorSpec]]) -> None:
        layouts = {file: plan_layout(specs, salr_metadata(), last=MANIFEST_NAME) for file, specs in by_file.items()}
        self._partial.check_space(sum(layout.last_begin for layout in layouts.values()))
        if _SINGLE not in layouts:
            self._partial.data.mkdir(exist_ok=True)
        for file, layout in layouts.items():
            self._targets[file] = _Target(layout, DataFile(self._partial.data / file, self.path / file))

    @property
    def path(self) -> Path:
        """The output's final name."""
        return self._partial.path

    @property
    def checksums(self) -> Mapping[str, str]:
        """Digests of the tensors that are written."""
        return self._checksums

    def place(self, name: str) -> tuple[_Target, StoredTensor]:
        """Return where a planned tensor goes."""
        target = self._places[name]
        return target, target.layout.tensors[name]

    def plans(self, name: str) -> bool:
        """Tell whether a tensor is planned here."""
        return name in self._places

    def wants(self, name: str) -> bool:
        """Tell whether a tensor is planned here and not written yet."""
        return name in self._places and name not in self._checksums

    def written(self, name: str, tensor_digest: str) -> None:
        """Note that all bytes of a tensor are written."""
        with self._lock:
            self._checksums[name] = tensor_digest

    def stream(self, name: str) -> TensorStream:
        """Return a stream that takes the tensor piece by piece."""
        return TensorStream(self, name)

    def write(self, name: str, array: Array) -> None:
        """Write one whole tensor from an array whose bytes are the tensor's bytes."""
        self.write_pieces(name, [byte_view(array)])

    def write_pieces(self, name: str, pieces: Iterable[memoryview | bytes]) -> str:
        """Write one whole tensor from consecutive pieces of bytes, and return its digest."""
        stream = self.stream(name)
        for piece in pieces:
            stream.write(piece)
        return stream.close()

    def sync(self) -> None:
        """Wait until everything written so far is on the disk."""
        for target in self._targets.values():
            target.data.sync()

    def finish(self, manifest: Manifest | Mapping[str, Manifest]) -> int:
        """Write manifest and header of each file, give the output its name, and return its size in bytes.

        Args:
            manifest: of the file, or of each shard by its file name; their checksums are filled in.

        Raises:
            OutputError: a planned tensor was never written.
        """
        missing = sorted(set(self._places) - set(self._checksums))
        if missing:
            raise OutputError("a planned tensor was never written", path=self.path, tensor=missing[0])
        manifests = manifest if isinstance(manifest, Mapping) else {_SINGLE: manifest}
        n_bytes = sum(self._finish_file(file, manifests[file]) for file in self._targets)
        if _SINGLE not in self._targets:
            self._write_index()
        self._partial.commit()
        return n_bytes

    def _write_index(self) -> None:
        files = {name: file for file, target in self._targets.items() for name in target.layout.tensors}
        total = sum(self.place(name)[1].n_bytes for name in files)
        index = DataFile(self._partial.data / INDEX_NAME, self.path / INDEX_NAME)
        data = index_json(files, total)
        index.write(0, data)
        index.finish(len(data))
        sync_directory(self._partial.data)

    def _finish_file(self, file: str, manifest: Manifest) -> int:
        layout, output = self._targets[file].layout, self._targets[file].data
        checksums = {name: self._checksums[name] for name in layout.tensors}
        data = replace(manifest, checksums=checksums).to_json()
        header = layout.header(salr_metadata(digest(data)), len(data))
        final = layout.header(salr_metadata(digest(data), header_digest(header, ZERO_DIGEST)), len(data))
        output.write(layout.last_begin, data)
        output.write(0, layout.prefix() + final)
        output.finish(layout.last_begin + len(data))
        return layout.last_begin + len(data)

    def _close_files(self) -> None:
        for target in self._targets.values():
            target.data.close()

    def __enter__(self) -> SalrWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_files()
        self._partial.close()
