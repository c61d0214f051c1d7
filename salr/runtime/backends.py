"""Backends: the modules that compute a packed product, by name.

Invariant: a backend is imported when it is first asked for, and whatever keeps it from being used becomes a sentence,
never an exception of another library. Each is a module with ``linear`` (signature of ``reference.linear``) and, where
it needs more than torch, ``reason_unusable() -> str | None``.
"""

from __future__ import annotations

import functools
import os
from importlib import import_module
from types import ModuleType
from typing import Protocol

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


def reason_unusable(name: str) -> str | None:
    """Return why a backend cannot be used on this machine, None where it can.

    Raises:
        BackendError: there is no backend of that name.
    """
    return _found(name)[1]


def linear(name: str) -> Linear:
    """Return the product of a backend.

    Raises:
        BackendError: the backend is unknown, or cannot be used here.
    """
    module, reason = _found(name)
    if module is None or reason is not None:
        raise BackendError(f"backend {name!r} cannot be used here: {reason}", fix="see `salr doctor`")
    return module.linear  # type: ignore[no-any-return]


@functools.cache
def linear_for(device_type: str, name: str | None = None) -> Linear:
    """Return the product to use on a kind of device: of ``name``, or of the first usable backend."""
    return linear(name or choose(device_type))


def choose(device_type: str) -> str:
    """Return the backend that runs on a kind of device: what SALR_BACKEND names, or the first usable one.

    Raises:
        BackendError: SALR_BACKEND names none, or one that cannot be used here.
    """
    wanted = os.environ.get(ENVIRONMENT_VARIABLE)
    if wanted:
        linear(wanted)
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
