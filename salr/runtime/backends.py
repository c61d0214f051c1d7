"""Backends: the modules that compute a packed product, by name.

Invariant: a backend is imported when it is first asked for, and whatever keeps it from being used becomes a sentence,
never an exception of another library. Each is a module with ``linear`` (signature of ``reference.linear``); where it
needs more than torch, ``reason_unusable() -> str | None``; where a matrix can be made ready once, ``prepare`` and
``apply``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import torch

from .errors import BackendError
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
class Backend:
    """A usable backend; ``prepare`` and ``apply`` split its ``linear`` into what is done once and at each call."""

    name: str
    linear: Linear
    prepare: Callable[[PackedWeight, Adapters | None, torch.Tensor | None], Any] | None = None
    apply: Callable[[Any, torch.Tensor], torch.Tensor] | None = None

    def product(
        self, weight: PackedWeight, adapters: Adapters | None, bias: torch.Tensor | None
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the product with one matrix, for many calls: x (M, K), contiguous -> y (M, N)."""
        if self.prepare is None or self.apply is None:
            return lambda x: self.linear(x, weight, adapters, bias)
        return functools.partial(self.apply, self.prepare(weight, adapters, bias))


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
    prepare, apply = getattr(module, "prepare", None), getattr(module, "apply", None)
    return Backend(name, module.linear, prepare, apply)


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
