"""Where a conversion computes: the CPU, or one or several GPUs of one kind.

Invariant: the devices of one conversion are of one kind, because the kind shapes the bytes.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

import numpy as np
import torch

from ...formats.errors import OptionError

_MOST_WORKERS = 8
#: threads that feed one GPU, so that writing overlaps computing
_GPU_WORKERS = 2


def resolve_devices(name: str) -> list[torch.device]:
    """Return the torch devices for ``cpu``, ``cuda`` (all that are visible) or ``cuda:i,...``.

    Raises:
        OptionError: there is no such device here, or they are of different kinds.
    """
    devices = [resolve_device(part) for part in _names(name)]
    check_one_kind([device_kind(device) for device in devices])
    return devices


def _names(name: str) -> list[str]:
    if name == "cuda":
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or [name]
    if name.startswith("cuda:"):
        return [f"cuda:{index}" for index in name.removeprefix("cuda:").split(",")]
    return [name]


def check_one_kind(kinds: Sequence[str]) -> None:
    """Refuse devices of different kinds.

    Raises:
        OptionError: see above.
    """
    if len(set(kinds)) > 1:
        raise OptionError(
            f"devices of different kinds ({', '.join(sorted(set(kinds)))})",
            needed="one kind, which the bytes depend on",
            fix="name those of one kind with --device",
        )


def resolve_device(name: str) -> torch.device:
    """Return the torch device for ``cpu`` or ``cuda[:i]``.

    Raises:
        OptionError: there is no such device here.
    """
    if name != "cpu" and not name.startswith("cuda"):
        raise OptionError(f"device {name!r}", needed="cpu or cuda[:i,...]")
    try:
        device = torch.device(name)
        # torch loads its linear algebra at the first call, which must not come from two threads at once.
        torch.linalg.cholesky(torch.eye(2, device=device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device {name!r} cannot be used ({reason})", fix="give --device cpu") from error
    return device


def worker_count(workers: int | None, devices: Sequence[torch.device]) -> int:
    """Return how many modules are packed at once when ``workers`` are asked for, None for the usual number."""
    if workers is not None:
        return workers
    if devices[0].type == "cuda":
        return _GPU_WORKERS * len(devices)
    return max(len(devices), min(os.cpu_count() or 1, _MOST_WORKERS))


def device_kind(device: torch.device) -> str:
    """Return what a device is, as far as it shapes bytes: the GPU's model, or the CPU's instruction set."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return f"{device.type}: {kind}"


def environment(device: torch.device) -> dict[str, str]:
    """Return the device kind and library versions that shape the bytes."""
    return {
        "device": device_kind(device),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
