"""What a launch asks of the driver, where there is none: a thread that has no context yet gets one."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch
from salr.cuda import launching
from salr.cuda.compilation import Function


class Driver:
    """Answers as a driver does: launches need a current context."""

    def __init__(self, answer: int = 0) -> None:
        self.answer, self.current, self.launches = answer, None, 0

    def cuDeviceGet(self, number, device):
        number._obj.value = device
        return 0

    def cuDevicePrimaryCtxRetain(self, context, number):
        context._obj.value = 1000 + number.value
        return 0

    def cuCtxSetCurrent(self, context):
        self.current = context.value
        return 0

    def cuLaunchKernelEx(self, *_):
        self.launches += 1
        return 201 if self.current is None else self.answer


@pytest.fixture
def driver(monkeypatch):
    def install(answer=0, current=3):
        found = Driver(answer)
        monkeypatch.setattr(launching, "driver", lambda: found)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        launching._context.cache_clear()
        return found

    yield install
    launching._context.cache_clear()


def launch():
    return launching.Launch(Function(1, 3), (1, 1, 1), 32, 0, [ctypes.c_int(1)])


def test_a_thread_without_a_context_gets_its_devices(driver):
    found, run = driver(), launch()
    run(0)
    assert (found.current, found.launches) == (1003, 2)
    run(0)
    assert found.launches == 3


def test_a_launch_that_is_refused_is_told_with_the_drivers_number(driver):
    driver(answer=719)
    with pytest.raises(launching.CudaError, match="719"):
        launch()(0)


def test_the_number_of_thread_blocks_can_be_said_at_each_launch(driver):
    driver()
    run = launch().over(5, 7)
    assert list(run._configuration.grid) == [5, 7, 1]


@pytest.mark.parametrize(("current", "switched"), [(3, []), (0, [3])])
def test_a_launch_goes_to_its_kernels_device(driver, monkeypatch, current, switched):
    found, entered = driver(current=current), []

    @contextlib.contextmanager
    def device(number):
        entered.append((number, found.launches))
        yield
        assert found.launches

    monkeypatch.setattr(torch.cuda, "device", device)
    launch()(0)
    assert entered == [(number, 0) for number in switched]
