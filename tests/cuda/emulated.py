"""The kernels without a GPU: the same sources, compiled for the CPU by emulator/, launched by the same Python.

Invariant: what is emulated is the kernels' logic, with threads in an order that a seed decides and copies that come
late; speed, caches and what a GPU orders by itself are not.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from salr.cuda import compilation, expanded, launching, linear, operations, sums

from salr.onnx.library import find_compiler
from salr.runtime import backends

EMULATOR = Path(__file__).parent / "emulator"
BUILT = Path(__file__).parents[2] / "build" / "emulated"
#: what test_sanitized.py adds to the compiler's flags
MORE_FLAGS = "SALR_EMULATED_FLAGS"
FLAGS = (
    "-std=c++20", "-O1", "-w", "-fPIC", "-pthread", "-fno-strict-aliasing", "-fwrapv",
    *os.environ.get(MORE_FLAGS, "").split(),
)  # fmt: skip
#: of shared memory that a thread block may have, by compute capability
SHARED_BYTES = {(8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
OWN_BYTES = 1 << 10  # that CUDA takes of each thread block's
_KERNEL = re.compile(
    r'extern "C" __global__ void\s+(?:__cluster_dims__\((\w+)[^)]*\)\s*)?'
    r"(?:__\w+__\((?:[^()]|\([^()]*\))*\)\s*)?(\w+)\("
)
_VARIABLES = re.compile(r"^\s*__shared__ (?:__align__\(\d+\) )?\w+ ([^;]+);", re.MULTILINE)
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")


def compiled(file: str, definitions: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """Return a kernel's file compiled for the CPU, as a library of ``launch_<kernel>``."""
    source = compilation.source(file)
    kernels = "".join(f"\nKERNEL({name}, {cluster or 1})" for cluster, name in _KERNEL.findall(source))
    source = _DYNAMIC.sub(r"\1* const \2 = (\1*)gpu::dynamic;", _VARIABLES.sub(_with_names, source))
    text = f'#include "gpu.h"\n{source}{kernels}\n'
    options = [f"-D{name}={value}" for name, value in definitions]
    headers = {path.name: path for folder in (compilation.KERNELS, EMULATOR) for path in folder.glob("*.*h")}
    library = _made(
        text, ["-shared", *options, str(_made((EMULATOR / "gpu.cpp").read_text(), ["-c"], headers))], headers
    )
    return _loaded(library)


def _with_names(declaration: re.Match[str]) -> str:
    """Return a declaration of variables in shared memory, and what tells the emulator where they are."""
    names = [re.sub(r"\[.*", "", name).strip() for name in declaration[1].split(",")]
    return declaration[0] + "".join(f" VARIABLE({name});" for name in names)


def _made(text: str, options: list[str], headers: dict[str, Path]) -> Path:
    """Return what the compiler makes of a source, of the same source, headers and options once."""
    BUILT.mkdir(parents=True, exist_ok=True)
    command = [find_compiler(), *FLAGS, *options]
    facts = repr([text, command, *(headers[name].read_text(encoding="utf-8") for name in sorted(headers))])
    made = BUILT / f"{hashlib.sha256(facts.encode()).hexdigest()[:24]}.made"
    if not made.is_file():
        folder = Path(tempfile.mkdtemp(prefix=made.stem, dir=BUILT))
        for name, path in headers.items():
            (folder / name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        (folder / "main.cpp").write_text(text, encoding="utf-8")
        subprocess.run([*command[:1], "main.cpp", *command[1:], "-o", "partial"], cwd=folder, check=True)
        (folder / "partial").replace(made)
        shutil.rmtree(folder)
    return made


@functools.cache
def _loaded(library: Path) -> ctypes.CDLL:
    found = ctypes.CDLL(str(library))
    found.what_was_wrong.restype = ctypes.c_char_p
    return found


class Driver:
    """Launches as CUDA's driver does, kernels that were ``made`` here; each in another order of threads."""

    def __init__(self, capability: tuple[int, int], n_sms: int, seed: int) -> None:
        self._architecture, self._shared_bytes = 100 * capability[0] + 10 * capability[1], SHARED_BYTES[capability]
        self._n_sms = n_sms
        self._seeds = itertools.count(seed)
        self._kernels: list[tuple[ctypes.CDLL, str]] = []

    def made(self, file: str, name: str, definitions: tuple[tuple[str, int], ...], device: int | None) -> Any:
        """Return a kernel, as ``compilation.function`` does."""
        library = compiled(file, (("__CUDA_ARCH__", self._architecture), *definitions))
        self._kernels.append((library, name))
        return compilation.Function(len(self._kernels), 0)

    def cuOccupancyMaxActiveClusters(self, found: Any, _: ctypes.c_void_p, address: int) -> int:
        """Find room for as many clusters as there are pairs of multiprocessors: clusters are asked for as a grid."""
        found._obj.value = self._n_sms // launching._Configuration.from_address(address).grid[0]
        return 0

    def cuLaunchKernelEx(self, address: int, function: ctypes.c_void_p, arguments: Any, _: None) -> int:
        """Run a kernel to its end.

        Raises:
            AssertionError: the emulator's complaint.
        """
        configuration = launching._Configuration.from_address(address)
        library, name = self._kernels[(function.value or 0) - 1]
        asked = configuration.shared_bytes
        assert asked + OWN_BYTES <= self._shared_bytes, f"{name}: {asked} bytes of {self._shared_bytes}"
        seed = ctypes.c_ulonglong(next(self._seeds))
        status = getattr(library, f"launch_{name}")(configuration.grid, configuration.block[0], asked, arguments, seed)
        assert status == 0, f"{name}: {library.what_was_wrong().decode()}"
        return 0


@contextlib.contextmanager
def emulation(capability: tuple[int, int] = (9, 0), n_sms: int = 6, seed: int = 0) -> Iterator[None]:
    """Run kernels on tensors in host memory, as if on a GPU of this capability with so many multiprocessors."""
    driver = Driver(capability, n_sms, seed)
    properties = SimpleNamespace(
        multi_processor_count=n_sms, shared_memory_per_block_optin=SHARED_BYTES[capability],
        shared_memory_per_multiprocessor=SHARED_BYTES[capability] + 1024,
    )  # fmt: skip
    users = [
        module for name, module in sys.modules.items() if name.startswith("salr.cuda.") and "function" in vars(module)
    ]
    with contextlib.ExitStack() as stack:
        for module in users:
            stack.enter_context(mock.patch.object(module, "function", driver.made))
        for name, answer in (
            ("current_device", 0), ("get_device_properties", properties), ("get_device_capability", capability),
            ("synchronize", None),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True))
        stack.enter_context(mock.patch.object(launching, "driver", lambda: driver))
        stack.enter_context(mock.patch.object(linear, "reason_unusable", lambda: None))
        for known in (backends.backend_for, backends._found):
            known.cache_clear()  # what was found out about this machine
            stack.callback(known.cache_clear)
        choices = operations._splits, operations._norm
        for found in (sums._known, expanded._known_buffers, operations._workspace, *choices):
            found.cache_clear()  # a launch that failed may leave workspaces as no other may find them
            stack.callback(found.cache_clear)
        yield
