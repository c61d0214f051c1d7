"""Adapters in the tensor cores' order hold what they were made of; no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from salr.cuda.device_layout import SlabWeight
from salr.cuda.low_rank import FragmentFactors, MatrixFactors, fragments
from salr.cuda.stacking import Layer, Ranks, stack_ranks


def ranks(n_rows, n_columns, rank):
    lora_a, lora_b = torch.randn(rank, n_columns).bfloat16(), torch.randn(n_rows, rank).bfloat16()
    return Ranks(lora_a, lora_b, torch.rand(rank) + 0.5)


def scaled(adapters):
    return (adapters.lora_A.float() * adapters.scaling[:, None]).bfloat16()


def written_B(factors, first, last):
    """B as it comes into the last columns of a wider matrix."""
    n = len(factors.scaled_A)
    wide = torch.full((last - first, 24 + n), torch.nan, dtype=torch.bfloat16)
    factors.write_B(first, last, wide[:, 24:])
    assert wide[:, :24].isnan().all()
    return wide[:, 24:]


def layer(n_rows, n_columns, rank):
    empty = torch.empty(0, dtype=torch.uint8)
    slabs = SlabWeight(n_rows, n_columns, "bitmap16", torch.bfloat16, empty, empty, 0)
    return Layer(slabs, ranks(n_rows, n_columns, rank) if rank else None)


@pytest.mark.parametrize("rank", [1, 16, 40])
def test_factors_come_back_from_fragments(rank):
    torch.manual_seed(0)
    adapters = ranks(700, 300, rank)
    factors = FragmentFactors(fragments(adapters, torch.bfloat16))
    a = factors.scaled_A
    assert torch.equal(a[:rank, :300], scaled(adapters))
    assert not a[rank:].any() and not a[:, 300:].any()
    for first, last in ((0, 700), (256, 700), (256, 512)):
        b = written_B(factors, first, last)
        assert torch.equal(b[:, :rank], adapters.lora_B[first:last]) and not b[:, rank:].any()


def test_each_stacked_layer_gets_its_own_factors_back():
    torch.manual_seed(0)
    layers = [layer(512, 256, 20), layer(256, 256, 0), layer(300, 256, 33)]
    together, groups = stack_ranks(layers)
    for part, (block, tile, _) in zip(layers, groups, strict=True):
        factors = FragmentFactors(together, tile, block)
        rank = 0 if part.adapters is None else len(part.adapters.lora_A)
        a, b = factors.scaled_A, written_B(factors, 0, part.weight.n_rows)
        assert not a[rank:].any() and not b[:, rank:].any()
        if part.adapters is not None:
            assert torch.equal(a[:rank], scaled(part.adapters)) and torch.equal(b[:, :rank], part.adapters.lora_B)


def test_factors_that_no_kernel_takes_are_kept_as_matrices():
    torch.manual_seed(0)
    adapters = ranks(100, 300, 300)
    factors = MatrixFactors(adapters, 384, torch.bfloat16)
    assert len(factors.scaled_A) == 304
    assert torch.equal(factors.scaled_A[:300, :300], scaled(adapters))
    assert torch.equal(written_B(factors, 0, 100)[:, :300], adapters.lora_B)
