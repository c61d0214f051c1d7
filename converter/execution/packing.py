"""One module: from its source weight to the tensors of the file, and the errors measured on the way.

Invariant: errors are measured with values and factors as stored, against the source's own weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from ...formats import naming
from ...formats.bitmap import bitmap_width, pack_bitmap, row_offsets
from ...formats.dtypes import Array, storage_dtype
from ...formats.errors import SourceError
from ...formats.manifest import RESIDUAL, ErrorEntry, ModuleEntry
from ...formats.values import stored_elements, values_dtype
from ..methods import Factors, Problem, Solution, solve
from ..methods.prune import Groups
from ..methods.quantization import Quantized, Quantizer
from ..methods.weighted import minus_product, output_energy
from ..options import METHODS, ConvertOptions
from ..plan import ENCODING_OF, PlannedModule, is_solved
from ..sources.checkpoint import FLOAT_TORCH_DTYPES, TORCH_ENCODINGS, Checkpoint

_ERROR_ROWS = 256
_FALLBACK = "alternating"


@dataclass(frozen=True)
class Calibrated:
    """Calibration of one matrix: H = sum x x^T (K, K), and ``target`` (N, K) to approximate in W0's place."""

    gram: torch.Tensor
    target: torch.Tensor


@dataclass(frozen=True)
class PackedModule:
    """A module's tensors by name, ready to be written, its entry with measured errors, and the matrices they give."""

    entry: ModuleEntry
    tensors: dict[str, Array]
    matrices: list[PackedMatrix]


@dataclass(frozen=True)
class PackedMatrix:
    """One (N, K) matrix as stored: mask, kept values (nnz,) or codes, factors, and squared errors.

    ``output`` is there with data only.
    """

    mask: torch.Tensor
    values: torch.Tensor | Quantized
    factors: Factors | None
    energy: float
    mask_energy: float
    residual_energy: float
    output: float | None

    def weight(self) -> torch.Tensor:
        """Return S + B A (N, K) in float32."""
        return stored_weight(self.mask, self.values, self.factors)

    def to_cpu(self) -> PackedMatrix:
        """Return the same in this machine's memory, as it is sent to another."""
        values = self.values.to_cpu() if isinstance(self.values, Quantized) else self.values.cpu()
        factors = None if self.factors is None else self.factors.to_cpu()
        return replace(self, mask=self.mask.cpu(), values=values, factors=factors)

    def kept(self) -> torch.Tensor:
        """Return the kept values (nnz,) in their dtype, or their codes, one a byte."""
        return gathered(self.values.codes, self.mask) if isinstance(self.values, Quantized) else self.values


class _Errors(NamedTuple):
    """Squared errors of one matrix."""

    energy: float
    mask: float
    residual: float
    output: float | None


def pack_module(
    planned: PlannedModule,
    checkpoint: Checkpoint,
    options: ConvertOptions,
    device: torch.device,
    calibrated: Calibrated | None = None,
) -> PackedModule:
    """Prune one module, correct it, and lay its tensors out as the file wants them.

    A method that needs data falls back to ``alternating`` without ``calibrated``.

    Raises:
        SourceError: a weight is NaN or infinite.
    """
    method = used_method(options.chosen_method, calibrated is not None)
    packed = assembled(planned, packed_matrices(planned, checkpoint, options, device, calibrated), method)
    return replace(packed, tensors=packed.tensors | trained_tensors(planned))


def packed_matrices(
    planned: PlannedModule,
    checkpoint: Checkpoint,
    options: ConvertOptions,
    device: torch.device,
    calibrated: Calibrated | None = None,
) -> Iterator[PackedMatrix]:
    """Yield the module's matrices one after the other: the experts of a stack, else one.

    Raises:
        SourceError: a weight is NaN or infinite.
    """
    method = used_method(options.chosen_method, calibrated is not None)
    for source in source_matrices(planned.entry, checkpoint):
        yield _pack_matrix(planned, source.to(device), checkpoint, options, method, calibrated)


