"""The ways in which a module could be stored, each with its size and the harm it would do.

For each sparsity of a grid the weights with the largest |w| sqrt(diag H) stay, fitted to the mask where the method
refits; rounding noise of each encoding is added, as much of it as error compensation leaves; the leading eigenvalues of
E H E^T of what is lost give the output error at every rank at once. How much better the method itself does, with and
without a low-rank part, is measured at one sparsity and assumed at the others. The error as a share of the module's
output, times how far such a share moves the hidden states behind the block (measured too), is that of a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...formats.bitmap import bitmap_width
from ...formats.dtypes import DTYPE_BITS, FLOAT_ENCODINGS
from ...formats.errors import CalibrationError
from ...formats.values import QUANTIZED_BITS
from ..execution.packers import Team
from ..execution.packing import source_matrices, used_method
from ..methods import Problem, solve
from ..methods.prune import Groups, keep_in_groups
from ..methods.quantization import Quantizer, compensated, nearest
from ..methods.subspace import start_basis
from ..methods.weighted import ScaledGram, output_energy, refit_values, scaled_gram
from ..module_options import SOURCE, ModuleOptions
from ..options import ConvertOptions
from ..plan import Plan, PlannedModule, n_removed
from .sequential import MeasuredModule, open_block_run

SPARSITIES = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
RANKS = (0, 4, 8, 16, 32, 64, 96, 128)
_REFIT_STEPS = 4
_PROBE_SPARSITY, _PROBE_RANK, _PROBE_ROUNDS = 0.5, 64, 15
_SPECTRUM_STEPS = 2
#: what rounding factors to int8 adds, as a share of the energy that they carry
_INT8_FACTOR_NOISE = 1e-4
_ROW = Groups("row")


@dataclass(frozen=True)
class Candidate:
    """One way to store a module: its size in bits, and the error it causes."""

    sparsity: float
    rank: int
    n_bits: float
    error: float
    values: str = SOURCE
    adapter_values: str = SOURCE

    def settings(self) -> dict[str, Any]:
        """Return the settings of a module that make it so."""
        return {
            "sparsity": self.sparsity,
            "rank": self.rank,
            "values": self.values,
            "adapter_values": self.adapter_values,
        }


def measured_candidates(
    plan: Plan, options: ConvertOptions, device: torch.device, pool: ThreadPoolExecutor
) -> Iterator[tuple[str, list[Candidate]]]:
    """Yield each prunable module with its candidates.

    Raises:
        CalibrationError: the calibration data is unusable.
    """

    def measured(item: MeasuredModule) -> tuple[str, list[Candidate]]:
        return item.module.name, _candidates(item, plan, device)

    for batch in _measured_modules(plan, options, device, pool):
        yield from pool.map(measured, [item for item in batch if item.module.entry.pattern != "dense"])


def _measured_modules(
    plan: Plan, options: ConvertOptions, device: torch.device, pool: ThreadPoolExecutor
) -> Iterator[Sequence[MeasuredModule]]:
    seen: set[str] = set()
    run = None
    if options.data is not None:
        try:
            run = open_block_run(plan, options, device, Team(pool))
        except CalibrationError:
            if options.calibration is not None:
                raise
    for batch in run.measured() if run is not None else ():
        seen.update(item.module.name for item in batch)
        yield batch
    yield [MeasuredModule(module, None, 1.0) for module in plan.modules if module.name not in seen]


def _candidates(item: MeasuredModule, plan: Plan, device: torch.device) -> list[Candidate]:
    entry, options = item.module.entry, plan.options
    (source,) = source_matrices(entry, plan.checkpoint)
    weight = source.to(device).to(torch.float32, memory_format=torch.contiguous_format)
    gram = ScaledGram.identity(weight) if item.gram is None else scaled_gram(item.gram)
    scaled, found = weight * gram.scale, []
    energy = _energy(scaled, gram) or 1.0
    noises = _noises(scaled, options, gram)
    refits = options.method_info.values_from == "refit"
    level, slope = _advantage(item, weight, gram, options, refits)
    for sparsity in SPARSITIES:
        lost, mask = _lost(scaled, sparsity, gram, refits=refits)
        for values, noise in noises.items():
            remaining = _error_by_rank(lost if noise is None else torch.where(mask, lost + noise, lost), gram)
            if sparsity:
                remaining = {r: level * remaining[0] * (e / (remaining[0] or 1)) ** slope for r, e in remaining.items()}
            for rank, error in remaining.items():
                if not rank or sparsity or noise is not None:
                    for adapter_values, extra in _adapter_types(options.module, rank, remaining[0] - error):
                        settings = ModuleOptions(sparsity, rank, values, options.module.group_size, adapter_values)
                        harm = item.sensitivity * (error + extra) / energy
                        bits = _n_bits(item.module, settings, options)
                        found.append(Candidate(sparsity, rank, bits, harm, values, adapter_values))
    return found


def _advantage(
    item: MeasuredModule, weight: torch.Tensor, gram: ScaledGram, options: ConvertOptions, refits: bool
) -> tuple[float, float]:
    """Return how a short run of the method compares with the estimate at one sparsity.

    Its error without a low-rank part over the estimate's, and the ratio of the logarithms of what a low-rank part
    leaves of each.
    """
    rank = min(_PROBE_RANK, *weight.shape)
    n_kept = (weight.shape[1] - int(_PROBE_SPARSITY * weight.shape[1])) * weight.shape[0]
    method = used_method(options.chosen_method, item.gram is not None)
    rounds = min(options.rounds, _PROBE_ROUNDS)
    problem = Problem(weight, n_kept, _ROW, 0, rounds, torch.float32, item.gram)
    found = []
    for r in (0, rank):
        solution = solve(method, replace(problem, rank=r))
        sparse = weight if solution.values is None else solution.values
        assert isinstance(sparse, torch.Tensor)  # nothing is quantized here
        rest = weight - sparse.masked_fill(~solution.mask, 0)
        rest = rest if solution.factors is None else solution.factors.subtracted(rest)
        found.append(_energy(rest * gram.scale, gram))
    estimate = _error_by_rank(_lost(weight * gram.scale, _PROBE_SPARSITY, gram, refits=refits)[0], gram)
    closest = max(r for r in estimate if r <= rank)
    if not (found[0] > found[1] > 0 and estimate[0] > estimate[closest] > 0):
        return 1.0, 1.0
    return found[0] / estimate[0], math.log(found[1] / found[0]) / math.log(estimate[closest] / estimate[0])


def _value_types(asked: ModuleOptions) -> tuple[str, ...]:
    """Return the encodings to choose from: all, unless one was asked for."""
    return (SOURCE, *QUANTIZED_BITS) if asked.values == SOURCE else (asked.values,)


def _adapter_types(asked: ModuleOptions, rank: int, carried: float) -> list[tuple[str, float]]:
    """Return storages of the factors with the error that each adds."""
    int8 = ("int8", _INT8_FACTOR_NOISE * carried)
    if not rank:
        return [(asked.adapter_values, 0.0)]
    return [int8] if asked.adapter_values == "int8" else [(SOURCE, 0.0), int8]


def _energy(error: torch.Tensor, gram: ScaledGram) -> float:
    """Return tr(E C E^T) for an error in scaled columns."""
    return float(error.double().square().sum()) if gram.matrix is None else output_energy(error, gram.matrix)


def _lost(
    scaled: torch.Tensor, sparsity: float, gram: ScaledGram, *, refits: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W - S in scaled columns and the mask, S being what a weighted mask of ``sparsity`` keeps."""
    n_kept = scaled.shape[1] - int(sparsity * scaled.shape[1])
    mask = keep_in_groups(scaled.abs(), n_kept * scaled.shape[0], _ROW)
    if not (refits and sparsity and gram.matrix is not None):
        return scaled.masked_fill(mask, 0), mask
    return scaled - refit_values(scaled, scaled, mask, gram.matrix, _REFIT_STEPS), mask


