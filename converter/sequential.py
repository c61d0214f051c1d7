"""Calibrated packing, block after block: each layer is fitted to the inputs it will really see.

For sequential methods two streams of hidden states run through the model: one through the source's weights, one
through the weights already packed. A layer's Gram matrix H comes from the second; for methods that correct, what the
first would have given moves the target half-way to the least-squares one: W* = W + (W (G - H) H^-1) / 2 with
G = sum x_source x^T (asymmetric calibration, as in GPTAQ, Li et al. 2025). Other methods see the source's own inputs.
Invariant: Gram matrices are summed in the order of the samples, whatever the number of workers; activations are never
kept beyond the hidden states at a block's border.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ..formats.errors import CalibrationError
from .architecture import Architecture
from .blocks import Block, BlockModel
from .calibration import calibration_tokens
from .options import ConvertOptions, Method
from .packing import Calibrated, PackedModule, pack_module
from .plan import Plan, PlannedModule
from .prune import Groups, keep_in_groups
from .sources import tensor_from_bytes
from .weighted import damped_gram, output_energy

_ASYMMETRY = 0.5
_WINDOW = 8
#: windows on which sensitivities are measured
_PROBES = 4
_LAYER = Groups("layer")

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class _Statistics:
    """Of one layer's inputs, summed over tokens: H = sum x x^T (K, K), and G = sum x_source x^T or None."""

    gram: torch.Tensor
    cross: torch.Tensor | None

    def add(self, other: _Statistics) -> None:
        """Add another sample's sums in place."""
        self.gram.add_(other.gram)
        if self.cross is not None and other.cross is not None:
            self.cross.add_(other.cross)


def open_block_run(plan: Plan, options: ConvertOptions, device: torch.device, pool: ThreadPoolExecutor) -> BlockRun:
    """Build the model without weights and run the calibration tokens up to its first block.

    Raises:
        CalibrationError: the data is unusable, or transformers cannot run the model block by block.
    """
    assert options.data is not None
    model = BlockModel(plan.checkpoint, Architecture(plan.checkpoint), device)
    tokens = calibration_tokens(options.data, plan.checkpoint)
    return BlockRun(plan, model, model.embed(tokens), tokens.numel(), _BlockPacker(plan, options, device, pool))


@dataclass(frozen=True)
class MeasuredModule:
    """A planned module, the Gram matrix (K, K) of its inputs if any were seen, and its sensitivity.

    ``sensitivity``: the squared change of the hidden states behind its block, as a share of their own square, for a
    module output that is wrong by all of its energy (measured on a smaller error, and extrapolated).
    """

    module: PlannedModule
    gram: torch.Tensor | None
    sensitivity: float


@dataclass(frozen=True)
class BlockRun:
    """A model at its first block, ready to be packed; ``hidden`` is (1, length, width) a sample."""

    plan: Plan
    model: BlockModel
    hidden: list[torch.Tensor]
    n_tokens: int
    packer: _BlockPacker

    def packed_modules(self) -> Iterator[tuple[PlannedModule, PackedModule]]:
        """Yield the planned modules inside the model's blocks, packed, in the order the model uses them.

        Raises:
            CalibrationError: activations are not finite.
        """
        by_block, streams = self._by_block(), (self.hidden, self.hidden)
        for number in range(len(self.model.blocks)):
            with self.model.loaded(number) as block:
                packed, streams = self.packer.pack(block, by_block.get(number, []), *streams)
                yield from packed

    def measured(self) -> Iterator[list[MeasuredModule]]:
        """Yield the planned modules of each block with what the source's own inputs tell about them."""
        by_block, hidden = self._by_block(), self.hidden
        for number in range(len(self.model.blocks)):
            with self.model.loaded(number) as block:
                found, hidden = self.packer.measure(block, by_block.get(number, []), hidden)
                yield found

    def _by_block(self) -> dict[int, list[PlannedModule]]:
        by_block: dict[int, list[PlannedModule]] = {}
        for module in self.plan.modules:
            number = self.model.block_of(module.entry.source_tensor)
            if number is not None and len(module.entry.shape) == 2:
                by_block.setdefault(number, []).append(module)
        return by_block


_Packed = list[tuple[PlannedModule, PackedModule]]
_Hidden = list[torch.Tensor]


