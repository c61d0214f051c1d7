"""Encodings of kept values: golden bytes, exact decoding, and the error that quantizing may make."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from salr.formats import values
from salr.formats.dtypes import from_float32

COUNTS = [0, 1, 2, 7, 31, 32, 33, 63, 64, 65, 127, 128, 129]
ENCODINGS = ["bf16", "fp16", "fp32", "int8", "nf4"]
BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "int8": 8, "nf4": 4}


def test_every_encoding_has_its_safetensors_dtype():
    assert tuple(ENCODINGS) == values.ENCODINGS
    assert [values.values_dtype(encoding) for encoding in ENCODINGS] == ["BF16", "F16", "F32", "U8", "U8"]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("nnz", COUNTS)
def test_padding_is_64_zero_bytes_or_more_up_to_a_multiple_of_64(encoding, nnz):
    used = values.encoded_bytes(encoding, nnz)
    assert used == -(-nnz * BITS[encoding] // 8)
    n_elements = {"bf16": nnz, "fp16": nnz, "fp32": nnz}.get(encoding, used)
    dtype = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}.get(encoding, np.uint8)
    padded = values.pad_values(np.ones(n_elements, dtype), encoding, nnz)
    assert padded.size == values.stored_elements(encoding, nnz)
    assert padded.nbytes % 64 == 0 and 64 <= padded.nbytes - used < 128
    assert not padded.view(np.uint8)[used:].any() and (padded[:n_elements] == 1).all()


@pytest.mark.parametrize("encoding", ["bf16", "fp16", "fp32"])
def test_float_values_decode_to_the_exact_number(encoding):
    numbers = np.array([0.0, -0.0, 1.5, -2.25, 1e-6, 300, np.inf], np.float32)
    dtype = values.values_dtype(encoding)
    stored = values.pad_values(from_float32(numbers, dtype), encoding, numbers.size)
    decoded = values.decode_values(stored, encoding, numbers.size)
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(from_float32(decoded, dtype), from_float32(numbers, dtype))
    np.testing.assert_array_equal(decoded[[0, 2, 3, 6]], numbers[[0, 2, 3, 6]])


def test_int8_codes_have_golden_bytes():
    numbers = np.array([-127, -1, 0, 0.4, 0.6, 1, 200, -300], np.float32)
    stored = values.encode_quantized(numbers, np.ones(8, np.float32), "int8")
    assert stored.tolist() == [0x81, 0xFF, 0, 0, 1, 1, 127, 0x81]


def test_int8_never_makes_the_code_minus_128():
    stored = values.encode_quantized(np.array([-1e38], np.float32), np.array([1e-3], np.float32), "int8")
    assert stored.view(np.int8).tolist() == [-127]


@pytest.mark.parametrize(("encoding", "code"), [("int8", 127), ("nf4", 15)])
def test_a_ratio_beyond_the_floats_takes_the_outermost_code_without_a_warning(encoding, code):
    with np.errstate(all="raise"):
        stored = values.encode_quantized(np.array([3e38], np.float32), np.array([1e-38], np.float32), encoding)
    assert stored.tolist() == [code]


def test_nf4_puts_the_even_element_in_the_low_nibble_and_ends_an_odd_count_with_zero_bits():
    numbers = values.NF4_CODE_BOOK[[0, 15, 7, 1, 14]]
    stored = values.encode_quantized(numbers, np.ones(5, np.float32), "nf4")
    assert stored.tolist() == [0xF0, 0x17, 0x0E]


def test_the_nf4_code_book_is_qloras():
    book = values.NF4_CODE_BOOK
    assert book.size == 16 and book[7] == 0 and (book[0], book[15]) == (-1, 1) and (np.diff(book) > 0).all()
    np.testing.assert_allclose(book[[1, 8, 14]], [-0.6961928, 0.0795803, 0.72295684], rtol=1e-6)


@pytest.mark.parametrize("encoding", ["int8", "nf4"])
def test_every_code_decodes_and_encodes_to_itself(encoding):
    stored = np.arange(256, dtype=np.uint8)
    stored = stored[stored != 0x80] if encoding == "int8" else stored
    count = stored.size * 8 // BITS[encoding]
    scales = np.full(count, 0.5, np.float32)
    decoded = values.decode_values(stored, encoding, count, scales)
    np.testing.assert_array_equal(values.encode_quantized(decoded, scales, encoding), stored)


@pytest.mark.parametrize("encoding", ["int8", "nf4"])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 63, 64, 65])
def test_quantized_values_come_back_within_half_a_step(encoding, count):
    rng = np.random.default_rng(count)
    scales = rng.random(count).astype(np.float32) + 0.5
    unit = rng.uniform(-1, 1, count).astype(np.float32)
    numbers = unit * scales * (127 if encoding == "int8" else 1)
    stored = values.pad_values(values.encode_quantized(numbers, scales, encoding), encoding, count)
    decoded = values.decode_values(stored, encoding, count, scales)
    half_step = 0.5 if encoding == "int8" else np.diff(values.NF4_CODE_BOOK).max() / 2
    assert decoded.shape == (count,) and (np.abs(decoded - numbers) <= half_step * scales * 1.0001).all()


@pytest.mark.parametrize("encoding", ["int8", "nf4"])
def test_scale_zero_gives_zero_whatever_the_value(encoding):
    numbers = np.array([0, 1, -5, 3e38], np.float32)
    zeros = np.zeros(4, np.float32)
    with np.errstate(all="raise"):
        decoded = values.decode_values(values.encode_quantized(numbers, zeros, encoding), encoding, 4, zeros)
    assert decoded.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("encoding", ["int8", "nf4"])
@pytest.mark.parametrize("scale", [1e-40, 1.2e-38, 1e30], ids=["sub-normal", "smallest normal", "huge"])
def test_extreme_scales_keep_order_and_sign(encoding, scale):
    top = 127 if encoding == "int8" else 1
    scales = np.full(3, scale, np.float32)
    numbers = np.array([-top, 0, top], np.float32) * scales
    decoded = values.decode_values(values.encode_quantized(numbers, scales, encoding), encoding, 3, scales)
    np.testing.assert_allclose(decoded, numbers, rtol=1e-3)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_nothing_kept_is_64_zero_bytes_and_decodes_to_nothing(encoding):
    dtype = {"bf16": np.uint16, "fp16": np.float16, "fp32": np.float32}.get(encoding, np.uint8)
    stored = values.pad_values(np.zeros(0, dtype), encoding, 0)
    scales = np.zeros(0, np.float32) if encoding in values.QUANTIZED_BITS else None
    assert stored.nbytes == 64 and not stored.any()
    assert values.decode_values(stored, encoding, 0, scales).shape == (0,)


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=70))
def test_nf4_chooses_the_nearest_code(numbers):
    array = np.array(numbers, np.float32)
    stored = values.encode_quantized(array, np.ones_like(array), "nf4")
    decoded = values.decode_values(stored, "nf4", array.size, np.ones_like(array))
    nearest = np.abs(array[:, None].astype(np.float64) - values.NF4_CODE_BOOK).min(1)
    np.testing.assert_allclose(np.abs(decoded.astype(np.float64) - array), nearest, rtol=0, atol=1e-7)
