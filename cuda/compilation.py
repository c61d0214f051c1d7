"""Compiling the kernels: CuPy's NVRTC, once for each device, kernel and set of definitions.

Invariant: nothing is compiled and no device touched at import; a binary on disk is named by all that it was made from.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

KERNELS = Path(__file__).parent / "kernels"
_STANDARD = "-std=c++17"
ENCODINGS = {"bitmap16": 0, "dense16": 2, "dense8": 3, "dense4": 4}

#: file -> the architectures it is compiled for; sm_90a was run, the others are compiled only
TARGETS: dict[str, tuple[str, ...]] = {
    "decoded_linear.cu": ("sm_90a",),
    "tiles_of_x.cu": ("sm_90a",),
    "skinny_linear.cu": ("sm_90", "sm_90a", "sm_100"),
    "add_norm_beside.cu": ("sm_90", "sm_90a", "sm_100"),
} | {
    file: ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100")
    for file in (
        "fused_linear.cu",
        "lay_out.cu",
        "expand.cu",
        "beside.cu",
        "add_norm.cu",
        "rotary.cu",
        "gated.cu",
        "attend.cu",
    )
}
LEAST_CAPABILITY = (8, 0)
_ALL_SHARED = 100  # percent
_LEAST_OVERLAPPING = 90
#: the one with asynchronous products (wgmma), compiled for as sm_90a
ASYNC_CAPABILITY = (9, 0)


def options(definitions: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Return NVRTC's options for a set of definitions."""
    return (_STANDARD, f"-I{KERNELS}", *(f"-D{name}={value}" for name, value in definitions))


def source(file: str) -> str:
    """Return a kernel's source; its headers are found beside it."""
    return (KERNELS / file).read_text(encoding="utf-8")


@functools.cache
def module(file: str, definitions: tuple[tuple[str, int], ...], device: int) -> Any:
    """Return a compiled module on a device as a cupy.RawModule."""
    import cupy

    with cupy.cuda.Device(device) as here:
        return cupy.RawModule(path=str(_cached(file, definitions, architecture(here.compute_capability))))


class Function(NamedTuple):
    """A kernel's handle (CUfunction), which belongs to the context of one device.

    ``may_overlap``: whether launches there may begin before the kernel in front of them ends.
    """

    handle: int
    device: int
    may_overlap: bool = True


@functools.cache
def function(file: str, name: str, definitions: tuple[tuple[str, int], ...], device: int) -> Function:
    """Return a kernel that may use all shared memory that a thread block can have."""
    import cupy

    with cupy.cuda.Device(device) as here:
        found = module(file, definitions, device).get_function(name)
        most = here.attributes["MaxSharedMemoryPerBlockOptin"]
        found.max_dynamic_shared_size_bytes = most - found.shared_size_bytes
        found.preferred_shared_memory_carveout = _ALL_SHARED  # else a small kernel finds none left beside a product
        may_overlap = int(here.compute_capability) >= _LEAST_OVERLAPPING
        return Function(int(found.kernel.ptr), device, may_overlap)  # the pointer is that of the current device


def architecture(capability: str) -> str:
    """Return what to compile for on a device: sm_90a, which has asynchronous products, instead of sm_90."""
    return "sm_90a" if capability == "90" else f"sm_{capability}"


def cubin(file: str, definitions: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """Compile for an architecture that need not be here; nothing is loaded.

    Raises:
        cupy.cuda.compiler.CompileException: the source does not compile.
    """
    from cupy.cuda.compiler import _NVRTCProgram

    program = _NVRTCProgram(source(file), file, method="cubin")
    code, _ = program.compile((*options(definitions), f"-arch={architecture}"))
    return bytes(code)


def _cached(file: str, definitions: tuple[tuple[str, int], ...], architecture: str) -> Path:
    """Return a binary on disk, compiled unless one of the same sources, options and compiler is there."""
    from cupy_backends.cuda.libs import nvrtc

    folder = os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache"
    facts = repr((_headers(), source(file), _STANDARD, definitions, architecture, nvrtc.getVersion()))
    path = Path(folder) / f"salr-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.cubin"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as partial:
            partial.write(cubin(file, definitions, architecture))
        Path(partial.name).replace(path)
    return path


@functools.cache
def _headers() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(KERNELS.glob("*.cuh")))