def trained_tensors(planned: PlannedModule) -> dict[str, Array]:
    """Return the factors of the module's trained adapters as the file stores them."""
    tensors: dict[str, Array] = {}
    for trained in planned.trained:
        for name, factor in trained.factors(planned.name):
            raw = np.frombuffer(trained.adapter.raw(factor.name), storage_dtype(factor.dtype))
            tensors[name] = raw.reshape(factor.shape)
    return tensors


def assembled(planned: PlannedModule, matrices: Iterable[PackedMatrix], method: str) -> PackedModule:
    """Return a module's tensors, trained adapters left out, and its entry from its matrices packed by ``method``."""
    pieces, kept = ModulePieces(planned), list(matrices)
    found: dict[str, list[Array]] = {}
    for part in (*map(pieces.of, kept), pieces.rest()):
        for name, piece in part.items():
            found.setdefault(name, []).append(piece)
    shapes = {spec.name: spec.shape for spec in planned.specs()}
    tensors = {
        name: np.concatenate([p.reshape(-1) for p in parts]).reshape(shapes[name]) for name, parts in found.items()
    }
    return PackedModule(pieces.entry(method), tensors, kept)


def used_method(method: str, has_data: bool) -> str:
    """Return the method that packs a module for which ``method`` was asked, with or without statistics of its own."""
    return _FALLBACK if METHODS[method].needs_data and not has_data else method


def values_from(planned: PlannedModule, method: str) -> str:
    """Return where the kept values of a module come from when ``method`` packs it."""
    kind = METHODS[method].values_from
    if planned.entry.group_size is not None and kind == "source_minus_residual":
        return "refit"  # codes and residual were fitted to each other in turn
    is_changed = is_solved(planned.entry) and (planned.residual_rank or kind == "refit")
    return kind if is_changed else "source"


def source_matrices(entry: ModuleEntry, checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    """Yield each (N, K) matrix of a module in its own dtype, in float32 where it is computed."""
    name, is_stack = entry.source_tensor, len(entry.shape) == 3
    for expert in range(entry.shape[0] if is_stack else 1):
        matrix = checkpoint.rows(name, expert, expert + 1)[0] if is_stack else checkpoint.read(name)
        yield matrix.T if entry.transposed else matrix


def _pack_matrix(
    planned: PlannedModule,
    source: torch.Tensor,
    checkpoint: Checkpoint,
    options: ConvertOptions,
    method: str,
    calibrated: Calibrated | None,
) -> PackedMatrix:
    weight = source.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(weight).all()):
        raise SourceError(
            "holds NaN or infinity", path=checkpoint.directory, tensor=planned.entry.source_tensor, fix="save it again"
        )
    dtype = FLOAT_TORCH_DTYPES[planned.entry.dtype]
    problem = _problem(planned, weight, dtype, options, calibrated)
    if source.dtype != dtype or planned.entry.encoding != ENCODING_OF[planned.entry.dtype]:
        _check_range(planned, weight, problem, checkpoint)
    if is_solved(planned.entry):
        solution = solve(method, problem)
    else:
        solution = Solution(torch.ones_like(weight, dtype=torch.bool))
    values = solution.values
    if not isinstance(values, Quantized):
        values = gathered(source if values is None else values, solution.mask).to(problem.dtype)
    return _measured(solution, values, weight, None if calibrated is None else calibrated.gram)


