"""Writing a .salr file: tensors in any order, digests as they go, header and manifest last.

Invariant: until ``finish`` returns, no file of the final name exists (or the old one is untouched).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import xxhash

from .container import TensorSpec, plan_layout
from .dtypes import Array, byte_view
from .errors import OutputError
from .manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest
from .output_file import OutputFile
from .validation import ZERO_DIGEST, digest, header_digest


def salr_metadata(manifest_digest: str = ZERO_DIGEST, header: str = ZERO_DIGEST) -> dict[str, str]:
    """Return the safetensors metadata of a .salr file."""
    return {
        "format": "pt",
        "salr_version": FORMAT_VERSION,
        "salr_manifest_xxh3": manifest_digest,
        "salr_header_xxh3": header,
    }


class SalrWriter:
    """Writes tensors at planned places; a context manager that leaves nothing behind unless ``finish`` was called.

    Args:
        path: the file to make.
        specs: every tensor except the manifest.
        force: replace an existing file.
        fresh: discard what an interrupted run left.

    Raises:
        OutputError: see ``OutputFile``.
    """

    def __init__(
        self, path: str | Path, specs: Iterable[TensorSpec], *, force: bool = False, fresh: bool = False
    ) -> None:
        self._layout = plan_layout(specs, salr_metadata(), last=MANIFEST_NAME)
        self._checksums: dict[str, str] = {}
        self._lock = threading.Lock()
        self._file = OutputFile(path, self._layout.last_begin, force=force, fresh=fresh)

    def __enter__(self) -> SalrWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(None, None, None)

    def write(self, name: str, array: Array) -> None:
        """Write one whole tensor from an array whose bytes are the tensor's bytes."""
        self.write_pieces(name, [byte_view(array)])

    def write_pieces(self, name: str, pieces: Iterable[memoryview | bytes]) -> str:
        """Write one whole tensor from consecutive pieces of bytes, and return its digest."""
        tensor = self._layout.tensors[name]
        position, state = tensor.begin, xxhash.xxh3_128()
        for piece in pieces:
            state.update(piece)
            self._file.write(position, piece)
            position += len(piece)
        if position != tensor.end:
            raise OutputError(
                f"{position - tensor.begin} bytes were produced",
                path=self._file.path,
                tensor=name,
                needed=f"{tensor.n_bytes}",
            )
        with self._lock:
            self._checksums[name] = state.hexdigest()
        return state.hexdigest()

    def finish(self, manifest: Manifest) -> int:
        """Write manifest (its checksums filled in) and header, and give the file its name; return its size in bytes.

        Raises:
            OutputError: a planned tensor was never written.
        """
        missing = sorted(set(self._layout.tensors) - set(self._checksums))
        if missing:
            raise OutputError("a planned tensor was never written", path=self._file.path, tensor=missing[0])
        data = replace(manifest, checksums=self._checksums).to_json()
        header = self._layout.header(salr_metadata(digest(data)), len(data))
        final = self._layout.header(salr_metadata(digest(data), header_digest(header, ZERO_DIGEST)), len(data))
        self._file.write(self._layout.last_begin, data)
        self._file.write(0, self._layout.prefix() + final)
        self._file.commit()
        return self._layout.last_begin + len(data)
