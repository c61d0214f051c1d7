"""Many rows of bfloat16 x: every panel shape, matrices of several blocks and parts, wide adapters, several threads."""

from __future__ import annotations

import pytest
import torch
from salr.formats.values import ENCODINGS

from salr.runtime import cpu, reference
from salr.runtime.cpu import panels
from salr.runtime.cpu.panel_kernels import BLOCK_WORDS, PART_ROWS
from salr.runtime.cpu.paths import PATHS, usable
from salr.runtime.packed import Adapters, PackedWeight

PATH = PATHS["avx512bf16"]
pytestmark = pytest.mark.skipif(PATH not in usable(), reason="the processor has no products of bfloat16 pairs")


def adapters_of(n_rows: int, n_columns: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> Adapters:
    return Adapters(torch.randn(rank, n_columns).to(dtype), torch.randn(n_rows, rank).to(dtype), torch.rand(rank) + 0.5)


def rounded_product(x: torch.Tensor, weight: PackedWeight, adapters: Adapters | None, bias: torch.Tensor | None):
    """Return the float64 product with weights, lora factors and scaling * (lora_A x) rounded to bfloat16."""
    y = x.double() @ reference.dense(weight).bfloat16().double().T
    if adapters is not None:
        inner = (x.double() @ adapters.lora_A.bfloat16().double().T) * adapters.scaling.double()
        y += inner.bfloat16().double() @ adapters.lora_B.bfloat16().double().T
    return y if bias is None else y + bias.double()


def assert_product(y: torch.Tensor, x: torch.Tensor, weight: PackedWeight, adapters=None, bias=None) -> None:
    """Compare: allowed are the output's rounding, float32 sums, and some u that round to the other side."""
    expected = rounded_product(x, weight, adapters, bias)
    size = x.double().abs() @ reference.dense(weight).double().abs().T
    allowed = 2.0**-8 * expected.abs() + 1e-5 * size + 1e-6
    if adapters is not None:
        inner = (x.double() @ adapters.lora_A.double().T).abs() * adapters.scaling.double()
        allowed += 2.0**-8 * inner @ adapters.lora_B.double().abs().T
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    assert bool(((y.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("n_inputs", [1, 15, 16, 17, 33, 50, 65, 80, 113, panels.MOST_INPUTS + 1])
def test_any_number_of_rows_of_x_gives_the_product(n_inputs, make_weight):
    torch.manual_seed(n_inputs)
    weight, adapters, bias = (
        make_weight(PART_ROWS + 3, 200, "bf16"),
        adapters_of(PART_ROWS + 3, 200, 20),
        torch.randn(51),
    )
    x = torch.randn(n_inputs, 200).bfloat16()
    y = panels.many_rows(PATH, cpu.prepare(weight, adapters, bias), x, 2)
    assert_product(y, x, weight, adapters, bias)


def test_x_of_many_columns_is_multiplied_some_rows_at_a_time(make_weight, monkeypatch):
    monkeypatch.setattr(panels, "MOST_PANEL_BYTES", 1)  # the least: 64 rows
    weight, adapters = make_weight(9, 130, "bf16"), adapters_of(9, 130, 8)
    x = torch.randn(150, 130).bfloat16()
    assert_product(panels.many_rows(PATH, cpu.prepare(weight, adapters), x, 2), x, weight, adapters)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_rows_go_on_where_the_block_of_columns_before_ended(encoding, make_weight):
    n_columns = BLOCK_WORDS * 64 * 2 + 70
    weight = make_weight(5, n_columns, encoding, group_size=100)
    x = torch.randn(20, n_columns).bfloat16()
    assert_product(panels.many_rows(PATH, cpu.prepare(weight), x, 1), x, weight)


def test_a_rank_of_more_than_one_block_is_multiplied_whole(make_weight):
    rank = BLOCK_WORDS * 64 + 33
    weight, adapters = make_weight(6, 64, "bf16"), adapters_of(6, 64, rank)
    x = torch.randn(17, 64).bfloat16()
    assert_product(panels.many_rows(PATH, cpu.prepare(weight, adapters), x, 1), x, weight, adapters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_adapters_of_other_dtypes_are_rounded(dtype, make_weight):
    weight, adapters = make_weight(7, 130, "int8"), adapters_of(7, 130, 16, dtype)
    x = torch.randn(40, 130).bfloat16()
    y = panels.many_rows(PATH, cpu.prepare(weight, adapters), x, 1)
    expected = reference.linear(x.float(), weight, adapters)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))


def test_the_number_of_threads_does_not_change_a_bit(make_weight):
    weight = make_weight(500, 300, "bf16")
    layer = cpu.prepare(weight, adapters_of(500, 300, 40))
    x = torch.randn(70, 300).bfloat16()
    one, two, three = (panels.many_rows(PATH, layer, x, n_threads) for n_threads in (1, 2, 3))
    assert torch.equal(one, two) and torch.equal(one, three)


def test_memory_kept_from_an_earlier_call_does_not_reach_the_result(make_weight):
    """A call that fills the thread's memory with NaN is followed by one with fewer rows, columns and ranks."""
    broken = make_weight(60, 300, "bf16")
    x = torch.full((70, 300), float("nan")).bfloat16()
    assert bool(panels.many_rows(PATH, cpu.prepare(broken, adapters_of(60, 300, 40)), x, 1).isnan().all())
    weight, adapters = make_weight(9, 100, "bf16"), adapters_of(9, 100, 3)
    x = torch.randn(21, 100).bfloat16()
    assert_product(panels.many_rows(PATH, cpu.prepare(weight, adapters), x, 1), x, weight, adapters)
