"""Calibrated packing, block after block: each layer is fitted to the inputs it will really see.

For sequential methods two streams of hidden states run through the model: one through the source's weights, one
through the weights already packed. A layer's Gram matrix H comes from the second; for methods that correct, what the
first would have given moves the target half-way to the least-squares one: W* = W + (W (G - H) H^-1) / 2 with
G = sum x_source x^T (asymmetric calibration, as in GPTAQ, Li et al. 2025). Other methods see the source's own inputs.
Invariant: Gram matrices are summed in the order of the samples, whatever the number of workers; activations are never
kept beyond the hidden states at a block's border.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from ...formats.errors import CalibrationError
from ..execution.packers import LayerInputs, Team, oriented
from ..execution.packing import PackedModule, assembled
from ..execution.spool import Hidden, Streams
from ..methods.prune import Groups, keep_in_groups
from ..methods.weighted import gram_matrix, output_energy
from ..options import ConvertOptions, Method
from ..plan import Plan, PlannedModule
from ..sources.architecture import Architecture
from ..sources.checkpoint import tensor_from_bytes
from .blocks import Block, BlockModel
from .data import calibration_tokens

_WINDOW = 8
#: windows on which sensitivities are measured
_PROBES = 4
_LAYER = Groups("layer")

#: a module of a block with its tensors, trained adapters left out
PackedLayer = tuple[PlannedModule, PackedModule]
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


def open_block_run(plan: Plan, options: ConvertOptions, device: torch.device, team: Team) -> BlockRun:
    """Build the model without weights and run the calibration tokens up to its first block.

    Raises:
        CalibrationError: the data is unusable, or transformers cannot run the model block by block.
    """
    assert options.data is not None
    model = BlockModel(plan.checkpoint, Architecture(plan.checkpoint), device)
    tokens = calibration_tokens(options.data, plan.checkpoint)
    packer = _BlockPacker(plan, options, device, team)
    return BlockRun(plan, model, model.embed(tokens), tokens.numel(), packer)


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

    def packed_blocks(
        self, wanted: Collection[str], start: int = 0, streams: Streams | None = None
    ) -> Iterator[tuple[int, list[PackedLayer], Streams]]:
        """Yield each block's number, its ``wanted`` modules packed, in the order of their use, and both streams behind.

        Blocks behind the last wanted module are left out.

        Args:
            wanted: names of the modules to pack.
            start: the first block to pack. streams: hidden states that enter it, where it is not block 0.

        Raises:
            CalibrationError: activations are not finite.
        """
        by_block, current = self.by_block(), streams or (self.hidden, self.hidden)
        needed = [number for number, modules in by_block.items() if any(m.name in wanted for m in modules)]
        for number in range(start, max(needed, default=-1) + 1):
            with self.model.loaded(number) as block:
                packed, current = self.packer.pack(block, by_block.get(number, []), wanted, *current)
                yield number, packed, current

    def measured(self) -> Iterator[list[MeasuredModule]]:
        """Yield the planned modules of each block with what the source's own inputs tell about them."""
        by_block, hidden = self.by_block(), self.hidden
        for number in range(len(self.model.blocks)):
            with self.model.loaded(number) as block:
                found, hidden = self.packer.measure(block, by_block.get(number, []), hidden)
                yield found

    def by_block(self) -> dict[int, list[PlannedModule]]:
        """Return the planned matrices inside the model's blocks."""
        by_block: dict[int, list[PlannedModule]] = {}
        for module in self.plan.modules:
            number = self.model.block_of(module.entry.source_tensor)
            if number is not None and len(module.entry.shape) == 2:
                by_block.setdefault(number, []).append(module)
        return by_block


