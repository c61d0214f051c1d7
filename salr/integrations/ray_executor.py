"""Conversions on a Ray cluster: each worker opens the source for itself, this process runs the model and writes.

Invariant: a worker packs only if its device and library versions are those of this process, because they shape the
bytes; so the file is the one that this machine alone would make.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..converter.execution.decisions import Decisions
from ..converter.execution.devices import environment, resolve_devices
from ..converter.execution.packers import DevicePacker, LayerInputs, Packer
from ..converter.execution.packing import PackedMatrix
from ..converter.options import ConvertOptions
from ..converter.plan import Plan, PlannedModule, make_plan
from ..converter.sources.opening import open_source
from ..formats.errors import OptionError


class RayExecutor:
    """Packers on the machines of a Ray cluster, one for each worker, or each GPU with ``device`` ``cuda``.

    Args:
        source: as given to ``convert``; every machine must see it under this path.
        options: as given to ``convert``; ``workers`` is how many to start, None for all that the cluster has room for.

    Raises:
        OptionError: Ray is not installed.
    """

    def __init__(self, source: str | Path, options: ConvertOptions) -> None:
        self._source = Path(source).absolute() if Path(source).exists() else source  # else a hub's id
        self._options = options
        self._ray = _import_ray()

    @contextmanager
    def open(self, plan: Plan) -> Iterator[Sequence[Packer]]:
        """Start the workers (and Ray, where it does not run yet), and end them with the block.

        Raises:
            OptionError: there is no room for a worker, or a machine differs from this one.
        """
        ray, is_mine = self._ray, not self._ray.is_initialized()
        if is_mine:
            ray.init(address=None, configure_logging=False, include_dashboard=False)
        on_gpus = plan.options.device.startswith("cuda")
        resource = "GPU" if on_gpus else "CPU"
        count = self._options.workers or int(ray.cluster_resources().get(resource, 0))
        try:
            if count < 1 or ray.cluster_resources().get(resource, 0) < count:
                found = f"{ray.cluster_resources().get(resource, 0):.0f} {resource}s in the Ray cluster"
                raise OptionError(found, needed=f"{max(count, 1)} for as many workers", fix="give fewer --workers")
            worker = ray.remote(num_cpus=1, num_gpus=1 if on_gpus else 0)(_Worker)
            actors = [worker.remote(self._source, plan.options, _decisions(plan)) for _ in range(count)]
            self._check_same(plan, ray.get([actor.environment.remote() for actor in actors]))
            yield [_RayPacker(ray, actor) for actor in actors]
        finally:
            if is_mine:
                ray.shutdown()

    def _check_same(self, plan: Plan, found: list[dict[str, str]]) -> None:
        here = environment(resolve_devices(plan.options.device)[0])
        for other in found:
            for key, value in here.items():
                if other[key] != value:
                    raise OptionError(
                        f"a worker has {key} {other[key]!r}, this process {value!r}",
                        needed="one kind of device and one set of versions, which the bytes depend on",
                        fix="start the cluster from machines and environments that are alike",
                    )


class _RayPacker:
    """One remote worker."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor

    def matrices(
        self, module: PlannedModule, options: ConvertOptions, inputs: LayerInputs | None = None
    ) -> Iterator[PackedMatrix]:
        """Yield a module's matrices one by one, each computed over there; see ``Packer``."""
        n_matrices = module.entry.shape[0] if len(module.entry.shape) == 3 else 1
        sent = None if inputs is None else inputs.to_cpu()
        for _ in range(n_matrices):
            try:
                yield self._ray.get(self._actor.next_matrix.remote(module.name, options, sent))
            except self._ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from error


class _Worker:
    """What runs on the other side: a plan of its own, and one module at a time."""

    def __init__(self, source: str | Path, options: ConvertOptions, decisions: Decisions) -> None:
        import torch

        torch.set_num_threads(1)
        device = resolve_devices("cuda:0" if options.device.startswith("cuda") else options.device)[0]
        checkpoint, adapters = open_source(source, options)
        plan = make_plan(checkpoint, adapters, options, decisions.kept_counts)
        self._modules = {module.name: module for module in plan.modules}
        self._packer, self._device = DevicePacker(checkpoint, device), device
        self._running: tuple[str, Iterator[PackedMatrix]] | None = None

    def environment(self) -> dict[str, str]:
        """Return what shapes this worker's bytes."""
        return environment(self._device)

    def next_matrix(self, name: str, options: ConvertOptions, inputs: LayerInputs | None) -> PackedMatrix:
        """Return the next matrix of a module, the first one where another module was asked for before."""
        if self._running is None or self._running[0] != name:
            self._running = name, self._packer.matrices(self._modules[name], options, inputs)
        matrix = next(self._running[1])
        if len(self._modules[name].entry.shape) == 2:
            self._running = None
        return matrix.to_cpu()


def _decisions(plan: Plan) -> Decisions:
    """Return what a worker needs to make the same plan (its options carry the overrides already)."""
    return Decisions(kept_counts={module.name: module.entry.nnz for module in plan.modules})


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise OptionError("--executor ray without Ray", needed="Ray", fix="pip install 'salr[ray]'") from error
    return ray
