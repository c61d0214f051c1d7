"""Backends: the modules that compute a packed product, by name.

Invariant: a backend is imported when it is first asked for, and whatever keeps it from being used becomes a sentence,
never an exception of another library. Each is a module with ``linear`` (signature of ``reference.linear``); where it
needs more than torch, ``reason_unusable() -> str | None``; where a matrix can be made ready once, ``prepare`` and
``apply``, and ``train`` where gradients have a way of their own; where it cannot take every matrix, ``takes(weight,
dtype) -> str | None`` with the reason against; where one launch can serve several matrices, ``stack``; where it needs
no packed tensors on its device once a product is made ready, ``KEEPS_PACKED_ON_HOST``.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import torch

from . import reference
from .errors import BackendError
from .gradients import DecodedInFloat, Trainable
from .packed import Adapters, PackedWeight

#: name -> module; the first usable one of a device's list runs there
MODULES = {"cuda": "salr.cuda.linear", "cpu": "salr.runtime.cpu", "reference": "salr.runtime.reference"}
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "reference")}
ANYWHERE = ("reference",)
ENVIRONMENT_VARIABLE = "SALR_BACKEND"


class Linear(Protocol):
    """x (M, K) -> y (M, N) in x's dtype."""

    def __call__(
        self, x: torch.Tensor, weight: PackedWeight, adapters: Adapters | None = None, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return x W^T + adapters + bias."""


@dataclass(frozen=True)
class Product:
    """The product with one matrix, for many calls: ``run`` takes x (M, K), contiguous, to y (M, N)."""

    run: Callable[[torch.Tensor], torch.Tensor]
    #: what gradients flow through, made when first asked for; the same each time
    trainable: Callable[[], Trainable]


@dataclass(frozen=True)
class Backend:
    """A usable backend; ``prepare`` and ``apply`` split its ``linear`` into what is done once and at each call.

    ``train`` takes what ``prepare`` returned, a device and a dtype to a ``Trainable``.
    """

    name: str
    linear: Linear
    prepare: Callable[[PackedWeight, Adapters | None, torch.Tensor | None], Any] | None = None
    apply: Callable[[Any, torch.Tensor], torch.Tensor] | None = None
    takes: Callable[[PackedWeight, torch.dtype], str | None] | None = None
    stack: Callable[..., Callable[[torch.Tensor], torch.Tensor] | None] | None = None
    train: Callable[[Any, torch.device, torch.dtype], Trainable] | None = None
    keeps_packed_on_host: bool = False

    def product(
        self,
        weight: PackedWeight,
        adapters: Adapters | None,
        bias: torch.Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Product:
        """Return the product with one matrix, for many calls.

        x will be on ``device`` in ``dtype``. What the backend does not take, the reference computes, with a warning.
        """
        refused = self.takes is not None and self._refuses(weight, dtype)
        if (refused or not self.keeps_packed_on_host) and weight.values.device != device:
            weight, adapters = weight.to(device), None if adapters is None else adapters.to(device)
        if refused or self.prepare is None or self.apply is None:
            linear = reference.linear if refused else self.linear
            run = functools.partial(linear, weight=weight, adapters=adapters, bias=bias)
            return Product(run, functools.cache(lambda: DecodedInFloat(run, weight, adapters)))
        prepared = self.prepare(weight, adapters, bias)
        run = functools.partial(self.apply, prepared)
        if self.train is None:
            return Product(run, functools.cache(lambda: DecodedInFloat(run, weight, adapters)))
        return Product(run, functools.cache(functools.partial(self.train, prepared, device, dtype)))

    def _refuses(self, weight: PackedWeight, dtype: torch.dtype) -> bool:
        reason = None if self.takes is None else self.takes(weight, dtype)
        if reason is not None:
            _warn(f"backend {self.name!r} does not take {reason}; the reference computes, slowly")
        return reason is not None


def reason_unusable(name: str) -> str | None:
    """Return why a backend cannot be used on this machine, None where it can.

    Raises:
        BackendError: there is no backend of that name.
    """
    return _found(name)[1]


def usable(name: str) -> Backend:
    """Return a backend.

    Raises:
        BackendError: the backend is unknown, or cannot be used here.
    """
    module, reason = _found(name)
    if module is None or reason is not None:
        raise BackendError(f"backend {name!r} cannot be used here: {reason}", fix="see `salr doctor`")
    optional = {member: getattr(module, member, None) for member in ("prepare", "apply", "takes", "stack", "train")}
    return Backend(name, module.linear, **optional, keeps_packed_on_host=getattr(module, "KEEPS_PACKED_ON_HOST", False))


def keeps_packed_on_host(device_type: str, name: str | None = None) -> bool:
    """Tell whether packed tensors may stay in host memory for products on a kind of device."""
    try:
        return backend_for(device_type, name).keeps_packed_on_host
    except BackendError:
        return False  # the product will tell it


@functools.cache
def backend_for(device_type: str, name: str | None = None) -> Backend:
    """Return the backend to use on a kind of device: ``name``, or the first usable one."""
    return usable(name or choose(device_type))


def choose(device_type: str) -> str:
    """Return the backend that runs on a kind of device: what SALR_BACKEND names, or the first usable one.

    Raises:
        BackendError: SALR_BACKEND names none, or one that cannot be used here.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted:
        usable(wanted)
        return wanted
    return next(name for name in ORDER.get(device_type, ANYWHERE) if reason_unusable(name) is None)


@functools.cache
def _warn(message: str) -> None:
    """Warn, once for each message."""
    warnings.warn(message, stacklevel=2)


@functools.cache
def _found(name: str) -> tuple[ModuleType | None, str | None]:
    """Return a backend's module and why it cannot be used; one of the two is None."""
    if name not in MODULES:
        raise BackendError(f"backend {name!r}", needed="one of " + ", ".join(MODULES))
    try:
        module = import_module(MODULES[name])
        reason: str | None = getattr(module, "reason_unusable", lambda: None)()
    except ModuleNotFoundError as error:
        missing = error.name or ""
        is_own = MODULES[name] == missing or MODULES[name].startswith(missing + ".")
        return None, "not installed" if is_own else f"package {missing!r} is not installed"
    except Exception as error:  # a broken driver or library raises anything; each only means that it is unusable
        return None, f"cannot be imported ({' '.join(str(error).split())[:160] or type(error).__name__})"
    return (module, None) if reason is None else (None, reason)
