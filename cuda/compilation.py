"""Compiling the kernels: CuPy's NVRTC, once for each device, kernel and set of definitions.

Invariant: nothing is compiled and no device is touched at import; binaries are cached on disk by CuPy.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parent / "kernels"
ENCODINGS = {"bitmap16": 0, "bitmap8": 1, "dense16": 2, "dense8": 3, "dense4": 4}

#: file -> functions in it and the architectures it is compiled for; sm_90 was run, others are compiled only
TARGETS: dict[str, tuple[str, ...]] = {
    "fused_linear.cu": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100"),
    "lay_out.cu": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100"),
    "expand.cu": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100"),
    "add_norm.cu": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100"),
    "rotary.cu": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100"),
    "gated.cu": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100"),
    "attend.cu": ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100"),
}
LEAST_CAPABILITY = (8, 0)


def options(definitions: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
    """Return NVRTC's options for a set of definitions."""
    return ("-std=c++17", f"-I{KERNELS}", *(f"-D{name}={value}" for name, value in definitions))


def source(file: str) -> str:
    """Return a kernel's source; its headers are found beside it."""
    return (KERNELS / file).read_text(encoding="utf-8")


@functools.cache
def module(file: str, definitions: tuple[tuple[str, int], ...], device: int) -> Any:
    """Return a compiled module on a device as a cupy.RawModule."""
    import cupy

    with cupy.cuda.Device(device):
        compiled = cupy.RawModule(code=source(file), options=options(definitions), name_expressions=None)
        compiled.compile()
    return compiled


@functools.cache
def function(file: str, name: str, definitions: tuple[tuple[str, int], ...], device: int) -> int:
    """Return the handle (CUfunction) of a kernel that may use all shared memory that a thread block can have."""
    import cupy

    with cupy.cuda.Device(device) as here:
        found = module(file, definitions, device).get_function(name)
        most = here.attributes["MaxSharedMemoryPerBlockOptin"]
        found.max_dynamic_shared_size_bytes = most - found.shared_size_bytes
    return int(found.kernel.ptr)


def cubin(file: str, definitions: tuple[tuple[str, int], ...], architecture: str) -> bytes:
    """Compile for an architecture that need not be here; nothing is loaded.

    Raises:
        cupy.cuda.compiler.CompileException: the source does not compile.
    """
    from cupy.cuda.compiler import _NVRTCProgram

    program = _NVRTCProgram(source(file), file, method="cubin")
    code, _ = program.compile((*options(definitions), f"-arch={architecture}"))
    return bytes(code)
