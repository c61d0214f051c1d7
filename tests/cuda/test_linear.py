"""The products on packed weights and their gradients: every layout, tile and path, against float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from salr.runtime import reference
from salr.runtime.gradients import differentiable
from salr.runtime.matrix import Matrix
from salr.runtime.packed import Adapters, PackedWeight
from salr.runtime.packing import pack

pytestmark = pytest.mark.gpu
SHAPES = [(512, 256), (1000, 712), (576, 576), (192, 576), (1, 8), (300, 100), (4096, 4096)]
BATCHES = [1, 2, 5, 8, 9, 16, 17, 32, 33, 64]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def weight(n_rows, n_columns, sparsity=0.5, encoding="bf16", group_size=128, kept=None):
    dense = torch.randn(n_rows, n_columns, device="cuda") * 0.02
    kept = torch.rand_like(dense) >= sparsity if kept is None else kept
    packed = pack(dense, kept, encoding, group_size)
    return packed if sparsity else dataclasses.replace(packed, bitmap=None, row_offsets=None)


def adapters(n_rows, n_columns, rank, dtype=torch.bfloat16):
    lora_a, lora_b = torch.randn(rank, n_columns, device="cuda"), torch.randn(n_rows, rank, device="cuda")
    return Adapters((lora_a * 0.02).to(dtype), (lora_b * 0.02).to(dtype), torch.rand(rank, device="cuda") + 0.5)


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
    bias = torch.randn(packed.n_rows, device="cuda")
    x = torch.randn(batch, packed.n_columns, device="cuda").to(dtype)
    expected = exact(x, packed, low_rank, bias, dtype)
    for product in one_launch_products(packed, low_rank, bias, dtype, batch):
        wide = product.weight.padded(x).contiguous()
        for out_dtype, limit in ((torch.float32, tolerance), (dtype, 5e-3)):
            out = torch.full((batch, packed.n_rows), torch.nan, device="cuda", dtype=out_dtype)
            assert error(product(wide, out), expected) < limit


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_fused_product_of_any_size_is_exact_to_float32_rounding(shape, batch):
    check_fused(weight(*shape), 24, batch)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("batch", [1, 16, 40])
def test_every_encoding_and_sparsity_is_multiplied(sparsity, encoding, batch):
    check_fused(weight(1000, 712, sparsity, encoding), 16, batch, tolerance=1e-4)


@pytest.mark.parametrize("encoding", ["fp16", "fp32", "bf16", "int8", "nf4"])
@pytest.mark.parametrize("batch", [3, 16, 64])
def test_float16_activations_are_multiplied(encoding, batch):
    check_fused(weight(640, 512, 0.5, encoding, 64), 24, batch, torch.float16, tolerance=1e-4)


@pytest.mark.parametrize("rank", [0, 1, 7, 16, 64, 80, 144, 256])
@pytest.mark.parametrize("batch", [1, 33])
def test_any_rank_is_multiplied_in_the_same_launch(rank, batch):
    check_fused(weight(2048, 1024), rank, batch)


@pytest.mark.parametrize("batch", [1, 64])
def test_rows_and_units_with_nothing_or_everything_kept(batch):
    kept = torch.rand(700, 1024, device="cuda") > 0.5
    kept[5], kept[6], kept[16:32], kept[300:600, :512] = False, True, False, True
    check_fused(weight(700, 1024, kept=kept), 16, batch)


@pytest.mark.parametrize("batch", [1, 8, 16, 64])
def test_the_same_input_gives_the_same_bits_a_hundred_times(batch):
    low_rank, bias = adapters(4096, 4096, 64), torch.randn(4096, device="cuda")
    x = torch.randn(batch, 4096, device="cuda").bfloat16()
    for product in one_launch_products(weight(4096, 4096), low_rank, bias, torch.bfloat16, batch):
        out = torch.empty(batch, 4096, device="cuda", dtype=torch.bfloat16)
        first = product(x, out).clone()
        for _ in range(100):
            out.fill_(torch.nan)
            assert torch.equal(product(x, out), first)


@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_comes_out_and_nobody_waits_for_it(batch, value):
    low_rank = adapters(2048, 1024, 64)
    for product in one_launch_products(weight(2048, 1024), low_rank, None, torch.bfloat16, batch):
        x = torch.randn(batch, 1024, device="cuda").bfloat16()
        out = torch.zeros(batch, 2048, device="cuda")
        expected = product(x, torch.zeros_like(out)).clone()
        x[batch - 1, 100] = value
        for _ in range(3):
            product(x, out)
        assert not out[batch - 1].isfinite().any()
        assert torch.equal(out[: batch - 1], expected[: batch - 1])
        x[batch - 1, 100] = 0.0
        assert product(x, out).isfinite().all()


def decoded(packed, low_rank, bias, dtype=torch.bfloat16):
    from salr.cuda.compilation import ASYNC_CAPABILITY
    from salr.cuda.decoded import DecodedProduct
    from salr.cuda.device_layout import lay_out
    from salr.cuda.low_rank import fragments

    if torch.cuda.get_device_capability() != ASYNC_CAPABILITY:
        pytest.skip("asynchronous products need compute capability 9.0")
    order = low_rank and fragments(low_rank, dtype)
    return DecodedProduct(lay_out(packed, dtype), order, bias)


def cuts(product, batch):
    """Return all ways to cut a product: both tiles, whole and split."""
    from salr.cuda.decoded import TILES_OF_ROWS, Shape

    for nt in TILES_OF_ROWS:
        n_tiles = -(-batch // (8 * nt)) * product.weight.n_row_blocks
        yield from {Shape(nt, n_tiles, n_tiles), Shape(nt, n_tiles, n_tiles // product.clusters * product.clusters)}


def check_decoded(packed, rank, batch, dtype=torch.bfloat16):
    low_rank = adapters(packed.n_rows, packed.n_columns, rank, dtype) if rank else None
    bias = torch.randn(packed.n_rows, device="cuda")
    x = torch.randn(batch, packed.n_columns, device="cuda").to(dtype)
    product = decoded(packed, low_rank, bias, dtype)
    expected, rows = exact(x, packed, low_rank, bias, dtype), product.weight.padded(x)
    for cut in cuts(product, batch):
        assert error(product(rows, cut), expected) < 5e-3, cut


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 65, 128, 300, 1100])
def test_decoded_weights_of_any_size_are_multiplied_however_they_are_cut(shape, batch):
    check_decoded(weight(*shape), 24, batch)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoded_weights_of_every_encoding_and_sparsity_are_multiplied(sparsity, encoding, dtype):
    check_decoded(weight(1000, 712, sparsity, encoding), 16, 200, dtype)


@pytest.mark.parametrize("rank", [0, 7, 16, 64, 80, 256])
def test_decoded_weights_and_any_rank_are_multiplied(rank):
    check_decoded(weight(2048, 1024), rank, 150)


def test_decoded_rows_with_nothing_or_everything_kept():
    kept = torch.rand(700, 1024, device="cuda") > 0.5
    kept[5], kept[6], kept[16:32], kept[300:600, :512] = False, True, False, True
    check_decoded(weight(700, 1024, kept=kept), 16, 150)


@pytest.mark.parametrize("batch", [128, 300])
def test_decoded_weights_give_the_same_bits_a_hundred_times(batch):
    product = decoded(weight(4096, 4096), adapters(4096, 4096, 64), None)
    x = torch.randn(batch, 4096, device="cuda").bfloat16()
    for cut in cuts(product, batch):
        first = product(x, cut)
        assert all(torch.equal(product(x, cut), first) for _ in range(100))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_row_of_many(value):
    product = decoded(weight(2048, 1024), adapters(2048, 1024, 64), None)
    x = torch.randn(200, 1024, device="cuda").bfloat16()
    expected = product(x)
    x[150, 100] = value
    y = product(x)
    assert not y[150].isfinite().any()
    others = torch.arange(200, device="cuda") != 150
    assert torch.equal(y[others], expected[others])


def test_products_of_many_rows_are_captured():
    product = decoded(weight(2048, 2048), adapters(2048, 2048, 16), None)
    x = torch.randn(200, 2048, device="cuda").bfloat16()
    expected, stream, graph = product(product(x)), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y = product(product(x))
    for _ in range(3):
        y.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("nt", [16, 32])
def test_the_decoding_kernel_has_the_registers_that_its_warpgroups_share_out(encoding, nt):
    from salr.cuda.compilation import module
    from salr.cuda.device_layout import definitions

    product = decoded(weight(256, 128, encoding=encoding), None, None)
    found = module("decoded_linear.cu", definitions(product.weight.encoding, torch.bfloat16, NT=nt), 0)
    assert found.get_function("decoded_linear").num_regs == 168


@pytest.mark.parametrize("batch", [4, 100])
def test_x_may_begin_anywhere_in_its_buffer(batch):
    from salr.cuda.linear import linear

    packed, low_rank = weight(512, 256), adapters(512, 256, 16)
    x = torch.randn(batch * 256 + 1, device="cuda").bfloat16()[1:].view(batch, 256)
    assert error(linear(x, packed, low_rank), exact(x, packed, low_rank, None)) < 5e-3


def test_threads_take_turns():
    from concurrent.futures import ThreadPoolExecutor

    from salr.cuda.linear import apply, prepare

    packed, low_rank = weight(1024, 1024), adapters(1024, 1024, 16)
    prepared, inputs = (
        prepare(packed, low_rank, None),
        [torch.randn(m, 1024, device="cuda").bfloat16() for m in (3, 90)],
    )
    expected = [apply(prepared, x).clone() for x in inputs]
    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: apply(prepared, inputs[i % 2]), range(200)))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[i % 2]) for i, y in enumerate(found))


@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("batch", [65, 128, 300])
def test_many_rows_are_multiplied(encoding, batch):
    from salr.cuda.linear import linear

    packed, low_rank = weight(1500, 1000, 0.5, encoding), adapters(1500, 1000, 20)
    x, bias = torch.randn(batch, 1000, device="cuda").bfloat16(), torch.randn(1500, device="cuda")
    assert error(linear(x, packed, low_rank, bias), exact(x, packed, low_rank, bias)) < 6e-3


@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
def test_expansion_is_bit_equal_to_the_reference(encoding):
    from salr.cuda.device_layout import lay_out
    from salr.cuda.expanded import Expansion

    packed = weight(700, 1000, 0.5, encoding)
    slabs = lay_out(packed, torch.bfloat16)
    dense = torch.full((700, slabs.padded_columns), torch.nan, device="cuda", dtype=torch.bfloat16)
    Expansion(slabs)(dense, 0)
    expected = reference.dense(packed)
    if encoding == "bf16":
        assert torch.equal(dense[:, :1000], expected.bfloat16())
    else:
        assert torch.allclose(dense[:, :1000].float(), expected, rtol=2**-7, atol=0)
    assert not dense[:, 1000:].any()


@pytest.mark.parametrize("kernel", [0, -1])
def test_products_are_captured_and_run_on_several_streams(kernel):
    low_rank = adapters(1024, 1024, 16)
    products = [one_launch_products(weight(1024, 1024), low_rank, None, torch.bfloat16, 4)[kernel] for _ in range(2)]
    x, y = (torch.randn(4, 1024, device="cuda").bfloat16() for _ in range(2))
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


def test_bfloat16_weights_take_at_most_1_15_bytes():
    from salr.cuda.device_layout import lay_out
    from salr.cuda.skinny import items_of

    slabs = lay_out(weight(4096, 4096), torch.bfloat16)
    assert (slabs.n_bytes + items_of(slabs)[0].nbytes) / (4096 * 4096) < 1.15


def gradients(run, x, upstream):
    x = x.clone().requires_grad_()
    y = run(x)
    y.backward(upstream)
    return y.detach(), x.grad


def product(packed, low_rank, dtype):
    return Matrix(packed, low_rank).product(torch.device("cuda", 0), dtype, None, "cuda").trainable()


@pytest.mark.parametrize("encoding", ["bf16", "fp16", "fp32", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_x_is_that_of_the_dense_matrix(encoding, dtype):
    packed, low_rank = weight(1000, 712, 0.5, encoding), adapters(1000, 712, 24, dtype)
    x, upstream = (torch.randn(300, n, device="cuda").to(dtype) for n in (712, 1000))
    y, gradient = gradients(lambda x: differentiable(x, product(packed, low_rank, dtype)), x, upstream)
    assert error(y, exact(x, packed, low_rank, None, dtype)) < 5e-3
    columns = exact(torch.eye(712, device="cuda"), packed, low_rank, None, dtype)  # (K, N)
    assert error(gradient, upstream.double() @ columns.T) < 5e-3


@pytest.mark.parametrize("shape", [(4096, 4096), (300, 100), (1, 8)])
@pytest.mark.parametrize("rank", [0, 64, 300])
@pytest.mark.parametrize("batch", [1, 40, 520])
def test_any_size_and_rank_has_a_gradient(shape, rank, batch):
    packed, low_rank = weight(*shape), adapters(*shape, rank) if rank else None
    x, upstream = (torch.randn(batch, n, device="cuda").bfloat16() for n in reversed(shape))
    _, gradient = gradients(lambda x: differentiable(x, product(packed, low_rank, torch.bfloat16)), x, upstream)
    columns = exact(torch.eye(shape[1], device="cuda"), packed, low_rank, None)
    assert error(gradient, upstream.double() @ columns.T) < 5e-3


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradient_and_decodes_once(reentrant, monkeypatch):
    packed, low_rank = weight(512, 256), adapters(512, 256, 16)
    x, upstream = (torch.randn(300, n, device="cuda").bfloat16() for n in (256, 512))
    trainable, decoded = product(packed, low_rank, torch.bfloat16), []
    decode = trainable.decode
    monkeypatch.setattr(trainable, "decode", lambda: decoded.append(decode()) or decoded[-1])
    _, expected = gradients(lambda x: differentiable(x, trainable), x, upstream)
    assert len(decoded) == 1
    _, gradient = gradients(lambda x: checkpoint(differentiable, x, trainable, use_reentrant=reentrant), x, upstream)
    assert len(decoded) == 2 and error(gradient, expected.double()) < 5e-3


def test_a_layer_keeps_no_dense_weight_between_forward_and_backward():
    packed = weight(4096, 4096)
    trainable = product(packed, None, torch.bfloat16)
    x = torch.randn(256, 4096, device="cuda").bfloat16().requires_grad_()
    differentiable(x, trainable).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = differentiable(x, trainable)
    assert torch.cuda.memory_allocated() - before < 2 * y.numel() * 2 + 2**20


@pytest.mark.parametrize("rank", [0, 24])
@pytest.mark.parametrize("batch", [100, 300, 1024])
def test_sparse_tensor_cores_give_the_product_of_2_4_weights(rank, batch, monkeypatch):
    from salr.cuda import linear
    from salr.cuda.semi_structured import ENVIRONMENT_VARIABLE, SemiStructuredProduct

    if not torch.backends.cusparselt.is_available():
        pytest.skip("torch was built without cuSPARSELt")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "1")
    kept = torch.rand(512, 192, 4, device="cuda").argsort(2) < 2
    packed = dataclasses.replace(weight(512, 768, kept=kept.flatten(1)), pattern="2:4")
    low_rank, bias = adapters(512, 768, rank) if rank else None, torch.randn(512, device="cuda")
    x = torch.randn(batch, 768, device="cuda").bfloat16()
    prepared = linear.prepare(packed, low_rank, bias)
    assert isinstance(prepared.product(x.device, x.dtype).expanded, SemiStructuredProduct)
    assert error(linear.apply(prepared, x), exact(x, packed, low_rank, bias)) < 5e-3
