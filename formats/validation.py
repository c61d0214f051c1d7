"""The rules a .salr file must keep. Each function raises an error that names file, tensor, found and needed.

``check_header``, ``check_version`` and ``check_manifest`` look at header and manifest only and run when a file is
opened; ``check_module`` looks at a module's tensors and runs before any of their bytes is handed out.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import xxhash

from . import naming
from .bitmap import row_popcounts, spare_bits_are_clear
from .container import Container, TensorSpec
from .dtypes import F32Array, U8Array
from .errors import ChecksumError, FormatError, VersionError
from .manifest import FORMAT_VERSION, MANIFEST_NAME, AdapterEntry, Manifest, ModuleEntry
from .module import ModuleTensors
from .values import encoded_bytes

_MODULE_TENSOR = re.compile(
    r"(?P<module>.+)\.(bitmap|values|row_offsets|scales|(lora_A|lora_B|rank_scales)\.[A-Za-z0-9_-]+)"
)
#: a code of 128 times a scale must stay finite
_LARGEST_SCALE = float(np.finfo(np.float32).max) / 128
ZERO_DIGEST = "0" * 32
REMAKE = "the file is damaged: copy or make it again"


def digest(data: bytes | memoryview) -> str:
    """Return the XXH3-128 digest of ``data``: 32 lower-case hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def damaged(path: str | Path, name: str) -> ChecksumError:
    """Return the error of a tensor whose bytes are not those that were written."""
    return ChecksumError("its bytes differ from their digest", path=path, tensor=name, fix=REMAKE)


def header_digest(header: bytes, stored: str) -> str:
    """Return the digest of a header, padding included, with the digits of its own digest replaced by zeros."""
    key = b'"salr_header_xxh3":"'
    return digest(header.replace(key + stored.encode(), key + ZERO_DIGEST.encode(), 1))


def check_version(container: Container) -> None:
    """Refuse what is not a .salr file of a known version."""
    version = container.metadata.get("salr_version")
    if version is None:
        raise FormatError(
            "a safetensors file without salr_version",
            path=container.path,
            needed="a .salr file",
            fix="make one with `salr convert`",
        )
    if version != FORMAT_VERSION:
        raise VersionError(
            f"format version {version!r}", path=container.path, needed=f"version {FORMAT_VERSION}", fix="upgrade salr"
        )


def check_header(container: Container) -> None:
    """Check the digests of header and manifest, and that a manifest is there."""
    stored = container.metadata.get("salr_header_xxh3", "")
    if len(stored) != 32 or header_digest(container.header_bytes, stored) != stored:
        raise ChecksumError("the header's digest does not match", path=container.path, fix=REMAKE)
    manifest = container.tensors.get(MANIFEST_NAME)
    if manifest is None or manifest.dtype != "U8":
        raise FormatError("there is no manifest", path=container.path, tensor=MANIFEST_NAME, fix=REMAKE)
    if digest(container.raw(MANIFEST_NAME)) != container.metadata.get("salr_manifest_xxh3"):
        raise ChecksumError("the manifest's digest does not match", path=container.path, fix=REMAKE)


def check_manifest(container: Container, manifest: Manifest) -> None:
    """Hold the manifest against the header: each tensor it implies is there, with its dtype, shape and digest."""
    for name, entry in manifest.modules.items():
        for spec in naming.module_specs(name, entry):
            _check_tensor(container, spec, ("F16", "F32") if spec.name == naming.scales_name(name) else (spec.dtype,))
        if entry.pattern == "dense" and entry.nnz != entry.n_weights:
            raise FormatError(
                f"nnz {entry.nnz}", path=container.path, tensor=name, needed=f"{entry.n_weights} in a dense pattern"
            )
        for adapter in entry.adapters:
            _check_adapter(container, name, entry, adapter)
    _check_source_tensors(container, manifest)
    _check_strays(container, manifest)
    undigested = sorted(set(container.tensors) - set(manifest.checksums) - {MANIFEST_NAME})
    missing = sorted(set(manifest.checksums) - set(container.tensors))
    for names, found in ((undigested, "has no digest in the manifest"), (missing, "is missing from the file")):
        if names:
            raise FormatError(found, path=container.path, tensor=names[0], fix=REMAKE)
    for name in container.tensors:
        if name.startswith(naming.ASSET_PREFIX) and not naming.is_asset_name(name.removeprefix(naming.ASSET_PREFIX)):
            raise FormatError(
                "the asset's name could leave its folder", path=container.path, tensor=name, needed="a plain name"
            )


def _check_strays(container: Container, manifest: Manifest) -> None:
    """Refuse a tensor named as a part of a module that the module's entry does not call for."""
    for name in container.tensors:
        found = _MODULE_TENSOR.fullmatch(name)
        entry = manifest.modules.get(found["module"]) if found else None
        if found is None or entry is None:
            continue
        expected = {spec.name for spec in naming.module_specs(found["module"], entry)}
        for adapter in entry.adapters:
            is_int8 = container.tensors[naming.lora_a_name(found["module"], adapter.name)].dtype == "I8"
            names = naming.lora_a_name, naming.lora_b_name, *([naming.rank_scales_name] if is_int8 else [])
            expected.update(spell(found["module"], adapter.name) for spell in names)
        if name not in expected:
            raise FormatError("its module's entry does not call for it", path=container.path, tensor=name, fix=REMAKE)


