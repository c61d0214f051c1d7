"""Every test of this folder draws the same random numbers each time; kernels are emulated where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from salr.onnx.errors import LibraryError
from salr.onnx.library import find_compiler
from tests.cuda.emulated import emulation
from tests.cuda.matrices import DEVICE


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def emulated(request):
    if DEVICE != "cpu" or not request.node.get_closest_marker("emulated"):
        yield
        return
    try:
        find_compiler()
    except LibraryError as error:
        pytest.skip(f"torch finds no CUDA device, and kernels are not emulated: {error}")
    with emulation():
        yield
