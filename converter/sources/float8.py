"""Checkpoints in 8-bit floats: weights times their scales, as floats of 16 bits.

Scales are one a tensor, one a row, or one a block (``weight_block_size``, 128 x 128 if the config does not say).
Invariant: a product is computed in float32 and rounded once, when it is stored; scales are accounted for in the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...formats.errors import SourceError
from .checkpoint import Checkpoint, SourceTensor
from .derived import Changes, Computed, DerivedCheckpoint

_FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_SCALES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
}
_METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
_CONFIG_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ACTIVATION_SCALES = (
    "input_scale",
    "activation_scale",
    "input_scale_ub",
    "k_scale",
    "v_scale",
    "q_scale",
    "prob_scale",
)
_BLOCK = (128, 128)


@dataclass(frozen=True)
class _Scale:
    """The scale of a weight: its tensor, and the rows and columns of the weight that one number is for."""

    tensor: SourceTensor
    block: tuple[int, int]


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose 8-bit weights are multiplied by their scales; itself where there are none.

    Raises:
        SourceError: it is quantized in another way, or a scale does not fit its weight.
    """
    quantization = checkpoint.config.get("quantization_config")
    if isinstance(quantization, dict):
        _check_method(checkpoint, quantization)
    changes = Changes(dropped_config=("quantization_config",) if quantization else ())
    for name, tensor in checkpoint.tensors.items():
        scale = _scale_of(tensor, checkpoint, quantization) if tensor.dtype in _FLOAT8 else None
        if scale is not None:
            changes.computed[name] = _computed(checkpoint, tensor, scale)
            changes.left_out[scale.tensor.name] = "folded", f"scale of {name}"
        elif quantization and name.rpartition(".")[2] in _ACTIVATION_SCALES:
            changes.left_out[name] = "dropped", "scale of 8-bit activations, which stay in higher precision here"
    return DerivedCheckpoint(checkpoint, changes) if changes.computed or quantization else checkpoint


def _check_method(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> None:
    method = quantization.get("quant_method")
    packed = [name for name in checkpoint.tensors if name.endswith((".qweight", ".weight_packed", "_blocks"))]
    if method not in _METHODS or packed:
        raise SourceError(
            f"is quantized already ({method})",
            path=checkpoint.directory,
            tensor=packed[0] if packed else None,
            needed="16- or 32-bit floats, or 8-bit floats with scales",
            fix="convert the model that it was made from",
        )


def _scale_of(tensor: SourceTensor, checkpoint: Checkpoint, quantization: object) -> _Scale | None:
    stem = tensor.name.removesuffix(".weight")
    names = (f"{tensor.name}_scale_inv", f"{tensor.name}_scale", f"{stem}.scale")
    found = next((checkpoint.tensors[name] for name in names if name in checkpoint.tensors), None)
    if found is None or len(tensor.shape) not in (2, 3):
        return None
    rows, columns = _block(quantization)
    *experts, n_rows, n_columns = tensor.shape
    for block in ((n_rows, n_columns), (1, n_columns), (rows, columns)):
        shape = (*experts, -(-n_rows // block[0]), -(-n_columns // block[1]))
        if math.prod(found.shape) == math.prod(shape) and _SCALES.get(found.dtype) is not None:
            return _Scale(found, block)
    raise SourceError(
        f"{found.dtype} {list(found.shape)}",
        path=checkpoint.directory / found.file,
        tensor=found.name,
        needed=f"a scale for {list(tensor.shape)}: one, one a row, or one for {rows} x {columns} weights",
        fix="give weight_block_size in config.json's quantization_config",
    )


def _block(quantization: object) -> tuple[int, int]:
    """Return the rows and columns of a block of weights with one scale."""
    wanted = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if isinstance(wanted, list) and len(wanted) == 2 and all(type(side) is int and side > 0 for side in wanted):
        return wanted[0], wanted[1]
    return _BLOCK


def _computed(checkpoint: Checkpoint, tensor: SourceTensor, scale: _Scale) -> Computed:
    config = checkpoint.config
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    named = config.get("dtype") or config.get("torch_dtype") or (text or {}).get("dtype")
    dtype = _CONFIG_DTYPES.get(str(named), "BF16")

    def rows(start: int, stop: int) -> torch.Tensor:
        return _product(checkpoint, tensor, scale, start, stop)

    remark = f"{tensor.dtype} times {scale.tensor.name}"
    return Computed(dtype, tensor.shape, checkpoint.origin(tensor.name), remark, rows)


def _product(checkpoint: Checkpoint, tensor: SourceTensor, scale: _Scale, start: int, stop: int) -> torch.Tensor:
    """Return part of weight times scale along the first dimension, in float32."""
    width = math.prod(tensor.shape[1:])
    raw = bytearray(checkpoint.raw(tensor.name)[start * width : stop * width])
    weight = torch.frombuffer(raw, dtype=torch.uint8).view(_FLOAT8[tensor.dtype]).float()
    weight = weight.reshape(stop - start, *tensor.shape[1:])
    *experts, n_rows, n_columns = tensor.shape
    block_rows, block_columns = scale.block
    scales = _scales(checkpoint, scale.tensor)
    scales = scales.reshape(*experts, -(-n_rows // block_rows), -(-n_columns // block_columns))
    first, last = (0, n_rows) if experts else (start, stop)
    scales = (scales[start:stop] if experts else scales)[..., torch.arange(first, last) // block_rows, :]
    for block in range(scales.shape[-1]):
        weight[..., block * block_columns : (block + 1) * block_columns] *= scales[..., block : block + 1]
    return weight


def _scales(checkpoint: Checkpoint, tensor: SourceTensor) -> torch.Tensor:
    dtype = _SCALES[tensor.dtype]
    assert dtype is not None
    flat = torch.frombuffer(bytearray(checkpoint.raw(tensor.name)), dtype=torch.uint8)
    return flat.view(dtype).float()
