"""Adapters in the tensor cores' order hold what they were made of."""

from __future__ import annotations

import pytest
import torch
from salr.cuda.beside import Beside, FragmentFactors, MatrixFactors
from salr.cuda.device_layout import SlabWeight
from salr.cuda.low_rank import fragments, scaled_A
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


def written_B(factors, first, last):
    """B as it comes into the last columns of a wider matrix."""
    n = len(factors.scaled_A)
    wide = torch.full((last - first, 24 + n), torch.nan, dtype=torch.bfloat16, device=factors.scaled_A.device)
    factors.write_B(first, wide)
    assert wide[:, :24].isnan().all()
    return wide[:, 24:]


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_a_comes_back_from_fragments(rank):
    torch.manual_seed(0)
    adapters = ranks(700, 300, rank)
    a = scaled_A(fragments(adapters, torch.bfloat16))
    assert torch.equal(a[:rank, :300], scaled(adapters))
    assert not a[rank:].any() and not a[:, 300:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [1, 16, 40])
def test_b_comes_back_from_fragments(rank):
    torch.manual_seed(0)
    adapters = layer(700, 300, rank, "cuda").adapters
    factors = FragmentFactors(fragments(adapters, torch.bfloat16))
    for first, last in ((0, 700), (256, 700), (256, 512)):
        b = written_B(factors, first, last)
        assert torch.equal(b[:, :rank], adapters.lora_B[first:last]) and not b[:, rank:].any()


@pytest.mark.gpu
def test_a_stacked_layers_rows_use_its_own_ranks():
    torch.manual_seed(0)
    layers = [layer(512, 256, 20, "cuda"), layer(256, 256, 0, "cuda"), layer(300, 256, 33, "cuda")]
    factors = FragmentFactors(stack_ranks(layers))
    a, b = factors.scaled_A, written_B(factors, 0, 1068)
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
    factors = FragmentFactors(fragments(layer(256, shape[1], 24, DEVICE).adapters, torch.bfloat16))
    x = torch.randn(shape, device=DEVICE).bfloat16()
    wide = Beside(factors.scaled_A)(x)
    assert torch.equal(wide[:, : shape[1]], x)
    columns = factors.scaled_A.shape[1]
    assert not wide[:, shape[1] : columns].any()
    torch.testing.assert_close(wide[:, columns:], x @ factors.scaled_A[:, : shape[1]].T)


def test_factors_that_no_kernel_takes_are_kept_as_matrices():
    torch.manual_seed(0)
    adapters = ranks(100, 300, 300)
    factors = MatrixFactors(adapters, 384, torch.bfloat16)
    assert len(factors.scaled_A) == 304
    assert torch.equal(factors.scaled_A[:300, :300], scaled(adapters))
    assert torch.equal(written_B(factors, 0, 100)[:, :300], adapters.lora_B)
