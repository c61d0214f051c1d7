"""Adapters in the tensor cores' order hold what they were made of."""

from __future__ import annotations

import pytest
import torch
from salr.cuda.device_layout import SlabWeight
from salr.cuda.low_rank import fragments, matrices, matrices_of
from salr.cuda.semi_structured import Beside
from salr.cuda.stacking import Layer, Ranks, stack_ranks

from tests.cuda.matrices import DEVICE


def ranks(n_rows, n_columns, rank):
    lora_a, lora_b = torch.randn(rank, n_columns).bfloat16(), torch.randn(n_rows, rank).bfloat16()
    return Ranks(lora_a, lora_b, torch.rand(rank) + 0.5)


def scaled(adapters):
    return (adapters.lora_A.float() * adapters.scaling[:, None]).bfloat16()


def layer(n_rows, n_columns, rank, device="cpu"):
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    slabs = SlabWeight(n_rows, n_columns, "bitmap16", torch.bfloat16, empty, empty, 0)
    adapters = Ranks(*(t.to(device) for t in vars(ranks(n_rows, n_columns, rank)).values())) if rank else None
    return Layer(slabs, adapters)


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_adapters_come_back_from_fragments(rank):
    torch.manual_seed(0)
    adapters = ranks(700, 300, rank)
    back = matrices_of(fragments(adapters, torch.bfloat16), 700)
    assert torch.equal(back.scaled_A[:rank, :300], scaled(adapters))
    assert torch.equal(back.lora_B[:, :rank], adapters.lora_B)
    assert back.scaled_A.shape[1] == 384 and len(back.lora_B) == 700
    assert not back.scaled_A[rank:].any() and not back.scaled_A[:, 300:].any() and not back.lora_B[:, rank:].any()


def test_a_stacked_layers_rows_use_its_own_ranks():
    torch.manual_seed(0)
    layers = [layer(512, 256, 20), layer(256, 256, 0), layer(300, 256, 33)]
    back = matrices_of(stack_ranks(layers), 1068)
    a, b = back.scaled_A, back.lora_B
    n, first = 48, 0
    for i, part in enumerate(layers):
        rows, own = slice(first, first + part.weight.n_rows), slice(i * n, (i + 1) * n)
        first = rows.stop
        rank = 0 if part.adapters is None else len(part.adapters.lora_A)
        assert not a[own][rank:].any() and not b[rows, own][:, rank:].any()
        assert not b[rows, : own.start].any() and not b[rows, own.stop :].any()
        if part.adapters is not None:
            assert torch.equal(a[own][:rank], scaled(part.adapters))
            assert torch.equal(b[rows, own][:, :rank], part.adapters.lora_B)


@pytest.mark.gpu
@pytest.mark.emulated
@pytest.mark.parametrize("shape", [(1, 128), (77, 384), (77, 200), (300, 4096)])
def test_u_stands_beside_x(shape):
    torch.manual_seed(0)
    a = matrices(layer(256, shape[1], 24, DEVICE).adapters, torch.bfloat16).scaled_A
    x = torch.randn(shape, device=DEVICE).bfloat16()
    wide = Beside(a)(x)
    assert torch.equal(wide[:, : shape[1]], x)
    columns = a.shape[1]
    assert not wide[:, shape[1] : columns].any()
    torch.testing.assert_close(wide[:, columns:], x @ a[:, : shape[1]].T)


def test_ranks_that_no_kernel_takes_are_kept_as_matrices():
    torch.manual_seed(0)
    adapters = ranks(100, 300, 300)
    kept = matrices(adapters, torch.bfloat16)
    assert kept.scaled_A.shape == (304, 384) and kept.lora_B.shape == (100, 304)
    assert torch.equal(kept.scaled_A[:300, :300], scaled(adapters))
    assert torch.equal(kept.lora_B[:, :300], adapters.lora_B)
