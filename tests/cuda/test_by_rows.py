"""Which kernel multiplies how many rows, and how their work is cut; no GPU is needed."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from salr.cuda.by_rows import Facts, ProductByRows, kernel_for
from salr.cuda.decoded import shape_for, split_among
from salr.cuda.fused import SHORT_TILE, SHORTEST_TILE, TILES, tile_for
from salr.cuda.skinny import NARROW, WIDE

H100_CLUSTERS = 66
FACTS = Facts(16, 64, H100_CLUSTERS, most_skinny=8, most_decoded=sys.maxsize)


@pytest.mark.parametrize("n_row_blocks", [1, 16, 112])
@pytest.mark.parametrize("n_slabs", [2, 64, 224])
@pytest.mark.parametrize("batch", [1, 65, 128, 500, 4096])
def test_a_chosen_cut_covers_all_rows_and_leaves_less_than_a_round_to_be_split(n_row_blocks, n_slabs, batch):
    clusters = H100_CLUSTERS
    shape = shape_for(batch, n_row_blocks, n_slabs, clusters)
    assert shape.n_tiles == -(-batch // shape.rows) * n_row_blocks
    assert shape.n_whole == shape.n_tiles or (
        shape.n_whole % clusters == 0 and 0 < shape.n_tiles - shape.n_whole < clusters
    )


@pytest.mark.parametrize("n_rows", [4096, 28672])
def test_few_rows_are_skinny_more_fused_then_decoded_and_many_expanded(n_rows):
    facts, batches = replace(FACTS, n_row_blocks=n_rows // 256), (1, 8, 9, 32, 64, 128, 4096)
    chosen = [kernel_for(batch, facts) for batch in batches]
    assert chosen == ["skinny", "skinny", "fused", "fused", "decoded", "decoded", "expanded"]
    assert "decoded" not in [kernel_for(batch, replace(facts, most_decoded=0)) for batch in batches]
    assert "skinny" not in [kernel_for(batch, replace(facts, most_skinny=0)) for batch in batches]


def test_more_ranks_than_kernels_take_are_expanded_whatever_the_rows():
    facts = replace(FACTS, is_fused=False, most_skinny=0, most_decoded=0)
    assert {kernel_for(batch, facts) for batch in (0, 1, 40, 500)} == {"expanded"}


def test_no_rows_are_fused_which_launches_nothing():
    assert kernel_for(0, FACTS) == "fused"


@pytest.mark.parametrize("is_quantized", [False, True])
def test_weights_are_decoded_from_33_rows_on(is_quantized):
    chosen = [kernel_for(batch, replace(FACTS, is_quantized=is_quantized)) for batch in (32, 33, 64, 256)]
    assert chosen == ["fused", "decoded", "decoded", "decoded"]


@pytest.mark.parametrize("is_quantized", [False, True])
def test_small_weights_are_fused_up_to_64_rows(is_quantized):
    facts = Facts(4, 16, H100_CLUSTERS, is_quantized=is_quantized)
    assert {kernel_for(batch, facts) for batch in range(1, 65)} == {"fused"}


def test_weights_of_many_rounds_are_decoded_from_17_rows_on():
    facts = replace(FACTS, n_row_blocks=112, fewest_decoded=17)
    assert [kernel_for(batch, facts) for batch in (8, 16, 17, 32, 33)] == ["skinny", "fused", *["decoded"] * 3]


def test_tiles_of_up_to_32_rows_change_with_a_thread_blocks_rounds():
    hopper = [tile_for(32, "bitmap16", (9, 0), rounds) for rounds in (7.9, 8, 40)]
    assert hopper == [SHORTEST_TILE, SHORT_TILE, SHORT_TILE]
    for older in (("bitmap16", (8, 0)), ("dense8", (9, 0))):
        assert [tile_for(batch, *older, 4) for batch in (1, 9, 17, 33)] == list(TILES)


@pytest.mark.parametrize(
    ("n_tiles", "n_slabs", "expected"),
    [(16, 64, 64), (24, 64, 48), (43, 64, 66), (46, 64, 66), (47, 64, 47), (65, 64, 65), (1, 2, 1), (3, 4, 6)],
)
def test_split_tiles_are_shared_so_that_most_clusters_have_a_part_of_one(n_tiles, n_slabs, expected):
    assert split_among(n_tiles, n_slabs, H100_CLUSTERS) == expected


@pytest.mark.parametrize(
    ("rounds", "encoding", "expected"),
    [(4.9, "bitmap16", 14), (5, "bitmap16", 6), (39, "bitmap16", 6), (40, "bitmap16", 0), (40, "dense8", 6)],
)
def test_skinny_products_are_of_few_rounds_and_of_the_narrow_shape(rounds, encoding, expected):
    rows = {NARROW: 6, WIDE: 14}
    product = ProductByRows.__new__(ProductByRows)
    product.weight = SimpleNamespace(encoding=encoding)
    product._fused = SimpleNamespace(rounds=rounds)
    product._skinny = SimpleNamespace(most_rows=14, rows_of=rows.__getitem__)
    assert product._most_skinny() == expected
