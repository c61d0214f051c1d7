"""From a .salr file to a directory that ONNX Runtime and onnxruntime-genai run.

Invariant: packed weights stay packed and lie once in the directory, in the .salr file beside the graph; the whole
directory appears under its name or nothing does.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats.errors import OptionError, OutputError
from ..formats.manifest import FORMAT_VERSION, MANIFEST_NAME
from ..formats.output_directory import output_directory
from ..formats.reader import SalrFile
from ..formats.validation import digest
from ..runtime.experts import packed_modules
from ..runtime.linear import SalrLinear
from ..runtime.loading import load
from .adapter_files import FOLDER, NO_ADAPTER, write_adapter_files
from .checking import Verification, verify_export
from .contract import DEFAULT_OPSET, VERSION
from .genai import CONFIG_NAME, GRAPH_NAME, genai_config
from .graph import finish, overridable_adapters
from .library import LIBRARY_NAME, get_library_path
from .node import check_opset
from .signature import Signature, signature_of
from .sources import trained_adapters
from .storage import ADAPTERS_FILE, PACKED_FILE, WEIGHTS_FILE, Storage
from .trace import Traced, replace_packed, trace

WEIGHTS, ADAPTERS = ("sparse", "dense"), ("fused", "overridable")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
#: packed weights above which the function body's cost is told, and verification is left to the user
LARGE = 300_000_000
#: what ONNX Runtime takes to fold the function bodies, in bytes a weight; it does not give it back
_FOLDING_BYTES = 38
_RESERVED = {
    GRAPH_NAME, CONFIG_NAME, PACKED_FILE, WEIGHTS_FILE, ADAPTERS_FILE, FOLDER, LIBRARY_NAME,
    f"{NO_ADAPTER}.onnx_adapter",
}  # fmt: skip


@dataclass(frozen=True)
class OnnxExport:
    """What was written: ``verification`` is None where it was not asked for; ``warnings`` are for the user."""

    folder: Path
    n_packed_weights: int
    adapter_files: tuple[str, ...]
    verification: Verification | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Options:
    weights: str
    adapters: str
    opset: int
    dtype: str
    library: Path | None


def export_onnx(
    path: str | Path,
    out: str | Path,
    *,
    weights: str = "sparse",
    adapters: str = "fused",
    opset: int = DEFAULT_OPSET,
    dtype: str = "fp32",
    library: bool = False,
    verify: bool | None = None,
) -> OnnxExport:
    """Write the model of a .salr file as an ONNX graph with everything that runs it.

    Args:
        path: the .salr file; the directory gets a copy of it (runtimes refuse links), and no weight a second time.
        out: the directory to make.
        weights: ``sparse`` for SparseLinear nodes on the packed weights, ``dense`` for plain matrix products.
        adapters: ``fused`` into the nodes, or ``overridable``: inputs with defaults, exchanged by .onnx_adapter files.
        opset: of the graph, 18 to 25.
        dtype: of activations, keys and values, and of dense weights: fp32 or fp16.
        library: copy the native library into the directory and name it in genai_config.json.
        verify: compare with torch; None for models of up to 300 million packed weights.

    Raises:
        OptionError: an option is none of these.
        ExportError: the model has no ONNX form, or the graph does not compute what torch computes.
        LibraryError: ``library`` is asked for and cannot be built.
        SalrError: the file is damaged, or the output exists or cannot be written.
    """
    _check_choice("weights", weights, WEIGHTS)
    _check_choice("adapters", adapters, ADAPTERS)
    _check_choice("dtype", dtype, tuple(DTYPES))
    check_opset(opset)
    options = _Options(weights, adapters, opset, dtype, get_library_path() if library else None)
    file = SalrFile(path)
    file.require_one_file("salr export onnx")
    n_packed = sum(entry.n_weights for entry in file.modules.values())
    with output_directory(out) as partial:
        written = _write(file, partial, options)
        found = verify_export(partial, Path(path), dtype) if _wants(verify, n_packed) else None
    return OnnxExport(Path(out), n_packed, tuple(written), found, tuple(_warnings(n_packed, options)))


def _check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{option} {value!r}", needed="one of " + ", ".join(choices))


def _wants(verify: bool | None, n_packed: int) -> bool:
    return n_packed <= LARGE if verify is None else verify


def _warnings(n_packed: int, options: _Options) -> list[str]:
    if n_packed <= LARGE or options.weights == "dense":
        return []
    return [
        f"without the native library ONNX Runtime decodes {n_packed / 1e6:.0f} M weights when it loads the graph, in "
        f"about {n_packed * _FOLDING_BYTES / 1e9:.0f} GB: register salr.onnx.get_library_path(), or export with "
        "--weights dense"
    ]


def _write(file: SalrFile, folder: Path, options: _Options) -> list[str]:
    """Write everything into ``folder``; return the paths of adapter files."""
    model = load(file.path)
    linears = {
        name: module
        for name, module in packed_modules(model)
        if isinstance(module, SalrLinear) and trained_adapters(module)
    }
    signature = signature_of(model)
    dtype = DTYPES[options.dtype]
    replace_packed(model, weights=options.weights, adapters=options.adapters, dtype=dtype)
    traced = trace(signature, options.opset, dtype)
    storage = Storage(folder, file if options.weights == "sparse" else None)
    try:
        _write_assets(file, folder)
        if options.weights == "sparse":
            shutil.copyfile(file.path, folder / PACKED_FILE)
        finish(traced.model, traced.sources, storage, options.opset)
        _save(traced, file, folder, options)
        if options.library is not None:
            shutil.copyfile(options.library, folder / options.library.name)
        if signature.is_decoder:
            _write_config(model, signature, folder, options)
    except OSError as error:
        raise OutputError(f"writing failed ({error.strerror})", path=folder, fix="free disk space") from error
    return write_adapter_files(linears, folder, dtype) if options.adapters == "overridable" else []


def _save(traced: Traced, file: SalrFile, folder: Path, options: _Options) -> None:
    """Write the graph, with what it was made from and how."""
    import onnx_ir

    facts = {
        "salr.format_version": FORMAT_VERSION,
        "salr.sparse_linear_version": str(VERSION),
        "salr.manifest_xxh3": digest(file.raw(MANIFEST_NAME)),
        "salr.generator": file.manifest.generator,
        "salr.weights": options.weights,
        "salr.adapters": options.adapters,
        "salr.activations": options.dtype,
        "salr.overridable": json.dumps(sorted(overridable_adapters(traced.model.graph))),
    }
    traced.model.metadata_props.update(facts)
    onnx_ir.save(traced.model, folder / GRAPH_NAME)


def _write_config(model: Any, signature: Signature, folder: Path, options: _Options) -> None:
    name = None if options.library is None else options.library.name
    past_shape = tuple(signature.inputs[-1][0][0].shape)
    config = genai_config(model, signature.input_names, past_shape, name)
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_assets(file: SalrFile, folder: Path) -> None:
    """Write config, tokenizer and the other carried files, but for names that the export itself uses."""
    for name in file.assets:
        if name.split("/")[0] not in _RESERVED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(file.asset(name))
