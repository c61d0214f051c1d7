"""Every code path that this machine can run gives the reference's product, for all encodings and odd shapes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from salr.formats.errors import SalrError
from salr.formats.reader import SalrFile
from salr.formats.values import ENCODINGS

from salr.runtime import cpu, reference
from salr.runtime.cpu import team
from salr.runtime.cpu.paths import usable
from salr.runtime.packed import Adapters, PackedWeight

PATHS = pytest.mark.parametrize("path", usable(), ids=lambda path: path.name)
EVERY_ENCODING = pytest.mark.parametrize("encoding", ENCODINGS)
#: rows N, columns K, density, group size, dense: words of 64 full, one over, one less; a row of less than 8 bytes
SHAPES = [
    (9, 256, 0.5, 128, False),
    (5, 200, 0.5, 64, False),
    (3, 320, 0.5, 128, False),
    (3, 193, 0.7, 100, False),
    (4, 63, 0.5, 128, False),
    (2, 9, 0.5, 128, False),
    (3, 128, 0.0, 128, False),
    (3, 130, 1.0, 64, False),
    (7, 72, 1.0, 128, True),
    (1, 1, 1.0, 1, True),
]


def adapters_of(n_rows: int, n_columns: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> Adapters:
    return Adapters(torch.randn(rank, n_columns).to(dtype), torch.randn(n_rows, rank).to(dtype), torch.rand(rank) + 0.5)


def assert_close(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: PackedWeight,
    adapters: Adapters | None,
    bias: torch.Tensor | None,
    rounded: bool = False,
) -> None:
    """Compare with the float32 reference.

    Allowed: 1e-5 of the sum of all terms' sizes (float32 sums in another order), the rounding to the output's dtype,
    and 2^-8 of the terms where weights are ``rounded`` to bfloat16.
    """
    wide = x.float()
    expected = reference.linear(wide, weight, adapters, bias)
    size = wide.abs() @ reference.dense(weight).abs().T
    if adapters is not None:
        inner = wide.abs() @ adapters.lora_A.float().abs().T
        size += (inner * adapters.scaling) @ adapters.lora_B.float().abs().T
    if bias is not None:
        size += bias.float().abs()
    last_place = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[x.dtype]
    allowed = (2.0**-8 if rounded else 1e-5) * size + last_place * expected.abs() + 1e-7
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert bool((((y.float() - expected).abs() <= allowed) | (y == expected)).all())  # equal: both infinite


@PATHS
@EVERY_ENCODING
def test_few_rows_of_x_give_the_reference_product(path, encoding, make_weight):
    torch.manual_seed(0)
    for n_rows, n_columns, density, group_size, dense in SHAPES:
        weight = make_weight(n_rows, n_columns, encoding, density, group_size, dense)
        adapters, bias = adapters_of(n_rows, n_columns, 5), torch.randn(n_rows)
        layer = cpu.prepare(weight, adapters, bias)
        for n_inputs, dtype in ((1, torch.float32), (1, torch.bfloat16), (3, torch.float32), (5, torch.bfloat16)):
            x = torch.randn(n_inputs, n_columns).to(dtype)
            assert_close(cpu.apply(layer, x, path), x, weight, adapters, bias)


@PATHS
def test_more_than_eight_rows_of_x_take_several_passes_with_the_same_result(path, make_weight):
    weight, adapters, bias = make_weight(7, 200, "bf16"), adapters_of(7, 200, 16), torch.randn(7)
    for n_inputs in (5, 8, 11):
        x = torch.randn(n_inputs, 200).bfloat16()
        assert_close(cpu.apply(cpu.prepare(weight, adapters, bias), x, path), x, weight, adapters, bias)


@PATHS
@EVERY_ENCODING
def test_many_rows_of_x_give_the_reference_product(path, encoding, make_weight):
    torch.manual_seed(1)
    for n_rows, n_columns, density, group_size, dense in SHAPES[:5] + SHAPES[-2:]:
        weight = make_weight(n_rows, n_columns, encoding, density, group_size, dense)
        adapters, bias = adapters_of(n_rows, n_columns, 16), torch.randn(n_rows)
        layer = cpu.prepare(weight, adapters, bias)
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(40, n_columns).to(dtype)
            assert_close(cpu.apply(layer, x, path), x, weight, adapters, bias, dtype == torch.bfloat16)


@PATHS
def test_the_int8_code_without_a_positive_twin_is_multiplied_as_any_other(path, make_weight):
    weight = make_weight(4, 256, "int8")
    weight.values.view(torch.int8)[: weight.nnz : 3] = -128
    for n_inputs in (2, 40):
        x = torch.randn(n_inputs, 256).bfloat16()
        assert_close(cpu.apply(cpu.prepare(weight), x, path), x, weight, None, None, rounded=n_inputs > 8)


def test_memory_made_in_inference_mode_serves_later_calls_outside_it(make_weight, monkeypatch):
    monkeypatch.setattr("salr.runtime.cpu.tiles._own", threading.local())
    weight, x = make_weight(70, 150, "fp32", group_size=64), torch.randn(40, 150)
    adapters = adapters_of(70, 150, 8)
    with torch.inference_mode():
        inside = cpu.linear(x, weight, adapters).clone()
    assert torch.equal(cpu.linear(x, weight, adapters), inside)


@PATHS
def test_a_matrix_larger_than_the_workspace_is_done_in_tiles(path, make_weight, monkeypatch):
    monkeypatch.setattr("salr.runtime.cpu.tiles.WORKSPACE_BYTES", 1)  # the least: 64 rows
    weight = make_weight(165, 150, "int8", group_size=64)
    x = torch.randn(30, 150)
    assert_close(cpu.apply(cpu.prepare(weight), x, path), x, weight, None, None)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_adapters_in_other_dtypes_and_half_precision_x_are_served(path, dtype, make_weight):
    weight, adapters = make_weight(6, 100, "fp16"), adapters_of(6, 100, 17, dtype)
    layer = cpu.prepare(weight, adapters)
    for n_inputs in (1, 20):
        x = torch.randn(n_inputs, 100).half()
        assert_close(cpu.apply(layer, x, path), x, weight, adapters, None)


@PATHS
@settings(max_examples=20)
@given(data=st.data())
def test_any_shape_density_and_group_size_gives_the_reference_product(path, make_weight, data):
    encoding = data.draw(st.sampled_from(["bf16", "int8", "nf4"]))
    weight = make_weight(
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 300)),
        encoding,
        data.draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
        data.draw(st.sampled_from([1, 17, 64, 128, 512])),
        data.draw(st.booleans()),
        data.draw(st.integers(0, 9)),
    )
    x = torch.randn(data.draw(st.sampled_from([1, 20])), weight.n_columns)
    assert_close(cpu.apply(cpu.prepare(weight), x, path), x, weight, None, None)


def test_every_2d_module_of_the_golden_file_multiplies_as_the_reference(golden):
    file = SalrFile(golden)
    for name in [name for name, entry in file.modules.items() if len(entry.shape) == 2]:
        weight = PackedWeight.from_module(file.module(name))
        for n_inputs in (1, 18):
            x = torch.randn(n_inputs, weight.n_columns)
            assert_close(cpu.linear(x, weight), x, weight, None, None)


@PATHS
def test_the_number_of_threads_does_not_change_a_bit(path, make_weight):
    weight = make_weight(2048, 512, "bf16")  # large enough for a second thread
    layer = cpu.prepare(weight, adapters_of(2048, 512, 8))
    x, before = torch.randn(2, 512), torch.get_num_threads()
    results = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(cpu.apply(layer, x, path) if path.lanes else cpu.apply(layer, x[:1], path))
    finally:
        torch.set_num_threads(before)
    if path.lanes:
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    else:  # torch's own products may sum in another order
        torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)


def test_several_threads_may_use_one_layer_at_once(make_weight):
    weight = make_weight(1024, 512, "bf16")
    layer = cpu.prepare(weight, adapters_of(1024, 512, 8))
    inputs = [torch.randn(n, 512) for n in (1, 1, 2, 20) * 8]
    expected = [cpu.apply(layer, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: cpu.apply(layer, x), inputs))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(expected, found, strict=True))


def test_pythons_threads_take_over_where_torch_has_no_openmp(make_weight, monkeypatch):
    monkeypatch.setattr(team, "_openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weight = make_weight(2048, 512, "bf16")
    adapters = adapters_of(2048, 512, 8)
    x = torch.randn(1, 512)
    assert_close(cpu.linear(x, weight, adapters), x, weight, adapters, None)
    assert team.title() == "Python's threads"


def test_the_input_is_not_changed_and_need_not_be_contiguous(make_weight):
    weight = make_weight(5, 64, "bf16")
    x = torch.randn(64, 4).T
    before = x.clone()
    assert_close(cpu.linear(x, weight), x, weight, None, None)
    assert torch.equal(x, before)


def test_no_rows_of_x_give_no_rows(make_weight):
    assert cpu.linear(torch.randn(0, 64), make_weight(5, 64, "bf16")).shape == (0, 5)


def test_x_of_another_width_is_refused_before_a_kernel_sees_it(make_weight):
    with pytest.raises(SalrError, match=r"x is \(1, 63\) on cpu, needed \(M, 64\) on cpu"):
        cpu.linear(torch.randn(1, 63), make_weight(5, 64, "bf16"))


def test_the_backend_says_what_it_runs_on():
    assert cpu.reason_unusable() is None
    assert cpu.description().startswith(usable()[0].title)
