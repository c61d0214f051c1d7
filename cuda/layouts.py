"""Which weights are laid out already: one layout for a weight, dtype and device, however many products use it.

Invariant: a layout lives as long as the weight's canonical values or a product that uses it; canonical tensors may lie
in host memory, in a mapped file for instance, and are on the GPU only while they are laid out.
"""

from __future__ import annotations

import weakref

import torch

from .device_layout import SlabWeight, Weight, lay_out

_Key = tuple[int, torch.dtype, torch.device]
_known: dict[_Key, SlabWeight] = {}


def slabs_of(weight: Weight, dtype: torch.dtype, device: torch.device) -> SlabWeight:
    """Return a weight laid out on a device for products in ``dtype``, the same object each time."""
    found = _known.get((id(weight.values), dtype, device))
    if found is None:
        found = lay_out(weight.to(device), dtype)
        remember(weight, found)
    return found


def remember(weight: Weight, slabs: SlabWeight) -> None:
    """Make ``slabs`` the layout of a weight from now on."""
    key = (id(weight.values), slabs.dtype, slabs.slabs.device)
    if key not in _known:
        weakref.finalize(weight.values, _known.pop, key, None)
    _known[key] = slabs
