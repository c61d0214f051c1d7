"""Random packed matrices, the native library of this session, and sessions of ONNX Runtime."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from salr.formats.bitmap import pack_bitmap, row_offsets
from salr.formats.dtypes import FLOAT_ENCODINGS, from_float32
from salr.formats.manifest import ModuleEntry
from salr.formats.module import AdapterStack, ModuleTensors
from salr.formats.values import encode_quantized, pad_values

from salr.onnx.errors import LibraryError
from salr.onnx.library import compile_library, find_compiler, get_library_path

Packed = tuple[ModuleTensors, AdapterStack | None]


@pytest.fixture(scope="session")
def library() -> Path:
    """Return the native library; the tests of it need a compiler."""
    try:
        return get_library_path()
    except LibraryError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def sanitized_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the library with AddressSanitizer in it, not optimized: that would take the compiler long."""
    path = tmp_path_factory.mktemp("sanitized") / "libsalr_onnx.so"
    flags = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-O0")
    try:
        compile_library(path, find_compiler(), flags)
    except LibraryError as error:
        pytest.skip(str(error))
    return path


def encoded(kept: np.ndarray, mask: np.ndarray, encoding: str, group_size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return kept weights as stored without padding, and their scales."""
    if encoding in FLOAT_ENCODINGS:
        return from_float32(kept, FLOAT_ENCODINGS[encoding]), None
    n_rows, n_columns = mask.shape
    random = np.random.default_rng(1)
    scales = (0.5 + random.random((n_rows, -(-n_columns // group_size)), np.float32)) * np.float32(
        3 / (127 if encoding == "int8" else 1)
    )
    each = np.repeat(scales, group_size, 1)[:, :n_columns][mask]
    return encode_quantized(kept, each, encoding), scales


@pytest.fixture(scope="session")
def make_packed() -> Callable[..., Packed]:
    """Return a function that makes a random matrix (N, K), its first row empty, and adapters of rank ``rank``."""

    def make(
        n_rows: int, n_columns: int, encoding: str, *, sparse: bool = True, rank: int = 0, group_size: int = 32
    ) -> Packed:
        random = np.random.default_rng(n_rows * 1000 + n_columns)
        mask = random.random((n_rows, n_columns)) < 0.5
        mask[0], mask[-1] = False, True
        mask |= not sparse
        stored, scales = encoded(random.standard_normal(int(mask.sum()), np.float32), mask, encoding, group_size)
        nnz, shape = int(mask.sum()), (n_rows, n_columns)
        pattern, groups = "unstructured" if sparse else "dense", None if scales is None else group_size
        entry = ModuleEntry("w", shape, False, shape, "F32", nnz, pattern, encoding, "source", group_size=groups)
        bitmap = pack_bitmap(mask) if sparse else None
        offsets = None if bitmap is None else row_offsets(bitmap)
        tensors = ModuleTensors(entry, pad_values(stored, encoding, nnz), bitmap, offsets, scales)
        if not rank:
            return tensors, None
        factors = (
            random.standard_normal((rank, n_columns), np.float32),
            random.standard_normal((n_rows, rank), np.float32),
        )
        return tensors, AdapterStack(*factors, random.random(rank, np.float32), {})

    return make


@pytest.fixture(scope="session")
def run_model() -> Callable[..., Any]:
    """Return a function that runs a model (ModelProto or path) on the CPU, with the library where it is given."""

    def run(model: Any, feed: dict[str, np.ndarray], library: Path | None = None, threads: int = 1) -> list[np.ndarray]:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        if library is not None:
            options.register_custom_ops_library(str(library))
        source = str(model) if isinstance(model, (str, Path)) else model.SerializeToString()
        return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"]).run(None, feed)

    return run


@pytest.fixture(scope="session")
def run_in_process() -> Callable[..., str]:
    """Return a function that runs a script of this folder with arguments and returns what it prints."""

    def run(script: str, *arguments: object, environment: dict[str, str] | None = None) -> str:
        command = [sys.executable, str(Path(__file__).parent / script), *(str(argument) for argument in arguments)]
        result = subprocess.run(
            command, env=os.environ | (environment or {}), capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr[:3000]
        return result.stdout

    return run
