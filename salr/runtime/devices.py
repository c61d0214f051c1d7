"""Where a model is asked to go: a word to a torch device that is there."""

from __future__ import annotations

import torch

from ..formats.errors import OptionError


def usable_device(name: str | torch.device) -> torch.device:
    """Return the torch device.

    Raises:
        OptionError: torch knows no such device, or it is not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"device {str(name)!r}", needed="cpu or cuda[:i]") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OptionError(
            f"device {str(name)!r} is not there", needed=f"one of {torch.cuda.device_count()} CUDA devices"
        )
    return device