class _BlockPacker:
    """Packs the layers of one block at a time."""

    def __init__(self, plan: Plan, options: ConvertOptions, device: torch.device, team: Team) -> None:
        self._plan, self._options, self._device, self._team = plan, options, device, team
        self._method = options.method_info

    def pack(
        self,
        block: Block,
        modules: list[PlannedModule],
        wanted: Collection[str],
        source_in: Hidden,
        packed_in: Hidden,
    ) -> tuple[list[PackedLayer], Streams]:
        """Pack the ``wanted`` of a block's ``modules``, while it holds the source's weights.

        Return them and both streams behind the block.
        """
        order, source_out = self._statistics(block, modules, wanted, source_in, packed_in, self._method)
        jobs = [self._team.pool.submit(self._pack_layer, module, block, found) for module, found in order]
        packed = [(module, job.result()) for (module, _), job in zip(order, jobs, strict=True)]
        if not self._method.sequential:
            return packed, (source_out, source_out)
        for module, result in packed:
            weight = result.matrices[0].weight().to(self._device) + _delta(module, self._device)
            block.set_weight(module.entry.source_tensor, oriented(module, weight))
        return packed, (source_out, list(_windowed(self._team.pool, block.forward, packed_in)))

    def measure(
        self, block: Block, modules: list[PlannedModule], hidden: Hidden
    ) -> tuple[list[MeasuredModule], Hidden]:
        """Return Gram matrix and sensitivity of each module, and the hidden states behind the block."""
        plain = replace(self._method, sequential=False)
        order, output = self._statistics(block, modules, {m.name for m in modules}, hidden, hidden, plain)
        probes = list(zip(hidden[:_PROBES], output, strict=False))
        found = [MeasuredModule(m, s.gram, self._sensitivity(block, m, s.gram, probes)) for m, s in order]
        return found, output

    def _sensitivity(
        self, block: Block, module: PlannedModule, gram: torch.Tensor, probes: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> float:
        """Prune a module by half for a moment, and see how far that moves the hidden states behind the block."""
        tensor = module.entry.source_tensor
        original = block.weight(tensor)
        weight = oriented(module, original)
        mask = keep_in_groups(weight.abs() * gram.diagonal().clamp_min(0).sqrt(), weight.numel() // 2, _LAYER)
        lost = output_energy(weight.masked_fill(mask, 0), gram) / (output_energy(weight, gram) or 1.0)
        block.set_weight(tensor, oriented(module, weight.masked_fill(~mask, 0)))
        moved = [_relative_change(block.forward(hidden), output) for hidden, output in probes]
        block.set_weight(tensor, original)
        return sum(moved) / len(moved) / (lost or 1.0)

    def _statistics(
        self,
        block: Block,
        modules: list[PlannedModule],
        wanted: Collection[str],
        source_in: Hidden,
        packed_in: Hidden,
        method: Method,
    ) -> tuple[list[tuple[PlannedModule, _Statistics]], Hidden]:
        """Merge trained adapters into the block; return what the wanted modules saw, and the source's stream behind."""
        by_tensor = {module.entry.source_tensor: module for module in modules if module.name in wanted}
        for module in modules:
            block.set_weight(module.entry.source_tensor, self._adapted(block, module))
        groups = block.input_groups(packed_in[0], list(by_tensor)) if by_tensor else []
        statistics, source_out = self._collect([group[0] for group in groups], block, source_in, packed_in, method)
        return [(by_tensor[tensor], statistics[group[0]]) for group in groups for tensor in group], source_out

    def _collect(
        self, tensors: list[str], block: Block, source_in: Hidden, packed_in: Hidden, method: Method
    ) -> tuple[dict[str, _Statistics], Hidden]:
        """Return the statistics of each layer of ``tensors``, and the source's stream behind the block."""
        totals: dict[str, _Statistics] = {}
        outputs = []
        with block.capturing(tensors) as capture:

            def products(hidden: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict[str, _Statistics], torch.Tensor]:
                wanted, output = capture(hidden[0])
                if not method.sequential:
                    return {t: _Statistics(gram_matrix(x), None) for t, x in wanted.items()}, output
                real, _ = capture(hidden[1])
                cross = {t: wanted[t].T @ x if method.corrects else None for t, x in real.items()}
                return {t: _Statistics(gram_matrix(x), cross[t]) for t, x in real.items()}, output

            for found, output in _windowed(self._team.pool, products, list(zip(source_in, packed_in, strict=True))):
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
        adapted = oriented(module, source.weight(module.entry.source_tensor))
        inputs = LayerInputs(gram, statistics.cross, adapted)
        with self._team.borrowed() as packer:
            matrices = list(packer.matrices(module, self._options, inputs))
        return assembled(module, matrices, self._options.chosen_method)

    def _adapted(self, block: Block, module: PlannedModule) -> torch.Tensor:
        """Return the block's weight with the trained adapters merged, in the block's orientation."""
        weight = block.weight(module.entry.source_tensor)
        return weight + oriented(module, _delta(module, self._device)) if module.trained else weight


def _relative_change(moved: torch.Tensor, original: torch.Tensor) -> float:
    """Return the squared change of each token's hidden state as a share of its own square, averaged over tokens."""
    change = (moved - original).double().square().sum(-1)
    return float((change / original.double().square().sum(-1).clamp_min(1e-30)).mean())


def _windowed(pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: list[_Item]) -> Iterator[_Result]:
    """Yield results in the order of ``items``, computing a few at a time so that they do not pile up."""
    for start in range(0, len(items), _WINDOW):
        yield from pool.map(function, items[start : start + _WINDOW])


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
