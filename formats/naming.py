"""Tensor names in a .salr file, and the tensors that a module of a given entry must have.

Invariant: this is the only place that spells a tensor's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

from .bitmap import bitmap_width
from .container import TensorSpec
from .manifest import RESIDUAL, ModuleEntry
from .values import QUANTIZED_BITS, stored_elements, values_dtype

ASSET_PREFIX = "assets/"
FLOAT_DTYPES = ("BF16", "F16", "F32")


def bitmap_name(module: str) -> str:
    """Name of the bitmap, U8 ([E,] N, ceil(K/8))."""
    return f"{module}.bitmap"


def values_name(module: str) -> str:
    """Name of the padded kept weights, 1-D."""
    return f"{module}.values"


def row_offsets_name(module: str) -> str:
    """Name of the row offsets, U64 (rows + 1,)."""
    return f"{module}.row_offsets"


def scales_name(module: str) -> str:
    """Name of the scales of a quantized module, F16 or F32 ([E,] N, groups)."""
    return f"{module}.scales"


def lora_a_name(module: str, adapter: str) -> str:
    """Name of an adapter's ([E,] r, K) factor."""
    return f"{module}.lora_A.{adapter}"


def lora_b_name(module: str, adapter: str) -> str:
    """Name of an adapter's ([E,] N, r) factor."""
    return f"{module}.lora_B.{adapter}"


def rank_scales_name(module: str, adapter: str) -> str:
    """Name of the scales of int8 factors, F32 (r,)."""
    return f"{module}.rank_scales.{adapter}"


def module_specs(module: str, entry: ModuleEntry) -> list[TensorSpec]:
    """Return the tensors a module must have, without its adapters (their dtypes are the file's choice)."""
    *experts, n_rows, n_columns = entry.shape
    specs = [
        TensorSpec(values_name(module), values_dtype(entry.encoding), (stored_elements(entry.encoding, entry.nnz),))
    ]
    if entry.pattern != "dense":
        specs.append(TensorSpec(bitmap_name(module), "U8", (*experts, n_rows, bitmap_width(n_columns))))
        specs.append(TensorSpec(row_offsets_name(module), "U64", (entry.n_rows + 1,)))
    if entry.encoding in QUANTIZED_BITS and entry.group_size:
        specs.append(TensorSpec(scales_name(module), "F32", (*experts, n_rows, -(-n_columns // entry.group_size))))
    return specs


def adapter_shapes(entry: ModuleEntry, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of lora_A and lora_B."""
    *experts, n_rows, n_columns = entry.shape
    return (*experts, rank, n_columns), (*experts, n_rows, rank)


def adapter_dtypes(adapter: str) -> tuple[str, ...]:
    """Return the dtypes an adapter's factors may have: the residual may be int8."""
    return (*FLOAT_DTYPES, "I8") if adapter == RESIDUAL else FLOAT_DTYPES


def is_asset_name(name: str) -> bool:
    """Tell whether ``name`` is a plain relative path that cannot leave the folder it is unpacked into."""
    parts = name.split("/")
    return bool(
        name
        and "\\" not in name
        and "\0" not in name
        and ":" not in name
        and not any("\ud800" <= character <= "\udfff" for character in name)
        and not PurePosixPath(name).is_absolute()
        and all(part not in ("", ".", "..") for part in parts)
    )


def module_tensor_names(module: str, entry: ModuleEntry, held: Mapping[str, TensorSpec]) -> list[str]:
    """Return the names of a module's tensors in the order of a conversion; ``held`` tells which factors are int8."""
    names = [spec.name for spec in module_specs(module, entry)]
    for adapter in entry.adapters:
        lora_a = lora_a_name(module, adapter.name)
        names += [lora_a, lora_b_name(module, adapter.name)]
        names += [rank_scales_name(module, adapter.name)] if held[lora_a].dtype == "I8" else []
    return names
