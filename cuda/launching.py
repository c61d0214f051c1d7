"""Launching a compiled kernel on torch's current stream, as a programmatic dependent launch.

Invariant: a launch's arguments are laid out when it is made; launching again changes pointers and asks the driver once,
a few microseconds. A dependent launch may begin before the kernel in front of it ends: its kernel waits by itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch

from .compilation import Function

_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_RELAXED_CAPTURE = 2
#: launches' arguments and workspaces are shared, so that one thread at a time makes a product
ONE_AT_A_TIME = threading.RLock()
_NOTHING = contextlib.nullcontext()
_INVALID_CONTEXT = 201  # a thread that has not used the GPU yet, as autograd's own at first


class CudaError(RuntimeError):
    """The driver refused a launch."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_byte * 60))


class _Configuration(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("n_attributes", ctypes.c_uint),
    )


class Launch:
    """One kernel with its grid and arguments: ctypes values or structures, shared with the caller, who may change them.

    Args:
        function: the kernel; launches go to its device, whichever is current.
        grid: thread blocks in x, y, z.
        n_threads: a thread block's.
        shared_bytes: dynamic shared memory.
        arguments: in the kernel's order.
        is_dependent: whether it may start while the kernel before it on the stream still runs.
    """

    def __init__(
        self,
        function: Function,
        grid: tuple[int, int, int],
        n_threads: int,
        shared_bytes: int,
        arguments: list[Any],
        is_dependent: bool = True,
    ) -> None:
        self._arguments = arguments
        self._pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(value) for value in arguments))
        self._attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, 1)
        self._configuration = _Configuration(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(n_threads, 1, 1), shared_bytes, None,
            ctypes.pointer(self._attribute), int(is_dependent and function.may_overlap),
        )  # fmt: skip
        self._address = ctypes.addressof(self._configuration)
        self._function, self._device = ctypes.c_void_p(function.handle), function.device
        self._driver = driver()

    def over(self, x: int, y: int = 1, z: int = 1) -> Launch:
        """Set how many thread blocks there are, and return self."""
        self._configuration.grid[:] = x, y, z
        return self

    def clusters_at_once(self, thread_blocks: int) -> int:
        """Return how many clusters of so many thread blocks the device holds at the same time.

        Raises:
            CudaError: the driver's answer was not success.
        """
        found, address = ctypes.c_int(), self.over(thread_blocks)._address
        self._ask("cuOccupancyMaxActiveClusters", ctypes.byref(found), self._function, address)
        return found.value

    def __call__(self, stream: int) -> None:
        """Launch on a stream (its handle) of the function's device.

        Raises:
            CudaError: the driver's answer was not success.
        """
        self._configuration.stream = stream
        self._ask("cuLaunchKernelEx", self._address, self._function, self._pointers, None)

    def _ask(self, name: str, *arguments: Any) -> None:
        """Call one of the driver's functions, with the function's device current."""
        call = getattr(self._driver, name)
        is_current = torch.cuda.current_device() == self._device
        with _NOTHING if is_current else torch.cuda.device(self._device):
            status = call(*arguments)
            if status == _INVALID_CONTEXT:
                make_current(self._device)
                status = call(*arguments)
        _require(status, name)


def fields(pointers: str, numbers: str, floats: str = "") -> list[tuple[str, Any]]:
    """Return the ctypes fields of a kernel's arguments, named in its order: pointers, then integers, then floats."""
    kinds = ((pointers, ctypes.c_void_p), (numbers, ctypes.c_int), (floats, ctypes.c_float))
    return [(name, kind) for names, kind in kinds for name in names.split()]


def address(tensor: torch.Tensor | None) -> int | None:
    """Return where a tensor lies, None where there is none."""
    return None if tensor is None else tensor.data_ptr()


def stream_of(tensor: torch.Tensor) -> int:
    """Return the handle of torch's current stream on a tensor's device, in a tenth of a microsecond."""
    return int(torch._C._cuda_getCurrentRawStream(tensor.device.index))


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor contiguous and on 16 bytes, as kernels load it."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def is_capturing(device: torch.device) -> bool:
    """Tell whether torch's current stream is being captured as a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def uncaptured(device: torch.device) -> Iterator[None]:
    """Run what is inside at once, on a stream of its own, where torch's current stream is being captured."""
    if not is_capturing(device):
        yield
        return
    mode = ctypes.c_int(_RELAXED_CAPTURE)  # what is not captured may allocate and be waited for
    _require(driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
    try:
        stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
    finally:
        driver().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


def make_current(device: int) -> None:
    """Make a device's context, which torch uses too, this thread's own.

    Raises:
        CudaError: the driver's answer was not success.
    """
    _require(driver().cuCtxSetCurrent(ctypes.c_void_p(_context(device))), "cuCtxSetCurrent")


@functools.cache
def _context(device: int) -> int | None:
    context, number = ctypes.c_void_p(), ctypes.c_int()
    _require(driver().cuDeviceGet(ctypes.byref(number), device), "cuDeviceGet")
    _require(driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), number), "cuDevicePrimaryCtxRetain")
    return context.value


def _require(status: int, what: str) -> None:
    if status:
        raise CudaError(f"{what}: CUDA error {status}; run with CUDA_LAUNCH_BLOCKING=1 to find its cause")


@functools.cache
def driver() -> ctypes.CDLL:
    """Return the CUDA driver's library.

    Raises:
        OSError: there is none.
    """
    found = ctypes.CDLL("libcuda.so.1")
    found.cuLaunchKernelEx.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    found.cuOccupancyMaxActiveClusters.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    return found
