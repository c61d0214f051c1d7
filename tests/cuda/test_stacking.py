"""Stacked layers: their slabs and ranks stand where the kernel looks for them, and products equal each layer's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("cupy", reason="CuPy is not installed")

from salr.cuda import stacking
from salr.cuda.device_layout import SlabWeight
from salr.cuda.low_rank import fragments
from salr.cuda.stacking import Layer, Ranks

from tests.cuda.matrices import DEVICE


def fake_slabs(n_rows, n_columns=200, encoding="bitmap16", dtype=torch.bfloat16, seed=0):
    """Return slabs of random sizes with random bytes: nothing here looks into them."""
    generator = np.random.default_rng([seed, n_rows])
    n_slabs, n_blocks = -(-n_columns // 128) * 2, -(-n_rows // 256)
    sizes = generator.integers(2, 9, n_slabs * n_blocks)
    offsets = torch.from_numpy(np.append(0, np.cumsum(sizes)).astype(np.int32))
    slabs = torch.from_numpy(generator.integers(0, 256, int(offsets[-1]) * 16, np.uint8))
    return SlabWeight(n_rows, n_columns, encoding, dtype, slabs, offsets, int(sizes.max()) * 16)


def ranks(rank, n_rows, n_columns=200):
    return Ranks(torch.randn(rank, n_columns), torch.randn(n_rows, rank), torch.rand(rank) + 0.5)


def test_stacked_slabs_split_into_views_equal_to_the_parts():
    parts = [fake_slabs(512, seed=1), fake_slabs(256, seed=2), fake_slabs(300, seed=3)]
    stacked = stacking.stack_slabs(parts)
    assert (stacked.n_rows, stacked.n_row_blocks) == (1068, 5) and stacked.offsets.dtype == torch.int32
    assert stacked.largest_slab_bytes == max(part.largest_slab_bytes for part in parts)
    first_block = 0
    for part, again in zip(parts, stacking.split_slabs(stacked, [512, 256, 300]), strict=True):
        assert torch.equal(again.slabs, part.slabs) and torch.equal(again.offsets, part.offsets)
        assert again.slabs.untyped_storage().data_ptr() == stacked.slabs.untyped_storage().data_ptr()
        for unit in (0, len(part.offsets) - 2):  # a slab lies where the stacked offsets say
            start, stop = (16 * int(o) for o in stacked.offsets[first_block * 4 + unit :][:2])
            mine = slice(16 * int(part.offsets[unit]), 16 * int(part.offsets[unit + 1]))
            assert torch.equal(stacked.slabs[start:stop], part.slabs[mine])
        first_block += part.n_row_blocks


@pytest.mark.parametrize("given", [(16, 16, 16), (5, 40, 17), (20, None, 3)])
def test_each_row_block_meets_its_own_ranks_and_no_others(given):
    rows = [512, 256, 300]
    layers = [Layer(fake_slabs(n), None if r is None else ranks(r, n), None) for n, r in zip(rows, given, strict=True)]
    together, tiles = stacking.stack_ranks(layers), stacking.rank_tiles(layers)
    assert tiles == -(-max(r or 0 for r in given) // 16)
    assert together.first_tile.tolist() == [0, 0, tiles, 2 * tiles, 2 * tiles]
    assert together.n_tiles == 3 * tiles and together.scaling.shape == (3 * tiles * 16,)
    a_of_all = together.lora_A.view(4, 3 * tiles, -1)  # slabs, tiles, a tile's 16 x 64
    b_of_all = together.lora_B.view(5, tiles, -1)  # row blocks, tiles
    for layer, first_block, first_tile in zip(layers, (0, 2, 3), (0, tiles, 2 * tiles), strict=True):
        padded = stacking.padded_ranks(layer, tiles)
        own = fragments(padded, torch.bfloat16)
        assert torch.equal(a_of_all[:, first_tile : first_tile + tiles], own.lora_A.view(4, tiles, -1))
        blocks = layer.weight.n_row_blocks
        assert torch.equal(b_of_all[first_block : first_block + blocks], own.lora_B.view(blocks, tiles, -1))
        delta = (padded.lora_B.float() * padded.scaling) @ padded.lora_A.float()
        expected = layer.adapters
        if expected is None:
            assert not delta.any()
        else:
            torch.testing.assert_close(delta, (expected.lora_B * expected.scaling) @ expected.lora_A)


def test_layers_without_adapters_have_no_ranks():
    assert stacking.stack_ranks([Layer(fake_slabs(256)), Layer(fake_slabs(10))]) is None


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        ([Layer(fake_slabs(256)), Layer(fake_slabs(10))], None),
        ([Layer(fake_slabs(250)), Layer(fake_slabs(10))], "multiples of 256"),
        ([Layer(fake_slabs(256)), Layer(fake_slabs(10, n_columns=320))], "n_columns"),
        ([Layer(fake_slabs(256)), Layer(fake_slabs(10, encoding="dense16"))], "encoding"),
        ([Layer(fake_slabs(256), ranks(130, 256)), Layer(fake_slabs(10))], "288 ranks"),
    ],
)
def test_what_cannot_be_stacked_is_told(layers, reason):
    found = stacking.reason_not_stacked(layers)
    assert found is None if reason is None else reason in found


@pytest.mark.gpu
@pytest.mark.emulated(encoding=["bf16"], batch=[1, 100], given=[(16, None, 40)])
@pytest.mark.parametrize("encoding", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize("batch", [1, 5, 32, 100, 300])
@pytest.mark.parametrize("given", [(64, 64, 64), (16, None, 40), (None, None, None)])
def test_a_stacked_product_equals_each_layers_reference(encoding, batch, given):
    from salr.cuda import linear

    from salr.runtime import reference
    from salr.runtime.packing import pack

    torch.manual_seed(batch)
    rows, n_columns = [512, 256, 300], 384
    dense = [torch.randn(n, n_columns, device=DEVICE) * 0.02 for n in rows]
    weights = [pack(w, torch.rand_like(w) < 0.5, encoding) for w in dense]
    adapters = [
        None if r is None else Ranks(*(t.to(DEVICE) * 0.05 for t in (*vars(ranks(r, n, n_columns)).values(),)))
        for n, r in zip(rows, given, strict=True)
    ]
    biases = [torch.randn(512, device=DEVICE), None, torch.randn(300, device=DEVICE)]
    product = linear.stack(weights, adapters, biases, torch.bfloat16, torch.device(DEVICE))
    assert product is not None
    x = torch.randn(batch, n_columns, device=DEVICE).to(torch.bfloat16)
    got = product(x)
    expected = torch.cat(
        [reference.linear(x.float(), *layer) for layer in zip(weights, adapters, biases, strict=True)], 1
    )
    error = (got.float() - expected).norm() / expected.norm()
    assert torch.isfinite(got).all() and error < 5e-3
    expanded = product.expanded.multiply(x, None)
    assert (expanded.float() - expected).norm() / expected.norm() < 5e-3
    for weight, own, bias, part in zip(weights, adapters, biases, got.split(rows, 1), strict=True):
        alone = linear.linear(x, weight, own, bias)
        assert (alone.float() - part.float()).norm() / part.float().norm() < 5e-3
