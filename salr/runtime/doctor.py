"""What can run here: devices, backends and libraries.

Invariant: nothing is guessed; a backend that cannot be used carries the reason its own check gave.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata

import torch

from . import backends, memory

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "numba", "cupy", "onnxruntime")


@dataclass(frozen=True)
class BackendState:
    """One backend; ``reason`` says why it cannot be used, None where it can."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class DeviceState:
    """One device: what it is, its free memory in bytes (None if unknown), and the backend chosen for it."""

    name: str
    kind: str
    free_bytes: int | None
    backend: str


@dataclass(frozen=True)
class Diagnosis:
    """The state of this machine; ``libraries`` maps a name to its version, None where it is not installed."""

    python: str
    system: str
    libraries: dict[str, str | None]
    devices: list[DeviceState]
    backends: list[BackendState]


def diagnose() -> Diagnosis:
    """Look at this machine."""
    devices = [_device(torch.device("cpu"), _processor())]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        devices.append(_device(torch.device("cuda", index), torch.cuda.get_device_name(index)))
    return Diagnosis(
        python=sys.version.split()[0],
        system=f"{platform.system()} {platform.machine()}",
        libraries={name: _version(name) for name in LIBRARIES},
        devices=devices,
        backends=[BackendState(name, backends.reason_unusable(name)) for name in backends.MODULES],
    )


def _device(device: torch.device, kind: str) -> DeviceState:
    return DeviceState(str(device), kind, memory.free_bytes(device), backends.choose(device.type))


def _processor() -> str:
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {n_cores} cores"


def _version(name: str) -> str | None:
    """Return the version of an installed library; CuPy's wheels carry the CUDA version in their name."""
    for distribution in (name, *([f"cupy-cuda{major}x" for major in (12, 13)] if name == "cupy" else [])):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None
