"""What kernels are told about a layout, from a layout made by hand; no GPU is needed."""

from __future__ import annotations

import torch
from salr.cuda.device_layout import HEADER_BYTES, UNITS, SlabWeight
from salr.cuda.skinny import items_of


def test_items_are_pairs_of_units_in_the_order_in_which_they_are_multiplied():
    n_row_blocks, n_slabs, n_rows = 2, 4, 300
    sizes = torch.randint(8, 137, (n_row_blocks, n_slabs, UNITS), generator=torch.Generator().manual_seed(0))
    header = HEADER_BYTES // 16
    ends = header + sizes.cumsum(2)
    slab_sizes = ends[:, :, -1].flatten()
    offsets = torch.cat([slab_sizes.new_zeros(1), slab_sizes.cumsum(0)])
    slabs = torch.zeros(int(offsets[-1]) * 16, dtype=torch.uint8)
    headers = torch.cat([ends[:, :, -1:], ends[:, :, :-1]], 2).view(-1, UNITS).to(torch.int16)
    for number, words in enumerate(headers):
        start = int(offsets[number]) * 16
        slabs[start : start + HEADER_BYTES] = words.view(torch.uint8)
    weight = SlabWeight(
        n_rows, 256, "bitmap16", torch.bfloat16, slabs, offsets.to(torch.int32), 16 * int(slab_sizes.max())
    )
    items, largest = items_of(weight)
    assert items.shape == (10, n_slabs, 2)  # 300 rows in tens of 32
    for row in range(10):
        block, unit = row // 8, row % 8 * 2
        for slab in range(n_slabs):
            before = int(offsets[block * n_slabs + slab]) + header + int(sizes[block, slab, :unit].sum())
            first, both = int(sizes[block, slab, unit]), int(sizes[block, slab, unit : unit + 2].sum())
            assert items[row, slab].tolist() == [before, first | both << 16]
    assert largest == 16 * int(sizes.view(n_row_blocks, n_slabs, -1, 2).sum(3).max())
