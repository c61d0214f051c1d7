"""Opening one .salr file: what header and manifest can tell is checked before anything else is read."""

from __future__ import annotations

from pathlib import Path

from . import validation
from .container import Container
from .manifest import MANIFEST_NAME, Manifest, parse_manifest


def open_checked(path: str | Path) -> tuple[Container, Manifest]:
    """Return a file's container and manifest.

    Raises:
        FormatError: header or manifest break a rule of docs/format.md (also VersionError and ChecksumError).
    """
    container = Container(path)
    validation.check_version(container)
    validation.check_header(container)
    manifest = parse_manifest(bytes(container.raw(MANIFEST_NAME)), str(path))
    validation.check_manifest(container, manifest)
    return container, manifest