def _check_source_tensors(container: Container, manifest: Manifest) -> None:
    """Refuse a module whose source tensor is also kept as it was: unpacking would write one name twice."""
    packed = {spec.name for name, entry in manifest.modules.items() for spec in naming.module_specs(name, entry)}
    for name, entry in manifest.modules.items():
        if entry.source_tensor in container.tensors and entry.source_tensor not in packed:
            raise FormatError(
                f"source_tensor {entry.source_tensor!r} is also kept dense",
                path=container.path,
                tensor=name,
                needed="each tensor once",
                fix="make the file again",
            )


def _check_adapter(container: Container, module: str, entry: ModuleEntry, adapter: AdapterEntry) -> None:
    shape_a, shape_b = naming.adapter_shapes(entry, adapter.rank)
    name_a, name_b = naming.lora_a_name(module, adapter.name), naming.lora_b_name(module, adapter.name)
    dtypes = naming.adapter_dtypes(adapter.name)
    _check_tensor(container, TensorSpec(name_a, "F32", shape_a), dtypes)
    _check_tensor(container, TensorSpec(name_b, "F32", shape_b), dtypes)
    dtype = container.tensors[name_a].dtype
    _check_tensor(container, TensorSpec(name_b, dtype, shape_b), (dtype,))
    if dtype == "I8":
        scales = naming.rank_scales_name(module, adapter.name)
        _check_tensor(container, TensorSpec(scales, "F32", (adapter.rank,)), ("F32",))


def _check_tensor(container: Container, spec: TensorSpec, dtypes: tuple[str, ...]) -> None:
    found = container.tensors.get(spec.name)
    if found is None:
        raise FormatError("is missing from the file", path=container.path, tensor=spec.name, fix=REMAKE)
    if found.dtype not in dtypes or found.shape != spec.shape:
        raise FormatError(
            f"{found.dtype} {list(found.shape)}",
            path=container.path,
            tensor=spec.name,
            needed=f"{' or '.join(dtypes)} {list(spec.shape)}",
            fix=REMAKE,
        )


def check_module(tensors: ModuleTensors, path: str, name: str) -> None:
    """Check bitmap, row_offsets, spare bits and padding against each other, so that no index leaves ``values``."""
    entry = tensors.entry
    if tensors.bitmap is not None and tensors.row_offsets is not None:
        offsets = tensors.row_offsets
        if offsets[0] != 0 or offsets[-1] != entry.nnz or np.any(offsets[1:] < offsets[:-1]):
            raise FormatError(
                f"does not rise from 0 to nnz (it ends at {offsets[-1]})",
                path=path,
                tensor=naming.row_offsets_name(name),
                needed=f"{entry.nnz} at its end",
                fix=REMAKE,
            )
        wrong = np.flatnonzero(row_popcounts(tensors.bitmap) != np.diff(offsets))
        if wrong.size:
            raise FormatError(
                f"row {wrong[0]} has another number of set bits than row_offsets say",
                path=path,
                tensor=naming.bitmap_name(name),
                fix=REMAKE,
            )
        if not spare_bits_are_clear(tensors.bitmap, entry.n_columns):
            raise FormatError(
                "bits are set past the last column", path=path, tensor=naming.bitmap_name(name), fix=REMAKE
            )
        if entry.pattern == "2:4" and _most_in_four(tensors.bitmap) > 2:
            raise FormatError(
                "keeps more than two of four columns",
                path=path,
                tensor=naming.bitmap_name(name),
                needed="pattern 2:4",
                fix=REMAKE,
            )
    if tensors.scales is not None and not np.all(np.abs(tensors.scales) <= _LARGEST_SCALE):
        raise FormatError(
            "holds a scale that is not finite, or too large for float32",
            path=path,
            tensor=naming.scales_name(name),
            needed=f"at most {_LARGEST_SCALE:.3g}",
            fix=REMAKE,
        )
    used = encoded_bytes(entry.encoding, entry.nnz)
    if np.any(tensors.values.view(np.uint8)[used:]):
        raise FormatError("the padding is not zero", path=path, tensor=naming.values_name(name), fix=REMAKE)


def check_scaling(scaling: F32Array, path: str, module: str, adapter: str) -> None:
    """Refuse scalings (r,) of an adapter that float32 cannot hold.

    Raises:
        FormatError: see above.
    """
    if not np.all(np.isfinite(scaling)):
        raise FormatError(
            f"adapter {adapter!r} has a scaling that is not finite in float32",
            path=path,
            tensor=module,
            needed="finite scaling and rank_scales",
            fix=REMAKE,
        )


def check_part(entry: ModuleEntry, rows: slice, columns: slice, path: str, name: str) -> None:
    """Refuse a part of a module that is empty, has gaps, or begins inside a group of scales.

    Raises:
        FormatError: see above.
    """
    for part, extent in ((rows, entry.shape[-2]), (columns, entry.n_columns)):
        start, stop, step = part.indices(extent)
        if step != 1 or start >= stop:
            raise FormatError(f"slice {start}:{stop}:{step}", path=path, tensor=name, needed="one run, not empty")
    start = columns.indices(entry.n_columns)[0]
    if entry.group_size and start % entry.group_size:
        raise FormatError(
            f"a slice from column {start}",
            path=path,
            tensor=name,
            needed=f"a multiple of group_size {entry.group_size}",
            fix="cut between groups of scales",
        )


def _most_in_four(bitmap: U8Array) -> int:
    """Return the largest number of set bits in four columns that start at a multiple of four."""
    return int(max(np.bitwise_count(bitmap & np.uint8(15)).max(), np.bitwise_count(bitmap >> np.uint8(4)).max()))
