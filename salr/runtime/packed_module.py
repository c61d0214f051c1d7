"""A packed module in torch: the file's tensors as buffers, and the matrices that backends are given.

Invariant: buffers have the file's dtypes and bytes, whatever ``.to(dtype)`` is asked for, and its names but for factors
(see ``layout``); what kernels need beside them (float32 scales, adapters concatenated along the rank) is derived when
first used and again when a buffer or the choice of adapters changes. One float adapter is used where it lies. Buffers
stay in host memory, mapped from the file, where the backend of the module's device keeps a layout of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..formats.manifest import RESIDUAL, AdapterEntry, ModuleEntry
from . import backends
from .errors import LoadError
from .layout import TORCH_DTYPES, ModuleLayout, buffer_name
from .matrix import Matrix, concatenated, expert_adapters, split
from .packed import Adapters, PackedWeight

_PLAIN = ("values", "bitmap", "row_offsets", "scales")


class Factors(torch.nn.Module):
    """One factor of each adapter, a buffer under the adapter's name."""


class TakenAdapter(NamedTuple):
    """An adapter that left a packed module: its entry, lora_A ([E,] r, K) and lora_B ([E,] N, r) in a float dtype."""

    entry: AdapterEntry
    lora_A: torch.Tensor
    lora_B: torch.Tensor


