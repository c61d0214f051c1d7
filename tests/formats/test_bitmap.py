"""The bitmap codec: golden bytes, and round trips over widths that end in the middle of a byte or a word."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from salr.formats import bitmap

WIDTHS = [1, 7, 8, 9, 63, 64, 65, 200]


def random_mask(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.5


masks = st.tuples(st.integers(1, 9), st.sampled_from([*WIDTHS, 2, 15, 17, 127]), st.integers(0, 2**32 - 1)).map(
    lambda case: random_mask(case[0], case[1], seed=case[2])
)


def test_the_first_column_is_the_lowest_bit():
    mask = np.array([[1, 0, 0, 0, 0, 0, 0, 0, 1, 1], [0, 1, 1, 0, 0, 0, 0, 1, 0, 0]], bool)
    assert bitmap.pack_bitmap(mask).tolist() == [[0b0000_0001, 0b11], [0b1000_0110, 0]]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_mask_survives_packing_at_every_width(width):
    mask = random_mask(5, width)
    packed = bitmap.pack_bitmap(mask)
    assert packed.dtype == np.uint8 and packed.shape == (5, bitmap.bitmap_width(width)) == (5, (width + 7) // 8)
    np.testing.assert_array_equal(bitmap.unpack_bitmap(packed, width), mask)


@pytest.mark.parametrize("width", WIDTHS)
def test_stacked_masks_count_their_rows_in_order(width):
    mask = random_mask(3, 4, width)
    packed = bitmap.pack_bitmap(mask)
    np.testing.assert_array_equal(bitmap.row_popcounts(packed), mask.reshape(12, width).sum(1))
    np.testing.assert_array_equal(bitmap.unpack_bitmap(packed, width), mask)


@given(masks)
def test_row_offsets_rise_by_each_rows_count_and_end_at_nnz(mask):
    offsets = bitmap.row_offsets(bitmap.pack_bitmap(mask))
    assert offsets.dtype == np.uint64 and offsets[0] == 0 and offsets[-1] == mask.sum()
    np.testing.assert_array_equal(np.diff(offsets), mask.sum(1))


@given(masks, st.sampled_from([np.uint16, np.float16, np.float32]))
def test_gathered_values_scatter_back_to_where_they_were(mask, dtype):
    dense = np.random.default_rng(1).integers(1, 100, mask.shape).astype(dtype)
    values = bitmap.gather_values(dense, mask)
    assert values.shape == (mask.sum(),) and values.dtype == dtype
    restored = bitmap.scatter_values(values, bitmap.pack_bitmap(mask), mask.shape[1])
    np.testing.assert_array_equal(restored, np.where(mask, dense, 0))


def test_values_follow_each_other_in_column_order_and_rows_in_row_order():
    dense = np.arange(8).reshape(2, 4)
    mask = np.array([[0, 1, 0, 1], [1, 0, 1, 0]], bool)
    assert bitmap.gather_values(dense, mask).tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_popcounts_are_right_on_bytes_at_any_address_and_read_only(offset):
    mask = random_mask(6, 128)
    buffer = np.zeros(6 * 16 + offset, np.uint8)
    buffer[offset:] = bitmap.pack_bitmap(mask).reshape(-1)
    buffer.flags.writeable = False
    np.testing.assert_array_equal(bitmap.row_popcounts(buffer[offset:].reshape(6, 16)), mask.sum(1))


@given(masks)
def test_a_packed_mask_has_no_spare_bit_set(mask):
    assert bitmap.spare_bits_are_clear(bitmap.pack_bitmap(mask), mask.shape[1])


@pytest.mark.parametrize("width", [width for width in WIDTHS if width % 8])
def test_any_single_spare_bit_is_seen(width):
    for bit in range(width % 8, 8):
        packed = bitmap.pack_bitmap(random_mask(2, 3, width))
        packed[1, 2, -1] |= 1 << bit
        assert not bitmap.spare_bits_are_clear(packed, width)


@pytest.mark.parametrize("keep", [True, False])
def test_all_and_nothing_are_masks_too(keep):
    mask = np.full((3, 65), keep)
    packed = bitmap.pack_bitmap(mask)
    assert bitmap.row_offsets(packed).tolist() == ([0, 65, 130, 195] if keep else [0, 0, 0, 0])
    np.testing.assert_array_equal(bitmap.unpack_bitmap(packed, 65), mask)
