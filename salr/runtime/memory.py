"""How much memory is free, and whether a model fits.

Invariant: an unknown amount refuses nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .errors import LoadError

_RESERVE = 0.05


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device in bytes; None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return _linux_bytes("/proc/meminfo", "MemAvailable:") if device.type == "cpu" else None


def used_bytes(device: torch.device) -> int | None:
    """Return the memory that this process uses on a device in bytes, mapped files included; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _linux_bytes("/proc/self/status", "VmRSS:") if device.type == "cpu" else None


def _linux_bytes(path: str, key: str) -> int | None:
    """Return a size that Linux tells in kB; None elsewhere."""
    try:
        lines = Path(path).read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), None)


def is_exhausted(error: BaseException) -> bool:
    """Tell whether torch raised ``error`` because a device has no memory left."""
    # On a CPU torch has no type of its own for it.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def check_fits(needed: int, device: torch.device, path: object) -> None:
    """Refuse a model that needs more than a device has free.

    Raises:
        LoadError: see above.
    """
    free = free_bytes(device)
    if free is not None and needed > free * (1 - _RESERVE):
        raise LoadError(
            f"{free / 1e9:.2f} GB of memory free on {device}",
            path=str(path),
            needed=f"{needed / 1e9:.2f} GB",
            fix="free some, give device_map='auto' for several devices, or convert with a higher sparsity",
        )
