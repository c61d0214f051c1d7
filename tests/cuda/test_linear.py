"""The products of one launch, and of any number of rows: every layout, tile and path, against float64."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from salr.runtime import reference
from tests.cuda.matrices import DEVICE, SHAPES, adapters, error, exact, weight

pytestmark = pytest.mark.gpu
BATCHES = [1, 2, 5, 8, 9, 16, 17, 32, 33, 64]


def fused(packed, low_rank, bias, dtype):
    from salr.cuda.device_layout import lay_out
    from salr.cuda.fused import FusedProduct
    from salr.cuda.low_rank import fragments

    return FusedProduct(lay_out(packed, dtype), low_rank and fragments(low_rank, dtype), bias)


def one_launch_products(packed, low_rank, bias, dtype, batch):
    """Return the products that make one launch of so few rows."""
    from salr.cuda.skinny import LEAST_CAPABILITY, SkinnyProduct

    found = [fused(packed, low_rank, bias, dtype)]
    if torch.cuda.get_device_capability() >= LEAST_CAPABILITY:
        skinny = SkinnyProduct(found[0].weight, found[0].adapters, bias)
        found += [skinny] if batch <= skinny.most_rows else []
    return found


def check_fused(packed, rank, batch, dtype=torch.bfloat16, tolerance=5e-5):
    """Hold float32 and 16-bit outputs, both poisoned before, against float64."""
    low_rank = adapters(packed.n_rows, packed.n_columns, rank, dtype) if rank else None
    bias = torch.randn(packed.n_rows, device=DEVICE)
    x = torch.randn(batch, packed.n_columns, device=DEVICE).to(dtype)
    expected = exact(x, packed, low_rank, bias, dtype)
    for product in one_launch_products(packed, low_rank, bias, dtype, batch):
        wide = product.weight.padded(x).contiguous()
        for out_dtype, limit in ((torch.float32, tolerance), (dtype, 5e-3)):
            out = torch.full((batch, packed.n_rows), torch.nan, device=DEVICE, dtype=out_dtype)
            assert error(product(wide, out), expected) < limit


@pytest.mark.emulated(shape=[(1000, 712), (1, 8)], batch=[1, 5, 9, 17, 33, 64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_fused_product_of_any_size_is_exact_to_float32_rounding(shape, batch):
    check_fused(weight(*shape), 24, batch)


@pytest.mark.emulated(sparsity=[0.0], batch=[1])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("batch", [1, 16, 40])
def test_every_encoding_and_sparsity_is_multiplied(sparsity, encoding, batch):
    check_fused(weight(1000, 712, sparsity, encoding), 16, batch, tolerance=1e-4)


@pytest.mark.emulated(encoding=[])
@pytest.mark.parametrize("encoding", ["fp16", "fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("batch", [3, 16, 64])
def test_float16_activations_are_multiplied(encoding, batch):
    check_fused(weight(640, 512, 0.5, encoding, 64), 24, batch, torch.float16, tolerance=1e-4)


@pytest.mark.emulated(rank=[])
@pytest.mark.parametrize("rank", [0, 1, 7, 16, 64, 80, 144, 256])
@pytest.mark.parametrize("batch", [1, 33])
def test_any_rank_is_multiplied_in_the_same_launch(rank, batch):
    check_fused(weight(2048, 1024), rank, batch)


@pytest.mark.emulated(shape=[(1000, 712)], rounds=[1, 10])
@pytest.mark.parametrize("rounds", [1, 10, 100])
@pytest.mark.parametrize("shape", [(1000, 712), (2040, 1024)])
def test_every_tile_of_up_to_32_rows_is_exact(rounds, shape, monkeypatch):
    monkeypatch.setattr("salr.cuda.fused.rounds_of_block", lambda weight: rounds)
    for rank in (24, 80):
        check_fused(weight(*shape), rank, 27)


@pytest.mark.emulated
def test_x_of_more_slabs_than_eight_warps_have_is_arranged_and_multiplied_by_more_ranks_than_are_held_at_once():
    check_fused(weight(256, 4296), 80, 40)


@pytest.mark.emulated(encoding=["bf16"], n_blocks=[7], batch=[13])
@pytest.mark.parametrize("n_blocks", [1, 3, 7])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("batch", [1, 8, 13])
def test_a_thread_block_multiplies_many_row_pairs(n_blocks, encoding, batch):
    packed, low_rank = weight(2040, 1024, 0.5, encoding), adapters(2040, 1024, 24)
    *_, product = one_launch_products(packed, low_rank, None, torch.bfloat16, batch)
    room = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    product._properties = SimpleNamespace(multi_processor_count=n_blocks, shared_memory_per_block_optin=room)
    x = torch.randn(batch, 1024, device=DEVICE).bfloat16()
    for _ in range(3):
        out = torch.full((batch, 2040), torch.nan, device=DEVICE)
        assert error(product(x, out), exact(x, packed, low_rank, None)) < 1e-4


@pytest.mark.emulated
@pytest.mark.parametrize("batch", [1, 64])
def test_rows_and_units_with_nothing_or_everything_kept(batch):
    kept = torch.rand(700, 1024, device=DEVICE) > 0.5
    kept[5], kept[6], kept[16:32], kept[300:600, :512] = False, True, False, True
    check_fused(weight(700, 1024, kept=kept), 16, batch)


@pytest.mark.parametrize("batch", [1, 8, 16, 64])
def test_the_same_input_gives_the_same_bits_a_hundred_times(batch):
    low_rank, bias = adapters(4096, 4096, 64), torch.randn(4096, device=DEVICE)
    x = torch.randn(batch, 4096, device=DEVICE).bfloat16()
    for product in one_launch_products(weight(4096, 4096), low_rank, bias, torch.bfloat16, batch):
        out = torch.empty(batch, 4096, device=DEVICE, dtype=torch.bfloat16)
        first = product(x, out).clone()
        for _ in range(100):
            out.fill_(torch.nan)
            assert torch.equal(product(x, out), first)


@pytest.mark.emulated(value=[float("inf")], batch=[16])
@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_comes_out_and_nobody_waits_for_it(batch, value):
    low_rank = adapters(2048, 1000, 64)
    for product in one_launch_products(weight(2048, 1000), low_rank, None, torch.bfloat16, batch):
        x = torch.randn(batch, 1000, device=DEVICE).bfloat16()
        out = torch.zeros(batch, 2048, device=DEVICE)
        expected = product(x, torch.zeros_like(out)).clone()
        x[batch - 1, :24] = value
        for _ in range(3):
            product(x, out)
        assert not out[batch - 1].isfinite().any()
        assert torch.equal(out[: batch - 1], expected[: batch - 1])
        x[batch - 1, :24] = 0.0
        assert product(x, out).isfinite().all()


@pytest.mark.emulated
@pytest.mark.parametrize("batch", [4, 100])
def test_x_may_begin_anywhere_in_its_buffer(batch):
    from salr.cuda.linear import linear, prepare

    packed, low_rank = weight(512, 256), adapters(512, 256, 16)
    x = torch.randn(batch * 256 + 1, device=DEVICE).bfloat16()[1:].view(batch, 256)
    assert error(linear(x, packed, low_rank), exact(x, packed, low_rank, None)) < 5e-3
    expanded = prepare(packed, low_rank, None).product(x.device, x.dtype).expanded
    assert error(expanded.multiply(x, expanded.decode()), exact(x, packed, low_rank, None)) < 5e-3


def test_threads_take_turns():
    from concurrent.futures import ThreadPoolExecutor

    from salr.cuda.linear import apply, prepare

    packed, low_rank = weight(1024, 1024), adapters(1024, 1024, 16)
    prepared, inputs = (
        prepare(packed, low_rank, None),
        [torch.randn(m, 1024, device=DEVICE).bfloat16() for m in (3, 90)],
    )
    expected = [apply(prepared, x).clone() for x in inputs]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: apply(prepared, inputs[i % 2]), range(200)))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i % 2]) for i, y in enumerate(found))


@pytest.mark.emulated(encoding=["bf16", "nf4"])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("batch", [65, 128, 300])
def test_many_rows_are_multiplied(encoding, batch):
    from salr.cuda.linear import linear

    packed, low_rank = weight(1500, 1000, 0.5, encoding), adapters(1500, 1000, 20)
    x, bias = torch.randn(batch, 1000, device=DEVICE).bfloat16(), torch.randn(1500, device=DEVICE)
    assert error(linear(x, packed, low_rank, bias), exact(x, packed, low_rank, bias)) < 6e-3


@pytest.mark.emulated
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
def test_expansion_is_bit_equal_to_the_reference(encoding):
    from salr.cuda.device_layout import lay_out
    from salr.cuda.expanded import Expansion

    packed = weight(700, 1000, 0.5, encoding)
    slabs = lay_out(packed, torch.bfloat16)
    dense = torch.full((700, slabs.padded_columns), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    Expansion(slabs)(dense, 0)
    expected = reference.dense(packed)
    if encoding == "bf16":
        assert torch.equal(dense[:, :1000], expected.bfloat16())
    else:
        assert torch.allclose(dense[:, :1000].float(), expected, rtol=2**-7, atol=0)
    assert not dense[:, 1000:].any()


@pytest.mark.emulated
@pytest.mark.parametrize("rank", [24, 300])
def test_an_expanded_weight_may_be_multiplied_by_parts(rank, monkeypatch):
    from salr.cuda import expanded
    from salr.cuda.linear import prepare

    packed, low_rank, bias = weight(1100, 200), adapters(1100, 200, rank), torch.randn(1100, device=DEVICE)
    x = torch.randn(40, 200, device=DEVICE).bfloat16()
    product = prepare(packed, low_rank, bias).product(x.device, x.dtype).expanded
    whole = product(x)
    assert error(whole, exact(x, packed, low_rank, bias)) < 5e-3
    back = torch.randn(40, 1100, device=DEVICE).bfloat16()
    dense = reference.dense(packed).double() + (low_rank.lora_B.double() * low_rank.scaling) @ low_rank.lora_A.double()
    assert error(product.input_gradient(back, product.decode()), back.double() @ dense) < 5e-3
    for row_blocks in (1, 2):
        monkeypatch.setattr(expanded, "_PART_BYTES", row_blocks * 256 * 256 * 2)
        assert error(product(x), whole.double()) < 1e-3


@pytest.mark.emulated
def test_rows_may_be_expanded_from_any_row_block_on():
    from salr.cuda.device_layout import lay_out
    from salr.cuda.expanded import Expansion
    from salr.cuda.low_rank import fragments

    slabs = lay_out(weight(1500, 712), torch.bfloat16)
    expansion = Expansion(slabs, fragments(adapters(1500, 712, 24), torch.bfloat16))
    whole = torch.full((1500, slabs.padded_columns), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    rest = torch.full_like(whole[256:], torch.nan)
    expansion(whole, 0)
    expansion(rest, 256)
    assert torch.equal(rest, whole[256:])


@pytest.mark.emulated(rank=[1, 80], encoding=["bf16", "nf4"])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("rank", [1, 64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_expanded_weight_is_rounded_once_with_its_adapters(encoding, rank, dtype):
    from salr.cuda.linear import prepare

    packed, low_rank = weight(700, 1000, 0.5, encoding), adapters(700, 1000, rank)
    low_rank.scaling.mul_(torch.rand_like(low_rank.scaling) + 0.5)
    dense = prepare(packed, low_rank, None).product(torch.device(DEVICE), dtype).expanded.decode()
    scaled, base = low_rank.scaling.double()[:, None] * low_rank.lora_A.double(), reference.dense(packed).double()
    expected, unit = base + low_rank.lora_B.double() @ scaled, torch.finfo(dtype).eps / 2
    bound = expected.abs() + low_rank.lora_B.double().abs() @ scaled.abs()  # scaling * lora_A is rounded too
    if encoding == "nf4":  # the code book is rounded
        bound += base.abs()
    assert ((dense[:, :1000].double() - expected).abs() <= 1.01 * unit * bound + 1e-7).all()
    assert not dense[:, 1000:].any()


@pytest.mark.parametrize("kernel", [0, -1])
def test_products_are_captured_and_run_on_several_streams(kernel):
    low_rank = adapters(1024, 1024, 16)
    products = [one_launch_products(weight(1024, 1024), low_rank, None, torch.bfloat16, 4)[kernel] for _ in range(2)]
    x, y = (torch.randn(4, 1024, device=DEVICE).bfloat16() for _ in range(2))
    expected = products[1](products[0](x, torch.empty_like(x)), torch.empty_like(x)).clone()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    middle = torch.empty_like(x)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        products[1](products[0](x, middle), y)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(8):
            products[1](products[0](x, middle), y)
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("batch", [4, 20, 200, 2000])
def test_graphs_of_a_product_that_was_never_made_before_are_replayed_in_any_order(batch):
    from salr.cuda.linear import apply, prepare

    packed, low_rank = weight(1024, 1024), adapters(1024, 1024, 16)
    prepared, x = prepare(packed, low_rank, None), torch.randn(batch, 1024, device=DEVICE).bfloat16()
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    made = []
    for graph in graphs:
        with torch.cuda.graph(graph):
            made.append(apply(prepared, x))
    for graph, y in reversed(list(zip(graphs, made, strict=True))):
        for _ in range(3):
            y.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert error(y, exact(x, packed, low_rank, None)) < 5e-3


def test_bfloat16_weights_take_at_most_1_15_bytes():
    from salr.cuda.device_layout import lay_out
    from salr.cuda.skinny import items_of

    slabs = lay_out(weight(4096, 4096), torch.bfloat16)
    assert (slabs.n_bytes + items_of(slabs)[0].nbytes) / (4096 * 4096) < 1.15


@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("batch", [100, 300, 1024])
@pytest.mark.parametrize("columns", [768, 712])
def test_sparse_tensor_cores_give_the_product_of_2_4_weights(rank, batch, columns, monkeypatch):
    from salr.cuda import linear
    from salr.cuda.semi_structured import ENVIRONMENT_VARIABLE, SemiStructuredProduct

    if not torch.backends.cusparselt.is_available():
        pytest.skip("torch was built without cuSPARSELt")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "1")
    kept = torch.rand(512, columns // 4, 4, device=DEVICE).argsort(2) < 2
    packed = dataclasses.replace(weight(512, columns, kept=kept.flatten(1)), pattern="2:4")
    low_rank, bias = adapters(512, columns, rank) if rank else None, torch.randn(512, device=DEVICE)
    x = torch.randn(batch, columns, device=DEVICE).bfloat16()
    prepared = linear.prepare(packed, low_rank, bias)
    assert isinstance(prepared.product(x.device, x.dtype).expanded, SemiStructuredProduct)
    assert error(linear.apply(prepared, x), exact(x, packed, low_rank, bias)) < 5e-3
