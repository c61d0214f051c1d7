"""Who packs: workers that each turn one module at a time into its matrices, on this machine or on others.

Invariant: a packer's matrices are a function of module, options and kind of device, never of which packer it was.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from ..methods.weighted import damped_gram
from ..options import ConvertOptions
from ..plan import Plan, PlannedModule
from ..sources.checkpoint import Checkpoint
from .packing import Calibrated, PackedMatrix, packed_matrices

_ASYMMETRY = 0.5


@dataclass(frozen=True)
class LayerInputs:
    """What calibration saw of one layer: H = sum x x^T (K, K), G = sum x_source x^T or None, and the weight that ran.

    ``adapted`` ([N, K] in the module's orientation) is the source's weight with trained adapters merged.
    """

    gram: torch.Tensor
    cross: torch.Tensor | None
    adapted: torch.Tensor

    def to(self, device: torch.device) -> LayerInputs:
        """Return the same on a device."""
        cross = None if self.cross is None else self.cross.to(device)
        return LayerInputs(self.gram.to(device), cross, self.adapted.to(device))

    def to_cpu(self) -> LayerInputs:
        """Return the same in this machine's memory, as it is sent to another."""
        return self.to(torch.device("cpu"))

    def calibrated(self, module: PlannedModule, checkpoint: Checkpoint, device: torch.device) -> Calibrated:
        """Return the layer's Gram matrix and the target W* = W + (W (G - H) H^-1) / 2."""
        # Read again: (W + B A) - B A is not W to the last bit.
        source = checkpoint.read(module.entry.source_tensor).to(device).float()
        target = oriented(module, source)
        if self.cross is not None:
            shift = self.adapted @ (self.cross - self.gram)
            factor = torch.linalg.cholesky(damped_gram(self.gram))
            target = target + _ASYMMETRY * torch.cholesky_solve(shift.T, factor).T
        return Calibrated(self.gram, target.contiguous())


def oriented(module: PlannedModule, weight: torch.Tensor) -> torch.Tensor:
    """Turn a weight between the source's orientation and (N, K); its own inverse."""
    return weight.T.contiguous() if module.entry.transposed and weight.ndim == 2 else weight


class Packer(Protocol):
    """One worker."""

    def matrices(
        self, module: PlannedModule, options: ConvertOptions, inputs: LayerInputs | None = None
    ) -> Iterator[PackedMatrix]:
        """Yield a module's matrices, fitted to ``inputs`` if there are any."""


class Executor(Protocol):
    """Provides the packers of a conversion."""

    def open(self, plan: Plan) -> AbstractContextManager[Sequence[Packer]]:
        """Yield the packers, ready to work."""


class DevicePacker:
    """Packs on a device of this machine, in the thread that calls."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint, self._device = checkpoint, device

    def matrices(
        self, module: PlannedModule, options: ConvertOptions, inputs: LayerInputs | None = None
    ) -> Iterator[PackedMatrix]:
        """Yield a module's matrices; see ``Packer``."""
        calibrated = None
        if inputs is not None:
            calibrated = inputs.to(self._device).calibrated(module, self._checkpoint, self._device)
        return packed_matrices(module, self._checkpoint, options, self._device, calibrated)


class LocalExecutor:
    """Workers on this machine: as many as asked for, spread evenly over the devices."""

    def __init__(self, devices: Sequence[torch.device], workers: int) -> None:
        self._devices, self._workers = devices, workers

    def open(self, plan: Plan) -> AbstractContextManager[Sequence[Packer]]:
        """Return the packers."""
        devices = (self._devices[i % len(self._devices)] for i in range(self._workers))
        return nullcontext([DevicePacker(plan.checkpoint, device) for device in devices])


class Team:
    """Threads that compute, and the packers that they borrow, each for one module; none where nothing is packed."""

    def __init__(self, pool: ThreadPoolExecutor, packers: Sequence[Packer] = ()) -> None:
        self.pool, self._n_packers = pool, len(packers)
        self._free: queue.SimpleQueue[Packer] = queue.SimpleQueue()
        for packer in packers:
            self._free.put(packer)

    @contextmanager
    def borrowed(self) -> Iterator[Packer]:
        """Yield a packer that nobody else has meanwhile."""
        assert self._n_packers, "this team only measures"
        packer = self._free.get()
        try:
            yield packer
        finally:
            self._free.put(packer)
