"""No kernel reads past the end of a tensor: each ends right before a page that may not be read."""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import replace

import pytest
import torch
from salr.formats.values import ENCODINGS

from salr.runtime import cpu, reference
from salr.runtime.cpu.paths import usable
from salr.runtime.packed import Adapters

PROT_NONE = 0
_maps: list[mmap.mmap] = []


def before_forbidden_page(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy whose last byte is the last one before a page that may not be read."""
    size = tensor.numel() * tensor.element_size()
    n_readable = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, n_readable + mmap.PAGESIZE)
    _maps.append(memory)
    copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=n_readable - size)
    copy.copy_(tensor.contiguous().view(-1).view(torch.uint8))
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + n_readable), mmap.PAGESIZE, PROT_NONE) == 0
    return copy.view(tensor.dtype).view(tensor.shape)


@pytest.mark.skipif(sys.platform == "win32", reason="forbids reading a page by mprotect, which Windows has not")
@pytest.mark.parametrize("path", usable(), ids=lambda path: path.name)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_last_row_is_read_without_touching_what_follows_a_tensor(path, encoding, make_weight):
    for n_columns, density, dense in ((256, 0.5, False), (203, 0.5, False), (67, 1.0, False), (96, 1.0, True)):
        loose = make_weight(5, n_columns, encoding, density, 64, dense)
        adapters = Adapters(torch.randn(4, n_columns).bfloat16(), torch.randn(5, 4).bfloat16(), torch.ones(4))
        tensors = {name: getattr(loose, name) for name in ("values", "bitmap", "row_offsets", "scales")}
        guarded = {name: before_forbidden_page(tensor) for name, tensor in tensors.items() if tensor is not None}
        layer = cpu.prepare(
            replace(loose, **guarded),
            Adapters(*(before_forbidden_page(part) for part in (adapters.lora_A, adapters.lora_B, adapters.scaling))),
        )
        for n_inputs in (1, 3, 40):
            x = before_forbidden_page(torch.randn(n_inputs, n_columns))
            expected = reference.linear(x, loose, adapters)
            torch.testing.assert_close(cpu.apply(layer, x, path), expected, rtol=1e-3, atol=1e-3)
            half = before_forbidden_page(x.bfloat16())
            near = reference.linear(half.float(), loose, adapters)
            y = cpu.apply(layer, half, path).float()
            torch.testing.assert_close(y, near, rtol=0.03, atol=0.03 * float(near.abs().max()))