def _noises(scaled: torch.Tensor, options: ConvertOptions, gram: ScaledGram) -> dict[str, torch.Tensor | None]:
    """Return for each encoding its rounding error, as much as error compensation leaves of it; None for floats."""
    found: dict[str, torch.Tensor | None] = {}
    weight, mask = scaled / gram.scale, torch.ones_like(scaled, dtype=torch.bool)
    compensates = gram.matrix is not None and options.method_info.values_from == "refit"
    share: float | None = None  # that is left; much the same for int8 and nf4, so it is measured once
    for values in _value_types(options.module):
        found[values] = None
        if values not in QUANTIZED_BITS:
            continue
        quantizer = Quantizer(values, options.module.group_size)
        noise = scaled - nearest(weight, mask, quantizer, gram.scale.square()).values(mask) * gram.scale
        if compensates and share is None:
            left = scaled - compensated(weight, mask, quantizer, gram.unscaled()).values(mask) * gram.scale
            share = _energy(left, gram) / (_energy(noise, gram) or 1.0)
        found[values] = noise if share is None else noise * share**0.5
    return found


def _error_by_rank(error: torch.Tensor, gram: ScaledGram) -> dict[int, float]:
    """Return what a weighted low-rank part of each rank leaves of tr(E C E^T)."""
    total = _energy(error, gram)
    most = min(error.shape)
    ranks = [rank for rank in RANKS if rank <= most]
    if not total or not ranks[-1]:
        return {0: total}
    basis = start_basis(error, ranks[-1], gram.matrix, _SPECTRUM_STEPS)
    image = basis.T @ error
    carried = torch.linalg.eigvalsh((image if gram.matrix is None else image @ gram.matrix).double() @ image.T.double())
    sums = carried.flip(0).cumsum(0)
    return {rank: max(total - float(sums[rank - 1]), 0.0) if rank else total for rank in ranks}


def _n_bits(module: PlannedModule, settings: ModuleOptions, options: ConvertOptions) -> float:
    """Return the size of a module stored so, adapters counted: values, scales, bitmap, row offsets and factors."""
    entry = module.entry
    dtype = entry.dtype if settings.values == SOURCE else FLOAT_ENCODINGS.get(settings.values, "")
    width = QUANTIZED_BITS.get(settings.values) or DTYPE_BITS[dtype]
    factor_width = 8 if settings.adapter_values == "int8" else DTYPE_BITS[entry.dtype]
    factor_bits = factor_width * (settings.rank or 0)
    factor_bits += sum(DTYPE_BITS[t.pair.lora_A.dtype] * t.pair.rank for t in module.trained)
    n_bits = factor_bits * (entry.n_rows + entry.n_columns)
    if settings.adapter_values == "int8":
        n_bits += DTYPE_BITS["F32"] * (settings.rank or 0)
    if settings.is_quantized:
        n_bits += 16 * entry.n_rows * -(-entry.n_columns // settings.group_size)
    if not settings.sparsity:
        return n_bits + width * entry.n_weights
    kept = entry.n_weights - n_removed(module.name, settings, entry.n_rows, entry.n_columns, options)
    return n_bits + width * kept + 8 * bitmap_width(entry.n_columns) * entry.n_rows + 64 * (entry.n_rows + 1)
