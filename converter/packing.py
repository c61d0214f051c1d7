"""One module: from its source weight to the tensors of the file, and the errors measured on the way.

Invariant: kept values are the source's own bits; the residual's error is measured with the factors as stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..formats import naming
from ..formats.bitmap import pack_bitmap, row_offsets
from ..formats.dtypes import Array, storage_dtype
from ..formats.errors import SourceError
from ..formats.manifest import RESIDUAL, ErrorEntry, ModuleEntry
from ..formats.values import pad_values
from .lowrank import truncated_svd
from .plan import PlannedModule
from .prune import magnitude_mask
from .sources import Checkpoint

_ERROR_ROWS = 256


@dataclass(frozen=True)
class PackedModule:
    """A module's tensors by name, ready to be written, and its entry with measured errors."""

    entry: ModuleEntry
    tensors: dict[str, Array]


@dataclass(frozen=True)
class PackedMatrix:
    """One (N, K) matrix: mask, kept values in the source's dtype, factors in the source's dtype, squared errors."""

    mask: torch.Tensor
    values: torch.Tensor
    lora_A: torch.Tensor | None
    lora_B: torch.Tensor | None
    energy: float
    mask_energy: float
    residual_energy: float


def pack_module(planned: PlannedModule, checkpoint: Checkpoint, scope: str, device: torch.device) -> PackedModule:
    """Prune one module, correct it, and lay its tensors out as the file wants them.

    Raises:
        SourceError: a weight is NaN or infinite.
    """
    weights = _matrices(planned.entry, checkpoint)
    n_kept = planned.entry.nnz // (planned.entry.shape[0] if len(planned.entry.shape) == 3 else 1)
    packed = [_pack_matrix(planned, weight.to(device), n_kept, scope, checkpoint) for weight in weights]
    tensors = _tensors(planned, packed)
    for trained in planned.trained:
        for name, factor in (
            (naming.lora_a_name(planned.name, trained.adapter.name), trained.pair.lora_A),
            (naming.lora_b_name(planned.name, trained.adapter.name), trained.pair.lora_B),
        ):
            raw = np.frombuffer(trained.adapter.raw(factor.name), storage_dtype(factor.dtype))
            tensors[name] = raw.reshape(factor.shape)
    return PackedModule(replace(planned.entry, error=_error(planned, packed)), tensors)


def _matrices(entry: ModuleEntry, checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    """Yield each (N, K) matrix of a module in its own dtype."""
    weight = checkpoint.read(entry.source_tensor)
    for matrix in weight if weight.ndim == 3 else [weight]:
        yield matrix.T if entry.transposed else matrix


def _pack_matrix(
    planned: PlannedModule, source: torch.Tensor, n_kept: int, scope: str, checkpoint: Checkpoint
) -> PackedMatrix:
    weight = source.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(weight).all()):
        raise SourceError(
            "holds NaN or infinity", path=checkpoint.directory, tensor=planned.entry.source_tensor, fix="save it again"
        )
    mask = magnitude_mask(weight, n_kept, scope)
    values = source[mask]
    energy = squared_norm(weight)
    residual = weight.masked_fill_(mask, 0)
    mask_energy = squared_norm(residual)
    if not planned.residual_rank:
        return PackedMatrix(mask, values, None, None, energy, mask_energy, mask_energy)
    lora_b, lora_a = (factor.to(source.dtype) for factor in truncated_svd(residual, planned.residual_rank))
    return PackedMatrix(mask, values, lora_a, lora_b, energy, mask_energy, squared_distance(residual, lora_b, lora_a))


def _tensors(planned: PlannedModule, packed: list[PackedMatrix]) -> dict[str, Array]:
    name, entry = planned.name, planned.entry
    values = np.concatenate([to_numpy(matrix.values) for matrix in packed])
    tensors = {naming.values_name(name): pad_values(values, entry.encoding, entry.nnz)}
    if entry.pattern != "dense":
        bitmap = pack_bitmap(np.stack([to_numpy(matrix.mask) for matrix in packed]))
        tensors[naming.bitmap_name(name)] = bitmap
        tensors[naming.row_offsets_name(name)] = row_offsets(bitmap)
    for adapter_name, factors in (
        (naming.lora_a_name(name, RESIDUAL), [matrix.lora_A for matrix in packed]),
        (naming.lora_b_name(name, RESIDUAL), [matrix.lora_B for matrix in packed]),
    ):
        if planned.residual_rank:
            tensors[adapter_name] = np.stack([to_numpy(factor) for factor in factors if factor is not None])
    return tensors


def _error(planned: PlannedModule, packed: list[PackedMatrix]) -> ErrorEntry:
    energy = sum(matrix.energy for matrix in packed)
    unit = energy or 1.0
    mask = sum(matrix.mask_energy for matrix in packed) / unit
    residual = sum(matrix.residual_energy for matrix in packed) / unit
    bound = mask * (1 - planned.residual_rank / min(planned.entry.shape[-2:]))
    return ErrorEntry(energy, mask, residual, bound)


def squared_norm(matrix: torch.Tensor) -> float:
    """Return the squared Frobenius norm, accumulated in float64 from pieces of rows."""
    rows = range(0, matrix.shape[0], _ERROR_ROWS)
    return math.fsum(float(matrix[row : row + _ERROR_ROWS].double().square().sum()) for row in rows)


def squared_distance(matrix: torch.Tensor, lora_b: torch.Tensor, lora_a: torch.Tensor) -> float:
    """Return |matrix - B A|^2, the product in float32 and the sum in float64, from pieces of rows."""
    lora_a, lora_b = lora_a.float(), lora_b.float()
    rows = [slice(row, row + _ERROR_ROWS) for row in range(0, matrix.shape[0], _ERROR_ROWS)]
    return math.fsum(squared_norm(matrix[piece] - lora_b[piece] @ lora_a) for piece in rows)


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a tensor's bytes as the array that the file stores: BF16 as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
