"""Which kernel multiplies how many rows, and how their work is cut; no GPU is needed."""

from __future__ import annotations

import pytest
from salr.cuda.by_rows import kernel_for
from salr.cuda.decoded import shape_for

H100_CLUSTERS = 66


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
def test_few_rows_are_fused_more_are_decoded_and_many_expanded(n_rows):
    chosen = [kernel_for(batch, n_rows // 256, 64, H100_CLUSTERS, True) for batch in (1, 64, 128, 4096)]
    assert chosen == ["fused", "fused", "decoded", "expanded"]
    assert "decoded" not in [kernel_for(batch, n_rows // 256, 64, H100_CLUSTERS, False) for batch in (1, 64, 128, 4096)]


def test_quantized_weights_are_decoded_from_33_rows_on():
    chosen = [kernel_for(batch, 16, 64, H100_CLUSTERS, True, True) for batch in (32, 33, 64, 256)]
    assert chosen == ["fused", "decoded", "decoded", "decoded"]


@pytest.mark.parametrize("is_quantized", [False, True])
def test_small_weights_are_fused_up_to_64_rows(is_quantized):
    assert {kernel_for(batch, 4, 16, H100_CLUSTERS, False, is_quantized) for batch in range(1, 65)} == {"fused"}
