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
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


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
