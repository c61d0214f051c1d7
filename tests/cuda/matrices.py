"""Packed weights and adapters of random numbers, and their product in float64; on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from salr.runtime import reference
from salr.runtime.packed import Adapters, PackedWeight
from salr.runtime.packing import pack

#: where kernels run: without a GPU those tests run that are marked ``emulated``
DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
#: too large to emulate
LARGE = pytest.param((4096, 4096), marks=pytest.mark.large)
SHAPES = [(512, 256), (1000, 712), (576, 576), (192, 576), (1, 8), (300, 100), LARGE]


def weight(n_rows, n_columns, sparsity=0.5, encoding="bf16", group_size=128, kept=None):
    dense = torch.randn(n_rows, n_columns, device=DEVICE) * 0.02
    kept = torch.rand_like(dense) >= sparsity if kept is None else kept
    packed = pack(dense, kept, encoding, group_size)
    return packed if sparsity else dataclasses.replace(packed, bitmap=None, row_offsets=None)


def adapters(n_rows, n_columns, rank, dtype=torch.bfloat16):
    lora_a, lora_b = torch.randn(rank, n_columns, device=DEVICE), torch.randn(n_rows, rank, device=DEVICE)
    return Adapters((lora_a * 0.02).to(dtype), (lora_b * 0.02).to(dtype), torch.rand(rank, device=DEVICE) + 0.5)


def skip_without_asynchronous_products() -> None:
    """Skip a test where the device has none."""
    from salr.cuda.compilation import ASYNC_CAPABILITY

    if torch.cuda.get_device_capability() != ASYNC_CAPABILITY:
        pytest.skip("asynchronous products need compute capability 9.0")


def exact(x: torch.Tensor, packed: PackedWeight, low_rank: Adapters | None, bias, dtype=torch.bfloat16) -> torch.Tensor:
    """Return the product in float64, of weights as a 16-bit model holds them."""
    dense = reference.dense(packed)
    if packed.scales is None:
        dense = dense.to(dtype)
    elif packed.encoding == "nf4":  # the code book is rounded to 16 bits, scales are not
        scales = packed.scales.repeat_interleave(packed.group_size, 1)[:, : packed.n_columns]
        unit = torch.where(scales > 0, dense / scales, 0.0).to(dtype).float()
        dense = unit * scales
    y = x.double() @ dense.double().T
    if low_rank is not None:
        y += ((x.double() @ low_rank.lora_A.double().T) * low_rank.scaling.double()) @ low_rank.lora_B.double().T
    return y if bias is None else y + bias.double()


def error(y: torch.Tensor, expected: torch.Tensor) -> float:
    return float((y.double() - expected).norm() / expected.norm())
