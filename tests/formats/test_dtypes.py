"""Widening and rounding of floats: exact, and equal to torch's."""

from __future__ import annotations

import numpy as np
import pytest
from salr.formats import dtypes

SPECIAL = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-9, 65504, 65520, 1e-8, 1e-40, 3.4e38, -3.4e38, np.inf, -np.inf]


def float32_sample() -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, np.uint64).astype(np.uint32)
    numbers = bits.view(np.float32)
    return np.concatenate([numbers[~np.isnan(numbers)], np.array(SPECIAL, np.float32)])


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_rounding_equals_torchs_bit_for_bit(dtype):
    import torch

    numbers = float32_sample()
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    expected = torch.from_numpy(numbers).to(kind).view(torch.int32 if dtype == "F32" else torch.int16).numpy()
    with np.errstate(over="ignore"):
        found = dtypes.from_float32(numbers, dtype)
    np.testing.assert_array_equal(found.view(expected.dtype), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_nan_stays_nan(dtype):
    found = dtypes.to_float32(dtypes.from_float32(np.array([np.nan, 1], np.float32), dtype), dtype)
    assert np.isnan(found[0]) and found[1] == 1


def test_every_bf16_number_widens_to_torchs_float32():
    import torch

    bits = np.arange(2**16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(dtypes.to_float32(bits, "BF16").view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_number_survives_widening_and_rounding(dtype):
    bits = np.arange(2**16, dtype=np.uint16).view(dtypes.storage_dtype(dtype))
    wide = dtypes.to_float32(bits, dtype)
    again = dtypes.from_float32(wide, dtype)
    real = ~np.isnan(wide)
    np.testing.assert_array_equal(again.view(np.uint16)[real], bits.view(np.uint16)[real])


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("BF16", (3, 5), 30),
        ("U8", (), 1),
        ("F4", (3, 3), 5),
        ("F6_E2M3", (4,), 3),
        ("F32", (7, 0), 0),
        ("C64", (2,), 16),
    ],
)
def test_a_tensors_size_follows_from_dtype_and_shape(dtype, shape, expected):
    assert dtypes.tensor_bytes(dtype, shape) == expected


def test_a_byte_view_is_row_major_whatever_the_arrays_strides():
    array = np.arange(6, dtype=np.uint16).reshape(2, 3).T
    assert bytes(dtypes.byte_view(array)) == np.ascontiguousarray(array).tobytes()
    assert bytes(dtypes.byte_view(np.array(7, np.int64))) == (7).to_bytes(8, "little")
