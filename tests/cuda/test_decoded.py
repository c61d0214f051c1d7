"""Weights decoded into registers for many rows of x: every layout and cut, against float64."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.matrices import DEVICE, SHAPES, adapters, error, exact, skip_without_asynchronous_products, weight

pytestmark = pytest.mark.gpu


def decoded(packed, low_rank, bias, dtype=torch.bfloat16):
    from salr.cuda.decoded import DecodedProduct
    from salr.cuda.device_layout import lay_out
    from salr.cuda.low_rank import fragments

    skip_without_asynchronous_products()
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
    bias = torch.randn(packed.n_rows, device=DEVICE)
    x = torch.randn(batch, packed.n_columns, device=DEVICE).to(dtype)
    product = decoded(packed, low_rank, bias, dtype)
    expected, rows = exact(x, packed, low_rank, bias, dtype), product.weight.padded(x)
    for cut in cuts(product, batch):
        assert error(product(rows, cut), expected) < 5e-3, cut


@pytest.mark.emulated(shape=[(1000, 712), (1, 8)], batch=[300])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 65, 128, 300, 1100])
def test_decoded_weights_of_any_size_are_multiplied_however_they_are_cut(shape, batch):
    check_decoded(weight(*shape), 24, batch)


@pytest.mark.emulated(sparsity=[0.3], encoding=["int8", "nf4"], dtype=[torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.95])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoded_weights_of_every_encoding_and_sparsity_are_multiplied(sparsity, encoding, dtype):
    check_decoded(weight(1000, 712, sparsity, encoding), 16, 200, dtype)


@pytest.mark.emulated(rank=[80])
@pytest.mark.parametrize("rank", [0, 7, 16, 64, 80, 256])
def test_decoded_weights_and_any_rank_are_multiplied(rank):
    check_decoded(weight(2048, 1024), rank, 150)


@pytest.mark.emulated(case=[(20, 19200, 24), (130, 19200, 80)])
@pytest.mark.parametrize(
    "case", [(20, 19200, 24), (130, 19200, 80), (700, 14336, 64), (2100, 4096, 256), (4100, 712, 0)]
)
def test_the_launch_before_gives_x_in_its_order_and_u(case):
    from salr.cuda.device_layout import lay_out
    from salr.cuda.input_tiles import TilesOfInput
    from salr.cuda.launching import stream_of
    from salr.cuda.low_rank import fragments

    skip_without_asynchronous_products()
    batch, n_columns, rank = case
    low_rank = adapters(16, n_columns, rank) if rank else None
    slabs = lay_out(weight(16, n_columns), torch.bfloat16)
    order = low_rank and fragments(low_rank, torch.bfloat16)
    launch = TilesOfInput(slabs, order)
    x = torch.randn(batch, n_columns, device=DEVICE).bfloat16()
    tiles, u = x.new_empty(slabs.n_slabs, 8, batch, 8), x.new_empty(launch.ranks // 8, batch, 8)
    counters = torch.ones(5, dtype=torch.int32, device=DEVICE)
    launch(x, batch, tiles, u, stream_of(x), counters)
    wide = torch.nn.functional.pad(x, (0, slabs.padded_columns - n_columns)).view(batch, -1, 4, 4, 2, 2)
    assert torch.equal(tiles, wide.permute(1, 3, 4, 0, 2, 5).reshape(tiles.shape))
    assert not counters.any()
    if low_rank:
        expected = (x.double() @ low_rank.lora_A.double().T) * low_rank.scaling.double()
        assert error(u.permute(1, 0, 2).reshape(batch, -1)[:, :rank], expected) < 3e-3


@pytest.mark.emulated
def test_decoded_rows_with_nothing_or_everything_kept():
    kept = torch.rand(700, 1024, device=DEVICE) > 0.5
    kept[5], kept[6], kept[16:32], kept[300:600, :512] = False, True, False, True
    check_decoded(weight(700, 1024, kept=kept), 16, 150)


@pytest.mark.parametrize("batch", [128, 300])
def test_decoded_weights_give_the_same_bits_a_hundred_times(batch):
    product = decoded(weight(4096, 4096), adapters(4096, 4096, 64), None)
    x = torch.randn(batch, 4096, device=DEVICE).bfloat16()
    for cut in cuts(product, batch):
        first = product(x, cut)
        assert all(torch.equal(product(x, cut), first) for _ in range(100))


@pytest.mark.emulated(value=[float("inf")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_row_of_many(value):
    product = decoded(weight(2048, 1000), adapters(2048, 1000, 64), None)
    x = torch.randn(200, 1000, device=DEVICE).bfloat16()
    expected = product(x)
    x[150, :24] = value
    y = product(x)
    assert not y[150].isfinite().any()
    others = torch.arange(200, device=DEVICE) != 150
    assert torch.equal(y[others], expected[others])


def test_products_of_many_rows_are_captured():
    product = decoded(weight(2048, 2048), adapters(2048, 2048, 16), None)
    x = torch.randn(200, 2048, device=DEVICE).bfloat16()
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
@pytest.mark.parametrize(("nt", "registers"), [(8, 96), (16, 168), (32, 168)])
def test_the_decoding_kernel_has_the_registers_that_its_warpgroups_share_out(encoding, nt, registers):
    from salr.cuda.compilation import module
    from salr.cuda.decoded import TILES_OF_ROWS
    from salr.cuda.device_layout import definitions

    product = decoded(weight(256, 128, encoding=encoding), None, None)
    chosen = definitions(product.weight.encoding, torch.bfloat16, NT=nt, GROUPS=TILES_OF_ROWS[nt])
    assert module("decoded_linear.cu", chosen, 0).get_function("decoded_linear").num_regs == registers
