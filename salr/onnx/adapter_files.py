"""``.onnx_adapter`` files: one for each trained adapter of an export whose adapters can be exchanged.

Invariant: every file gives every adapter input of the graph, so that activating one leaves nothing of another; a module
that an adapter does not touch gets a pair of rank 1 that is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..formats.errors import OutputError
from ..runtime.linear import SalrLinear
from .sources import Source, adapter_sources, trained_adapters

FOLDER, NO_ADAPTER = "adapters", "no_adapter"


def write_adapter_files(linears: Mapping[str, SalrLinear], folder: Path, dtype: torch.dtype) -> list[str]:
    """Write ``adapters/<name>.onnx_adapter`` for each adapter and ``no_adapter.onnx_adapter``; return their paths.

    Args:
        linears: every packed layer that has a trained adapter, by its name in the model.
        folder: the exported directory.
        dtype: of the graph's activations.

    Raises:
        OutputError: a file cannot be written.
    """
    names = sorted({adapter.name for linear in linears.values() for adapter in trained_adapters(linear)})
    if not names:
        return []
    (folder / FOLDER).mkdir()
    written = [_write(linears, folder, f"{FOLDER}/{name}", name, dtype) for name in names]
    return [*written, _write(linears, folder, NO_ADAPTER, None, dtype)]


def _write(linears: Mapping[str, SalrLinear], folder: Path, stem: str, name: str | None, dtype: torch.dtype) -> str:
    import onnxruntime

    parameters: dict[str, Any] = {}
    for module, linear in linears.items():
        chosen = [adapter for adapter in trained_adapters(linear) if adapter.name == name]
        sources = adapter_sources(linear, chosen, dtype) if chosen else _nothing(linear, dtype)
        for role, source in sources.items():
            array = source.read().numpy()
            parameters[f"{module}.{role}"] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(parameters)
    path = folder / f"{stem}.onnx_adapter"
    try:
        made.export_adapter(str(path))
    except Exception as error:
        raise OutputError(f"writing failed ({error})", path=path, fix="free disk space") from error
    return f"{stem}.onnx_adapter"


def _nothing(linear: SalrLinear, dtype: torch.dtype) -> dict[str, Source]:
    """Return a pair of rank 1 that adds nothing."""
    return {
        "adapter_A": Source.of(torch.zeros(linear.in_features, 1, dtype=dtype)),
        "adapter_B": Source.of(torch.zeros(1, linear.out_features, dtype=dtype)),
    }
