"""What a user may name as a model or an adapter: a directory, a .gguf file, or an id of the Hugging Face hub.

Invariant: whatever it is, the rest of the converter sees a directory or a checkpoint of 16- or 32-bit floats.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ...formats.errors import OptionError, SourceError
from ..adapters.binding import bind
from ..adapters.source import Adapter, is_adapter_directory
from ..options import ConvertOptions
from .checkpoint import Checkpoint
from .float8 import dequantized
from .gguf_checkpoint import gguf_file, open_gguf

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = (
    "*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md", "additional_chat_templates/*.jinja",
)  # fmt: skip
#: for a model that has no safetensors
_TORCH_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
#: second copies of the weights that many models have
_COPIES = ("*/*.safetensors", "consolidated*.safetensors")


@dataclass(frozen=True)
class Located:
    """A directory or file on this machine, and where it came from if it was the hub: its id and commit."""

    path: Path
    repository: str | None = None
    commit: str | None = None


def locate(name: str | Path, revision: str | None = None) -> Located:
    """Return where a directory or file is, or a model of the hub after its download.

    ``HF_HUB_OFFLINE`` is honoured: then only what was downloaded before is found.

    Raises:
        SourceError: it is neither here nor on the hub.
    """
    path = Path(name)
    if path.exists() or not _HUB_ID.fullmatch(path.as_posix()):
        if revision is not None and path.exists():
            raise SourceError(f"--revision {revision}", path=path, needed="a model of the hub", fix="drop --revision")
        return Located(path)
    from huggingface_hub import constants

    try:
        folder = _download(path.as_posix(), revision)
    except Exception as error:  # the hub's client raises many types; all mean that the files are not here
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        where = "among what was downloaded before (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "on the hub"
        raise SourceError(
            f"no such directory, and it is not found {where} ({reason})", path=path, fix="check the name and --revision"
        ) from error
    return Located(folder, path.as_posix(), folder.name)


def _download(repository: str, revision: str | None) -> Path:
    """Return the snapshot of a model: its safetensors, or its torch files where it has no others."""
    from huggingface_hub import snapshot_download

    for files in (_FILES, (*_FILES, *_TORCH_FILES)):
        found = snapshot_download(
            repository, revision=revision, allow_patterns=list(files), ignore_patterns=list(_COPIES)
        )
        if any(Path(found).glob("*.safetensors")):
            break
    return Path(found)


def open_source(source: str | Path, options: ConvertOptions) -> tuple[Checkpoint, list[Adapter]]:
    """Open a model, or an adapter and its base, with all adapters on it.

    Raises:
        SourceError: an adapter's base is not on this machine, or something cannot be read.
        AdapterError: an adapter cannot be converted, or does not fit the base.
    """
    named, found = list(options.adapters), locate(source, options.revision)
    if is_adapter_directory(found.path):
        named.insert(0, ("default", found.path))
        found = _base_of(Adapter(found.path, "default"), options)
    elif options.base is not None:
        raise OptionError("--base", path=source, needed="an adapter directory as source", fix="drop --base")
    adapters = [Adapter(locate(directory).path, name) for name, directory in named]
    checkpoint, bound = bind(open_checkpoint(found.path), adapters)
    checkpoint.provenance = _provenance(found)
    return checkpoint, bound


def _base_of(adapter: Adapter, options: ConvertOptions) -> Located:
    """Return the base of an adapter: the one given, or the one that it names, here or on the hub."""
    if options.base is not None:
        return locate(options.base)
    revision = adapter.config.get("revision")
    try:
        found = locate(adapter.base_model or "", revision if isinstance(revision, str) else None)
        if adapter.base_model and found.path.exists():
            return found
    except SourceError:
        pass  # whatever it was, the way out is the same
    name = adapter.base_model or "of the adapter"
    raise SourceError(f"base {name!r} is not on this machine", path=adapter.directory, fix="give --base DIR")


def _provenance(found: Located) -> dict[str, str]:
    """Return what is known of a model's origin and licence."""
    known = {"repository": found.repository, "revision": found.commit, "license": _license(found.path / "README.md")}
    return {key: value for key, value in known.items() if value is not None}


def _license(card: Path) -> str | None:
    """Return the licence that a model card names in its front matter."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(card) if card.is_file() else None
    except Exception:  # a card is written by hand, and nothing depends on it
        return None
    found = metadata.get("license") if isinstance(metadata, dict) else None
    return found if isinstance(found, str) else None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model directory or a .gguf file.

    Raises:
        SourceError: there is none, or it cannot be read.
    """
    file = gguf_file(path)
    return open_gguf(file) if file is not None else dequantized(Checkpoint(path))