def gathered(weight: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the entries (nnz,) of ``weight`` (N, K) under the mask, row by row.

    On the CPU NumPy does it: torch would make two 64-bit indices for each of them.
    """
    if weight.is_cuda:
        return weight[mask]
    is_bf16 = weight.dtype == torch.bfloat16
    kept = torch.from_numpy((weight.view(torch.int16) if is_bf16 else weight).numpy()[mask.numpy()])
    return kept.view(torch.bfloat16) if is_bf16 else kept


def _check_range(planned: PlannedModule, weight: torch.Tensor, problem: Problem, checkpoint: Checkpoint) -> None:
    """Refuse weights that an encoding other than the source's own cannot hold: too large, or all of them too small."""
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    limits = torch.finfo(problem.dtype)
    holds = largest == 0 or limits.smallest_normal <= largest <= limits.max
    if problem.quantizer is not None:
        holds = problem.quantizer.fits(weight)
    if not holds:
        encoding = planned.entry.encoding
        raise SourceError(
            f"weights of up to {largest:.3g}",
            path=checkpoint.directory,
            tensor=planned.entry.source_tensor,
            needed=f"sizes that {encoding}{' with float16 scales' if problem.quantizer else ''} can hold",
            fix=f"--set '{planned.name} values=source'",
        )


def _problem(
    planned: PlannedModule,
    weight: torch.Tensor,
    dtype: torch.dtype,
    options: ConvertOptions,
    calibrated: Calibrated | None,
) -> Problem:
    entry = planned.entry
    n_matrices = entry.shape[0] if len(entry.shape) == 3 else 1
    return Problem(
        weight=weight if calibrated is None else calibrated.target,
        n_kept=entry.nnz // n_matrices,
        groups=groups_of(entry.pattern, options.chosen_scope),
        rank=planned.residual_rank,
        rounds=options.rounds,
        dtype=TORCH_ENCODINGS.get(entry.encoding, dtype),
        gram=None if calibrated is None else calibrated.gram,
        quantizer=None if entry.group_size is None else Quantizer(entry.encoding, entry.group_size),
        factor_dtype=torch.int8 if planned.residual_dtype == "I8" else dtype,
    )


def groups_of(pattern: str, scope: str) -> Groups:
    """Return where the weights of a module compete."""
    if pattern == "2:4":
        return Groups("n:m", 4)
    return Groups("row" if scope == "row" else "layer")


def _measured(
    solution: Solution, values: torch.Tensor | Quantized, weight: torch.Tensor, gram: torch.Tensor | None
) -> PackedMatrix:
    energy, output = squared_norm(weight), None
    rest = stored_weight(solution.mask, values, solution.factors).neg_().add_(weight)
    if gram is not None:
        output = output_energy(rest, gram) / (output_energy(weight, gram) or 1.0)
    residual_energy = squared_norm(rest)
    mask_energy = squared_norm(weight.masked_fill_(solution.mask, 0))
    return PackedMatrix(solution.mask, values, solution.factors, energy, mask_energy, residual_energy, output)


def stored_weight(mask: torch.Tensor, values: torch.Tensor | Quantized, factors: Factors | None) -> torch.Tensor:
    """Return S + B A (N, K) in float32 from kept values (nnz,) or codes, and factors."""
    if isinstance(values, Quantized):
        weight = values.values(mask)
    else:
        weight = torch.zeros(mask.shape, device=mask.device)
        if weight.is_cuda:
            weight[mask] = values.float()
        else:
            weight.masked_scatter_(mask, values.float())
    return weight if factors is None else minus_product(weight, -factors.scaled_b(), factors.lora_A, weight)


class ModulePieces:
    """Turns a module's matrices, given one after the other, into consecutive pieces of its tensors."""

    def __init__(self, planned: PlannedModule) -> None:
        self._planned, self._errors = planned, list[_Errors]()
        self._half = torch.zeros(0, dtype=torch.uint8)
        self._n_values = self._n_stored = 0

    def of(self, matrix: PackedMatrix) -> dict[str, Array]:
        """Return what the next matrix adds to each tensor."""
        name, entry, factors = self._planned.name, self._planned.entry, matrix.factors
        self._errors.append(_Errors(matrix.energy, matrix.mask_energy, matrix.residual_energy, matrix.output))
        kept = matrix.kept()
        pieces = {naming.values_name(name): self._encoded(kept)}
        if entry.group_size is not None and isinstance(matrix.values, Quantized):
            pieces[naming.scales_name(name)] = to_numpy(matrix.values.scales.half())
        if entry.pattern != "dense":
            bitmap = to_numpy(packed_bits(matrix.mask))
            offsets = row_offsets(bitmap)
            pieces[naming.bitmap_name(name)] = bitmap
            first = len(self._errors) == 1
            pieces[naming.row_offsets_name(name)] = offsets if first else offsets[1:] + np.uint64(self._n_values)
        self._n_values += kept.numel()
        if factors is not None:
            pieces[naming.lora_a_name(name, RESIDUAL)] = to_numpy(factors.lora_A)
            pieces[naming.lora_b_name(name, RESIDUAL)] = to_numpy(factors.lora_B)
            if factors.rank_scales is not None:
                pieces[naming.rank_scales_name(name, RESIDUAL)] = to_numpy(factors.rank_scales)
        return pieces

    def rest(self) -> dict[str, Array]:
        """Return what follows the last matrix: the padding of ``values``."""
        entry = self._planned.entry
        tail = to_numpy(packed_codes(self._half, "nf4")).view(storage_dtype(values_dtype(entry.encoding)))
        n_padding = stored_elements(entry.encoding, entry.nnz) - self._n_stored - len(tail)
        return {naming.values_name(self._planned.name): np.concatenate([tail, np.zeros(n_padding, tail.dtype)])}

    def entry(self, method: str) -> ModuleEntry:
        """Return the manifest's entry, with the errors of the matrices given, packed by ``method``."""
        planned = self._planned
        return replace(planned.entry, error=_error(planned, self._errors), values_from=values_from(planned, method))

    def _encoded(self, kept: torch.Tensor) -> Array:
        """Return values or codes as stored; of nf4, two to a byte, an odd last one waits for the next matrix."""
        if self._planned.entry.encoding == "nf4":
            kept = torch.cat([self._half.to(kept), kept])
            whole = len(kept) // 2 * 2
            self._half, kept = kept[whole:].cpu(), packed_codes(kept[:whole], "nf4")
        self._n_stored += len(kept)
        return to_numpy(kept)


def packed_codes(codes: torch.Tensor, encoding: str) -> torch.Tensor:
    """Return nf4 codes two to a byte, the first in the low nibble; other values as they are."""
    if encoding != "nf4":
        return codes
    codes = torch.nn.functional.pad(codes, (0, len(codes) % 2))
    return codes[0::2] | codes[1::2] << 4


def _error(planned: PlannedModule, errors: list[_Errors]) -> ErrorEntry:
    energy = sum(matrix.energy for matrix in errors)
    unit = energy or 1.0
    mask = sum(matrix.mask for matrix in errors) / unit
    residual = sum(matrix.residual for matrix in errors) / unit
    output = errors[0].output if len(errors) == 1 else None
    return ErrorEntry(energy, mask, residual, error_bound(planned, mask), output)


def error_bound(planned: PlannedModule, mask_error: float) -> float:
    """Return what a truncated SVD of the residual's rank leaves of ``mask_error`` at most."""
    return mask_error * (1 - planned.residual_rank / min(planned.entry.shape[-2:]))


def packed_bits(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask (N, K) into a bitmap (N, ceil(K/8)) where it lies, so that a GPU hands over bits and not bytes."""
    if not mask.is_cuda:
        return torch.from_numpy(pack_bitmap(mask.numpy()))
    bits = torch.nn.functional.pad(mask.byte(), (0, 8 * bitmap_width(mask.shape[1]) - mask.shape[1]))
    packed = torch.zeros(bits.shape[0], bits.shape[1] // 8, dtype=torch.uint8, device=mask.device)
    for bit in range(8):
        packed |= bits[:, bit::8] << bit
    return packed


def squared_norm(matrix: torch.Tensor) -> float:
    """Return the squared Frobenius norm, accumulated in float64 from pieces of rows."""
    if matrix.is_cuda:
        return float(torch.linalg.vector_norm(matrix, dtype=torch.float64)) ** 2
    rows = range(0, matrix.shape[0], _ERROR_ROWS)
    return math.fsum(float(matrix[row : row + _ERROR_ROWS].double().square().sum()) for row in rows)


def to_numpy(tensor: torch.Tensor) -> Array:
    """Return a tensor's bytes as the array that the file stores: BF16 as uint16."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
