"""Which weights are laid out already: one layout for a weight, dtype and device, however many products use it.

Invariant: a layout lives as long as the weight's canonical values or a product that uses it; canonical tensors may lie
in host memory, in a mapped file for instance, and are on the GPU only while they are laid out.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

from .device_layout import SlabWeight, Weight, lay_out

_Key = tuple[int, torch.dtype, torch.device]
_known: dict[_Key, SlabWeight] = {}


@dataclass
class Canonical:
    """A weight's canonical tensors on one device (see ``device_layout.Weight``)."""

    n_rows: int
    n_columns: int
    nnz: int
    encoding: str
    values: torch.Tensor
    bitmap: torch.Tensor | None
    row_offsets: torch.Tensor | None
    scales: torch.Tensor | None
    group_size: int | None


def slabs_of(weight: Weight, dtype: torch.dtype, device: torch.device) -> SlabWeight:
    """Return a weight laid out on a device for products in ``dtype``, the same object each time."""
    found = _known.get((id(weight.values), dtype, device))
    if found is None:
        found = lay_out(moved(weight, device), dtype)
        remember(weight, found)
    return found


def remember(weight: Weight, slabs: SlabWeight) -> None:
    """Make ``slabs`` the layout of a weight from now on."""
    key = (id(weight.values), slabs.dtype, slabs.slabs.device)
    if key not in _known:
        weakref.finalize(weight.values, _known.pop, key, None)
    _known[key] = slabs


def moved(weight: Weight, device: torch.device) -> Canonical:
    """Return a weight's canonical tensors on a device."""

    def there(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.to(device)

    return Canonical(
        weight.n_rows, weight.n_columns, weight.nnz, weight.encoding, weight.values.to(device), there(weight.bitmap),
        there(weight.row_offsets), there(weight.scales), weight.group_size,
    )  # fmt: skip