class PackedModule(torch.nn.Module):
    """The tensors of one packed module; ``entry.shape`` is (N, K), or (E, N, K) for stacked experts.

    Args:
        layout: names, dtypes and shapes; the buffers are made empty, to be filled by name.
        device: of the empty buffers.

    Raises:
        LoadError: an adapter's name is one that torch.nn.Module uses itself.
    """

    values: torch.Tensor
    bitmap: torch.Tensor | None
    row_offsets: torch.Tensor | None
    scales: torch.Tensor | None

    def __init__(self, layout: ModuleLayout, device: torch.device | str = "meta") -> None:
        super().__init__()
        self.entry: ModuleEntry = layout.entry
        #: which backend computes; None for the device's own
        self.backend: str | None = None
        #: what x is expected in; only ``weight`` tells it
        self.compute_dtype = TORCH_DTYPES[layout.entry.dtype]
        self._active = {adapter.name: 1.0 for adapter in layout.entry.adapters}
        #: adapters of the file that are no part of the product any more, by name (see ``take_out``)
        self.taken: dict[str, AdapterEntry] = {}
        self._derived: tuple[torch.Tensor | None, list[Matrix]] | None = None
        #: where x is expected while the buffers stay in host memory; None where they follow the module
        self._placed: torch.device | None = None
        for name in _PLAIN:
            self.register_buffer(name, None)
        for spec in layout.tensors:
            owner, _, leaf = buffer_name(spec.name).rpartition(".")
            self._register(owner, leaf, torch.empty(spec.shape, dtype=TORCH_DTYPES[spec.dtype], device=device))

    def _register(self, owner_name: str, name: str, tensor: torch.Tensor) -> None:
        """Add a buffer: one of the module's own, or an adapter's factor."""
        if owner_name and owner_name not in self._modules:
            self.add_module(owner_name, Factors())
        owner = self.get_submodule(owner_name)
        try:
            owner.register_buffer(name, tensor)
        except KeyError as error:
            raise LoadError(
                f"an adapter is called {name!r}, a name that torch modules use themselves",
                tensor=self.entry.source_tensor,
                fix="give the adapter another name when it is added",
            ) from error

    @property
    def in_features(self) -> int:
        """K."""
        return self.entry.shape[-1]

    @property
    def out_features(self) -> int:
        """N."""
        return self.entry.shape[-2]

    @property
    def compute_device(self) -> torch.device:
        """Where x is expected."""
        return self.values.device if self._placed is None else self._placed

    @property
    def weight(self) -> torch.Tensor:
        """A placeholder ([E,] N, K) for code that asks a layer for its weight's shape, dtype or device.

        It is one NaN seen through strides of 0, so that to compute with it shows at once; no write to it is kept.
        """
        nan = torch.full((), torch.nan, dtype=self.compute_dtype, device=self.compute_device)
        placeholder = nan.expand(self.entry.shape)
        placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
        return placeholder

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The trained adapters; the residual belongs to the weight and is not one of them."""
        return tuple(name for name in self._active if name != RESIDUAL)

    def set_adapters(self, scales: Mapping[str, float]) -> None:
        """Make exactly these trained adapters active, each at ``scale`` times its own scaling; others are off."""
        for name in self.adapter_names:
            self._active[name] = float(scales.get(name, 0.0))
        self._derived = None

    def take_out(self, name: str) -> TakenAdapter | None:
        """Take an adapter out of the product for good and return it, on the device where x is; None without it.

        int8 factors become float32, with each rank's scale split evenly between both.

        Raises:
            LoadError: the module is offloaded, or the adapter is not active at its own scaling.
        """
        entry = next((adapter for adapter in self.entry.adapters if adapter.name == name), None)
        if entry is None:
            return None
        lora_a, lora_b = self._factor("factor_A", name), self._factor("factor_B", name)
        if lora_a.is_meta:
            raise LoadError("an offloaded layer cannot be trained", tensor=name, fix="load the model on one device")
        if self._active[name] != 1:
            raise LoadError(
                f"adapter '{name}' acts at {self._active[name]:g} of its scaling",
                needed="1, so that training begins where the model is",
                fix=f"model.set_adapters({{'{name}': 1}}) first",
            )
        if self._is_int8(name):
            scale = self._factor("rank_scales", name)
            root = scale.abs().sqrt()
            lora_a, lora_b = lora_a * root[:, None], lora_b * (root * scale.sign())
        for kind in ("factor_A", "factor_B", "rank_scales"):
            owner = self._modules.get(kind)
            if owner is not None:
                owner._buffers.pop(name, None)
        self.entry = replace(self.entry, adapters=tuple(a for a in self.entry.adapters if a.name != name))
        del self._active[name]
        self.taken[name], self._derived = entry, None
        device = self.compute_device
        return TakenAdapter(entry, lora_a.to(device), lora_b.to(device))

    def matrices(self) -> list[Matrix]:
        """Return the module's matrices, one an expert, derived anew where the buffers were replaced."""
        values = self._buffers["values"]
        if self._derived is not None and self._derived[0] is values:
            return self._derived[1]
        matrices = self._derive()
        # Weights that are offloaded after each call must not be held here.
        is_offloaded = getattr(getattr(self, "_hf_hook", None), "offload", False)
        self._derived = None if is_offloaded else (values, matrices)
        return matrices

    def _derive(self) -> list[Matrix]:
        entry = self.entry
        weight = PackedWeight(
            n_rows=entry.n_rows,
            n_columns=entry.n_columns,
            nnz=entry.nnz,
            encoding=entry.encoding,
            pattern=entry.pattern,
            values=self.values,
            bitmap=self.bitmap,
            row_offsets=None if self.row_offsets is None else self.row_offsets.view(torch.int64),
            scales=None if self.scales is None else self.scales.float(),
            group_size=entry.group_size,
        )
        adapters = self.stacked_adapters()
        if len(entry.shape) == 2:
            return [Matrix(weight, adapters)]
        return [Matrix(part, expert_adapters(adapters, e)) for e, part in enumerate(split(weight, entry.shape))]

    def stacked_adapters(self) -> Adapters | None:
        """Return the active adapters concatenated along the rank, in their common float dtype."""
        chosen = [adapter for adapter in self.entry.adapters if self._active[adapter.name]]
        if not chosen:
            return None
        scaling = []
        for adapter in chosen:
            own = torch.full((adapter.rank,), adapter.scaling * self._active[adapter.name], device=self.values.device)
            scaling.append(own * self._factor("rank_scales", adapter.name) if self._is_int8(adapter.name) else own)
        return Adapters(
            lora_A=concatenated([self._factor("factor_A", adapter.name) for adapter in chosen], -2),
            lora_B=concatenated([self._factor("factor_B", adapter.name) for adapter in chosen], -1),
            scaling=torch.cat(scaling) if len(scaling) > 1 else scaling[0],
        )

    def _factor(self, kind: str, adapter: str) -> torch.Tensor:
        return self.get_submodule(kind).get_buffer(adapter)

    def _is_int8(self, adapter: str) -> bool:
        return self._factor("factor_A", adapter).dtype == torch.int8

    def keep_on_host(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replace buffers by equal ones in host memory, by name; x is expected where they were."""
        self._placed = self.compute_device
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            self.get_submodule(owner)._buffers[leaf] = tensor
        self._derived = None

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedModule:
        """Move the packed tensors with ``fn`` where they have to be, and keep their dtypes; the rest follows ``fn``."""
        packed = {id(tensor) for tensor in self.buffers()}
        probe = fn(torch.empty(0, dtype=self.compute_dtype, device=self.compute_device))
        stays = (
            self.values.device.type == "cpu"
            and probe.device.type != "cpu"
            and backends.keeps_packed_on_host(probe.device.type, self.backend)
        )

        def keeping(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in packed:
                return fn(tensor)
            if stays and tensor.device.type == "cpu":
                return tensor
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        self._derived, self._placed = None, probe.device if stays else None
        self.compute_dtype = probe.dtype
        super()._apply(keeping, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self._derived = None
        super()._load_from_state_dict(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_derived": None}

    def extra_repr(self) -> str:
        """Return shape, sparsity, rank and encoding."""
        entry = self.entry
        removed = 1 - entry.nnz / entry.n_weights
        ranks = [f"{adapter.name} {adapter.rank}" for adapter in entry.adapters]
        experts = f"experts={entry.shape[0]}, " if len(entry.shape) == 3 else ""
        return (
            f"{experts}in_features={self.in_features}, out_features={self.out_features}, sparsity={removed:.2f}, "
            f"rank={' + '.join(ranks) or 0}, encoding={entry.encoding}"
        )