class _BlockPacker:
    """Packs the layers of one block at a time."""

    def __init__(self, plan: Plan, options: ConvertOptions, device: torch.device, pool: ThreadPoolExecutor) -> None:
        self._plan, self._options, self._device, self._pool = plan, options, device, pool
        self._method = options.method_info

    def pack(
        self, block: Block, modules: list[PlannedModule], source_in: _Hidden, packed_in: _Hidden
    ) -> tuple[_Packed, tuple[_Hidden, _Hidden]]:
        """Pack ``modules`` of a block that holds the source's weights; return them and both streams behind it."""
        order, source_out = self._statistics(block, modules, source_in, packed_in, self._method)
        jobs = [self._pool.submit(self._pack_layer, module, block, found) for module, found in order]
        packed = [(module, job.result()) for (module, _), job in zip(order, jobs, strict=True)]
        if not self._method.sequential:
            return packed, (source_out, source_out)
        for module, result in packed:
            weight = result.matrices[0].weight() + _delta(module, self._device)
            block.set_weight(module.entry.source_tensor, _oriented(module, weight))
        return packed, (source_out, list(_windowed(self._pool, block.forward, packed_in)))

    def measure(
        self, block: Block, modules: list[PlannedModule], hidden: _Hidden
    ) -> tuple[list[MeasuredModule], _Hidden]:
        """Return Gram matrix and sensitivity of each module, and the hidden states behind the block."""
        plain = replace(self._method, sequential=False)
        order, output = self._statistics(block, modules, hidden, hidden, plain)
        probes = list(zip(hidden[:_PROBES], output, strict=False))
        found = [MeasuredModule(m, s.gram, self._sensitivity(block, m, s.gram, probes)) for m, s in order]
        return found, output

    def _sensitivity(
        self, block: Block, module: PlannedModule, gram: torch.Tensor, probes: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> float:
        """Prune a module by half for a moment, and see how far that moves the hidden states behind the block."""
        tensor = module.entry.source_tensor
        original = block.weight(tensor)
        weight = _oriented(module, original)
        mask = keep_in_groups(weight.abs() * gram.diagonal().clamp_min(0).sqrt(), weight.numel() // 2, _LAYER)
        lost = output_energy(weight.masked_fill(mask, 0), gram) / (output_energy(weight, gram) or 1.0)
        block.set_weight(tensor, _oriented(module, weight.masked_fill(~mask, 0)))
        moved = [_relative_change(block.forward(hidden), output) for hidden, output in probes]
        block.set_weight(tensor, original)
        return sum(moved) / len(moved) / (lost or 1.0)

    def _statistics(
        self, block: Block, modules: list[PlannedModule], source_in: _Hidden, packed_in: _Hidden, method: Method
    ) -> tuple[list[tuple[PlannedModule, _Statistics]], _Hidden]:
        """Merge trained adapters into the block; return each module's statistics and the source's stream behind it."""
        by_tensor = {module.entry.source_tensor: module for module in modules}
        for module in modules:
            block.set_weight(module.entry.source_tensor, self._adapted(block, module))
        groups = block.input_groups(packed_in[0], list(by_tensor)) if modules else []
        statistics, source_out = self._collect([group[0] for group in groups], block, source_in, packed_in, method)
        return [(by_tensor[tensor], statistics[group[0]]) for group in groups for tensor in group], source_out

    def _collect(
        self, tensors: list[str], block: Block, source_in: _Hidden, packed_in: _Hidden, method: Method
    ) -> tuple[dict[str, _Statistics], _Hidden]:
        """Return the statistics of each layer of ``tensors``, and the source's stream behind the block."""
        totals: dict[str, _Statistics] = {}
        outputs = []
        with block.capturing(tensors) as capture:

            def products(hidden: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict[str, _Statistics], torch.Tensor]:
                wanted, output = capture(hidden[0])
                if not method.sequential:
                    return {t: _Statistics(x.T @ x, None) for t, x in wanted.items()}, output
                real, _ = capture(hidden[1])
                cross = {t: wanted[t].T @ x if method.corrects else None for t, x in real.items()}
                return {t: _Statistics(x.T @ x, cross[t]) for t, x in real.items()}, output

            for found, output in _windowed(self._pool, products, list(zip(source_in, packed_in, strict=True))):
                outputs.append(output)
                for tensor, part in found.items():
                    if tensor in totals:
                        totals[tensor].add(part)
                    else:
                        totals[tensor] = part
        return totals, outputs

    def _pack_layer(self, module: PlannedModule, source: Block, statistics: _Statistics) -> PackedModule:
        gram, checkpoint = statistics.gram, self._plan.checkpoint
        if not bool(torch.isfinite(gram).all()):
            raise CalibrationError(
                "its inputs are not finite on the calibration text", path=checkpoint.directory, tensor=module.name
            )
        adapted = _oriented(module, source.weight(module.entry.source_tensor))
        # Read again: (W + B A) - B A is not W to the last bit.
        source_weight = checkpoint.read(module.entry.source_tensor).to(self._device).float()
        target = _oriented(module, source_weight)
        if statistics.cross is not None:
            shift = adapted @ (statistics.cross - gram)
            target = target + _ASYMMETRY * torch.cholesky_solve(shift.T, torch.linalg.cholesky(damped_gram(gram))).T
        return pack_module(module, checkpoint, self._options, self._device, Calibrated(gram, target.contiguous()))

    def _adapted(self, block: Block, module: PlannedModule) -> torch.Tensor:
        """Return the block's weight with the trained adapters merged, in the block's orientation."""
        weight = block.weight(module.entry.source_tensor)
        return weight + _oriented(module, _delta(module, self._device)) if module.trained else weight


def _relative_change(moved: torch.Tensor, original: torch.Tensor) -> float:
    """Return the squared change of each token's hidden state as a share of its own square, averaged over tokens."""
    change = (moved - original).double().square().sum(-1)
    return float((change / original.double().square().sum(-1).clamp_min(1e-30)).mean())


def _windowed(pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: list[_Item]) -> Iterator[_Result]:
    """Yield results in the order of ``items``, computing a few at a time so that they do not pile up."""
    for start in range(0, len(items), _WINDOW):
        yield from pool.map(function, items[start : start + _WINDOW])


def _oriented(module: PlannedModule, weight: torch.Tensor) -> torch.Tensor:
    """Turn a weight between the block's orientation and (N, K); its own inverse."""
    return weight.T.contiguous() if module.entry.transposed and weight.ndim == 2 else weight


def _delta(module: PlannedModule, device: torch.device) -> torch.Tensor:
    """Return the sum of the trained adapters' updates (N, K), a scalar zero without any."""
    total = torch.zeros((), device=device)
    for trained in module.trained:
        lora_a, lora_b = (
            tensor_from_bytes(trained.adapter.raw(factor.name), factor.dtype, factor.shape).to(device).float()
            for factor in (trained.pair.lora_A, trained.pair.lora_B)
        )
        total = total + trained.pair.scaling * (lora_b @ lora_a)
    return total
