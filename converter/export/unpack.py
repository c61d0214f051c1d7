"""From a .salr file back to a dense Hugging Face directory.

Invariant: tensors kept dense come back bit for bit, and one packed module at a time is dense in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ...formats.container import TensorSpec, plan_layout
from ...formats.dtypes import FLOAT_ENCODINGS, byte_view, from_float32, to_float32
from ...formats.errors import FormatError, OptionError, OutputError
from ...formats.output_directory import output_directory
from ...formats.output_file import OutputFile
from ...formats.reader import SalrFile

METADATA = {"format": "pt"}
_CONFIG_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def unpack(
    path: str | Path,
    out: str | Path,
    *,
    residual: bool = True,
    merge: bool = False,
    dtype: str = "source",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the model of a .salr file as a dense Hugging Face directory that transformers loads.

    Args:
        residual: add the residual adapter to the kept weights.
        merge: add the trained adapters too.
        dtype: ``source``, or ``bf16``, ``fp16``, ``fp32`` for every 16- and 32-bit float tensor.

    Raises:
        SalrError: the file is damaged, or the output exists or cannot be written.
    """
    wanted = wanted_dtype(dtype)
    file = SalrFile(path)
    file.require_whole("unpacking")
    fitted = [name for name, entry in file.modules.items() if entry.values_from != "source"]
    if not residual and fitted:
        raise OptionError(
            "kept values were chosen to be used with the residual",
            path=path,
            tensor=fitted[0],
            needed="values_from 'source' to leave it out",
            fix="drop --no-residual",
        )
    with output_directory(out) as partial, file.checked():
        write_assets(file, partial, wanted)
        write_weights(file, partial, wanted, lambda module: residual, merge=merge, progress=progress)
    return Path(out)


def wanted_dtype(dtype: str) -> str | None:
    """Return the safetensors dtype for bf16, fp16 or fp32, None for ``source``.

    Raises:
        OptionError: it is none of these.
    """
    if dtype != "source" and dtype not in FLOAT_ENCODINGS:
        raise OptionError(f"dtype {dtype!r}", needed="one of source, " + ", ".join(FLOAT_ENCODINGS))
    return FLOAT_ENCODINGS.get(dtype)


def write_assets(file: SalrFile, folder: Path, wanted: str | None) -> None:
    """Write config, tokenizer and the other carried files, with the config's dtype replaced by ``wanted``."""
    for name in file.assets:
        _write_asset(folder, name, file, wanted)


def write_weights(
    file: SalrFile,
    folder: Path,
    wanted: str | None,
    has_residual: Callable[[str], bool],
    *,
    merge: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``folder/model.safetensors``, every module dense, with its residual where ``has_residual`` says so."""
    specs = _specs(file, wanted)
    layout = plan_layout(specs, METADATA)
    modules = {entry.source_tensor: module for module, entry in file.modules.items()}
    with OutputFile(folder / "model.safetensors", layout.last_begin) as output:
        for done, (name, spec) in enumerate(layout.tensors.items()):
            progress(done, len(specs))
            module = modules.get(name)
            residual = module is not None and has_residual(module)
            output.write(spec.begin, _tensor_bytes(file, name, module, spec.dtype, residual, merge))
        progress(len(specs), len(specs))
        output.write(0, layout.prefix() + layout.header(METADATA))
        output.commit()


def _specs(file: SalrFile, wanted: str | None) -> list[TensorSpec]:
    specs = [TensorSpec(e.source_tensor, wanted or e.dtype, e.source_shape) for e in file.modules.values()]
    for name in file.dense_tensors():
        stored = file.tensors[name]
        dtype = wanted if wanted and stored.dtype in _CONFIG_DTYPES else stored.dtype
        specs.append(TensorSpec(name, dtype, stored.shape))
    return specs


def _tensor_bytes(file: SalrFile, name: str, module: str | None, dtype: str, residual: bool, merge: bool) -> memoryview:
    if module is None:
        stored = file.tensors[name].dtype
        if stored == dtype:
            return file.raw(name)
        return byte_view(from_float32(to_float32(file.tensor(name), stored), dtype))
    weight = file.dense(module, residual=residual, adapters=merge)
    if file.modules[module].transposed:
        weight = weight.swapaxes(-1, -2)
    return byte_view(from_float32(weight, dtype))


def _write_asset(folder: Path, name: str, file: SalrFile, wanted: str | None) -> None:
    data = file.asset(name)
    if name == "config.json" and wanted:
        data = _config_with_dtype(data, _CONFIG_DTYPES[wanted], file.path)
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise OutputError(
            f"writing failed ({error.strerror})",
            path=path,
            fix="free disk space, or choose an output with room for the file's names",
        ) from error


def _config_with_dtype(data: bytes, dtype: str, path: Path) -> bytes:
    """Return a config.json with its dtype replaced.

    Raises:
        FormatError: it is no JSON object.
    """
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise FormatError("is no JSON object", path=path, tensor="assets/config.json", fix="unpack without --dtype")
    changed = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    return json.dumps(config | changed, indent=2).encode()
