"""Codes and scales: what the converter chooses is what the file's decoder gives back, whatever the weights."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from salr.converter.execution.packing import packed_codes
from salr.converter.methods.quantization import Quantized, Quantizer, compensated, descended, nearest, rescaled
from salr.converter.methods.weighted import damped_gram
from salr.formats.bitmap import pack_bitmap, row_offsets
from salr.formats.manifest import ModuleEntry
from salr.formats.module import ModuleTensors
from salr.formats.values import NF4_CODE_BOOK, decode_values, encode_quantized, pad_values

pytestmark = pytest.mark.usefixtures("one_thread")
ENCODINGS = ["int8", "nf4"]
#: of 70 columns: one each, no divisor, one more than the piece of 64 that compensation works in, more than all columns
GROUP_SIZES = [1, 24, 65, 128]
LARGEST = {"int8": 65504.0 * 127, "nf4": 65504.0}
LEAST = {"int8": 2.0**-16 * 127, "nf4": 2.0**-16}


def matrix_of(n_rows: int = 12, n_columns: int = 70, seed: int = 0, kept: float = 0.5):
    """Return a weight (N, K) whose rows differ in size, and a random mask."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_rows, n_columns, generator=generator) * torch.rand(n_rows, 1, generator=generator)
    return weight, torch.rand(n_rows, n_columns, generator=generator) < kept


def gram_of(n_columns: int = 70, seed: int = 0) -> torch.Tensor:
    """Return X^T X, damped, of strongly correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(100 + seed)
    shared = torch.randn(300, 6, generator=generator) @ torch.randn(6, n_columns, generator=generator)
    inputs = shared + 0.5 * torch.randn(300, n_columns, generator=generator)
    inputs *= torch.rand(n_columns, generator=generator) + 0.1
    return damped_gram(inputs.T @ inputs)


def as_file(quantized: Quantized, mask: torch.Tensor) -> ModuleTensors:
    """Return the tensors that a file would hold, scales in float16 first."""
    quantizer, nnz = quantized.quantizer, int(mask.sum())
    entry = ModuleEntry(
        source_tensor="w", source_shape=tuple(mask.shape), transposed=False, shape=tuple(mask.shape), dtype="F32",
        nnz=nnz, pattern="unstructured", encoding=quantizer.encoding, values_from="refit",
        group_size=quantizer.group_size,
    )  # fmt: skip
    codes = packed_codes(quantized.codes[mask], quantizer.encoding).numpy()
    bitmap = pack_bitmap(mask.numpy())
    scales = quantized.scales.half().numpy().astype(np.float32)
    padded = pad_values(codes, quantizer.encoding, nnz)
    return ModuleTensors(entry, padded, bitmap, row_offsets(bitmap), scales)


def bits(array) -> np.ndarray:
    return np.ascontiguousarray(array, np.float32).view(np.int32)


# --- what is encoded is what is decoded -------------------------------------------------------------------------------


@given(
    encoding=st.sampled_from(ENCODINGS),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 130)),
    group_size=st.sampled_from([1, 2, 7, 24, 64, 128, 1000]),
    kept=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    exponent=st.integers(-13, 12),
    seed=st.integers(0, 1000),
)
def test_the_files_decoder_gives_the_converters_values_bit_for_bit(encoding, shape, group_size, kept, exponent, seed):
    weight, mask = matrix_of(*shape, seed, kept)
    quantized = nearest(weight * 2.0**exponent, mask, Quantizer(encoding, group_size))
    found = as_file(quantized, mask)
    assert found.scales.shape == (shape[0], -(-shape[1] // group_size))
    np.testing.assert_array_equal(bits(found.dense()), bits(quantized.values(mask)))


@given(
    encoding=st.sampled_from(ENCODINGS),
    pairs=st.lists(
        st.tuples(
            st.floats(width=32, allow_nan=False, allow_infinity=False),
            st.sampled_from([0.0, 2.0**-24, 2.0**-14, 0.1, 1.0, 3.0, 65504.0]) | st.floats(0, 65504, width=16),
        ),
        max_size=80,
    ),
)
def test_both_encoders_choose_the_same_code_for_any_weight_and_scale(encoding, pairs):
    numbers, scales = (np.array([pair[side] for pair in pairs], np.float32) for side in (0, 1))
    quantizer = Quantizer(encoding, 128)
    codes = quantizer.codes(torch.from_numpy(numbers), torch.from_numpy(scales))
    stored = packed_codes(codes, encoding).numpy()
    np.testing.assert_array_equal(stored, encode_quantized(numbers, scales, encoding))
    decoded = quantizer.decoded(codes, torch.from_numpy(scales)).numpy()
    np.testing.assert_array_equal(bits(decode_values(stored, encoding, numbers.size, scales)), bits(decoded))


def test_both_encoders_break_ties_alike():
    middles = torch.from_numpy((NF4_CODE_BOOK[1:] + NF4_CODE_BOOK[:-1]) / 2)
    halves = torch.arange(-127, 127) + 0.5
    for encoding, ties in (("nf4", middles), ("int8", halves)):
        codes = Quantizer(encoding, 1).codes(ties, torch.ones_like(ties))
        expected = encode_quantized(ties.float().numpy(), np.ones(len(ties), np.float32), encoding)
        np.testing.assert_array_equal(packed_codes(codes, encoding).numpy(), expected)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_code_is_the_nearest_to_its_own_value(encoding):
    codes = torch.arange(16 if encoding == "nf4" else 256).to(torch.uint8)
    codes = codes[codes != 128]  # int8 never stores -128
    quantizer, scale = Quantizer(encoding, 1), torch.full(codes.shape, 0.37)
    assert torch.equal(quantizer.codes(quantizer.decoded(codes, scale), scale), codes)


@given(seed=st.integers(0, 1000), kept=st.floats(0, 1), n_columns=st.integers(1, 33))
def test_nf4_codes_are_packed_two_a_byte_without_gaps_between_rows(seed, kept, n_columns):
    mask = matrix_of(5, n_columns, seed, kept)[1]
    codes = torch.randint(0, 16, mask.shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    stored = packed_codes(codes[mask], "nf4").numpy()
    assert stored.size == -(-int(mask.sum()) // 2)
    expected = NF4_CODE_BOOK[codes[mask].numpy()]
    np.testing.assert_array_equal(decode_values(stored, "nf4", expected.size), expected)


# --- scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("choose", ["nearest", "compensated", "rescaled"])
def test_scales_are_float16_numbers_from_0_one_a_group(encoding, group_size, choose):
    weight, mask = matrix_of()
    weight[3] *= 1e-5
    gram, quantizer = gram_of(), Quantizer(encoding, group_size)
    found = {
        "nearest": lambda: nearest(weight, mask, quantizer),
        "compensated": lambda: compensated(weight * mask, mask, quantizer, gram),
        "rescaled": lambda: rescaled(weight, mask, nearest(weight, mask, quantizer), gram),
    }[choose]()
    assert found.scales.shape == (12, math.ceil(70 / group_size)) and found.scales.dtype == torch.float32
    assert torch.equal(found.scales.half().float(), found.scales)
    assert (found.scales >= 0).all() and (found.scales > 0).sum() > 10


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_each_weight_has_the_scale_of_its_columns_group(encoding, group_size):
    scales = torch.arange(3.0 * math.ceil(70 / group_size)).view(3, -1)
    found = Quantizer(encoding, group_size).each(scales, 70)
    expected = [[scales[row, column // group_size] for column in range(70)] for row in range(3)]
    assert found.shape == (3, 70) and found.tolist() == torch.tensor(expected).tolist()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_groups_and_rows_with_nothing_kept_have_scale_0_and_others_are_not_touched_by_them(encoding, group_size):
    weight, mask = matrix_of()
    mask[4], mask[5, :group_size], mask[6] = False, False, True
    quantizer = Quantizer(encoding, group_size)
    scales = nearest(weight, mask, quantizer).scales
    held = quantizer.each(scales, 70) > 0
    has_kept = torch.stack([part.any(1) for part in mask.split(group_size, 1)], 1)
    assert torch.equal(scales > 0, has_kept) and not held[4].any() and held[6].all()
    others = [row for row in range(12) if row not in (4, 5)]
    assert torch.equal(scales[others], nearest(weight[others], mask[others], quantizer).scales)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_groups_of_zeros_have_scale_0_and_come_back_as_zeros(encoding):
    weight, mask = matrix_of(kept=1.0)
    weight[2], weight[3, 24:48] = 0, 0
    quantizer, gram = Quantizer(encoding, 24), gram_of()
    for found in (nearest(weight, mask, quantizer), compensated(torch.zeros(12, 70), mask, quantizer, gram)):
        assert (found.scales[2] == 0).all() and found.scales[3, 1] == 0
        assert not found.values(mask)[2].any() and not found.values(mask)[3, 24:48].any()
        assert np.array_equal(as_file(found, mask).dense(), found.values(mask).numpy())


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_pruned_weight_never_shapes_a_scale(encoding):
    weight, mask = matrix_of()
    loud = torch.where(mask, weight, 1e4)
    quiet, noisy = (nearest(w, mask, Quantizer(encoding, 24)) for w in (weight, loud))
    assert torch.equal(quiet.scales, noisy.scales) and torch.equal(quiet.values(mask), noisy.values(mask))


def group_errors(weight, mask, quantizer, scales, importance=None) -> torch.Tensor:
    """Return the squared error (N, G) of rounding the kept weights with ``scales``."""
    each = quantizer.each(scales, weight.shape[1])
    error = (quantizer.decoded(quantizer.codes(weight, each), each) - weight).masked_fill(~mask, 0).square()
    error = error if importance is None else error * importance
    return torch.stack([part.sum(1) for part in error.split(quantizer.group_size, 1)], 1)


@pytest.mark.parametrize("group_size", GROUP_SIZES[1:])
@pytest.mark.parametrize("seed", range(3))
def test_searched_scales_are_never_worse_than_maxima_and_better_for_nf4(group_size, seed):
    weight, mask = matrix_of(seed=seed)
    for encoding, peak in (("int8", 127), ("nf4", 1)):
        quantizer = Quantizer(encoding, group_size)
        parts = (weight * mask).abs().split(group_size, 1)
        maxima = (torch.stack([part.amax(1) for part in parts], 1) / peak).half().float()
        plain = group_errors(weight, mask, quantizer, maxima)
        found = group_errors(weight, mask, quantizer, quantizer.scales(weight, mask))
        assert (found <= plain * (1 + 1e-5)).all()
        assert encoding == "int8" or found.sum() < 0.98 * plain.sum()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_importance_turns_the_search_towards_the_columns_that_matter(encoding):
    weight, mask = matrix_of(64, 70)
    importance = torch.ones(70)
    importance[::7] = 1e4
    quantizer = Quantizer(encoding, 24)
    blind, seeing = quantizer.scales(weight, mask), quantizer.scales(weight, mask, importance)
    blind, seeing = (group_errors(weight, mask, quantizer, scales, importance) for scales in (blind, seeing))
    assert (seeing <= blind * (1 + 1e-5)).all() and seeing.sum() < 0.98 * blind.sum()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_columns_without_importance_still_get_a_scale(encoding):
    weight, mask = matrix_of(kept=1.0)
    scales = Quantizer(encoding, 24).scales(weight, mask, torch.zeros(70))
    assert (scales > 0).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_scales_fit_float16_from_their_least_normal_use_to_their_largest(encoding):
    quantizer = Quantizer(encoding, 24)
    largest, least = LARGEST[encoding], LEAST[encoding]
    for number, expected in ((largest, True), (largest * 1.0001, False), (least, True), (least * 0.9999, False)):
        assert quantizer.fits(torch.tensor([[0.0, -number]])) is expected
    assert quantizer.fits(torch.zeros(2, 3)) and quantizer.fits(torch.zeros(0, 3))
    assert not quantizer.fits(torch.tensor([[1e-40]])) and not quantizer.fits(torch.tensor([[3e38]]))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_largest_weights_that_fit_come_back_finite_and_close(encoding):
    weight = torch.tensor([[LARGEST[encoding], -LARGEST[encoding], 0.0], [1.0, -2.0, 0.5]])
    mask = torch.ones(2, 3) > 0
    found = nearest(weight, mask, Quantizer(encoding, 128))
    np.testing.assert_allclose(found.values(mask)[0], weight[0], rtol=1e-3)
    assert np.isfinite(as_file(found, mask).dense()).all()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_subnormal_weights_beside_others_are_lost_without_a_nan(encoding):
    weight, mask = matrix_of(kept=1.0)
    weight[1], weight[2, :24] = 1e-41, -3e-39
    quantizer, gram = Quantizer(encoding, 24), gram_of()
    start = nearest(weight, mask, quantizer)
    for found in (start, compensated(weight, mask, quantizer, gram), rescaled(weight, mask, start, gram)):
        assert torch.isfinite(found.values(mask)).all() and torch.isfinite(found.scales).all()
        assert not found.scales[1].any() and not found.values(mask)[1].any()
        assert np.array_equal(as_file(found, mask).dense(), found.values(mask).numpy())


@given(
    encoding=st.sampled_from(ENCODINGS),
    rows=st.lists(
        st.lists(st.floats(-65504, 65504, width=32, allow_subnormal=True), min_size=5, max_size=5),
        min_size=1, max_size=5,
    ),
    group_size=st.sampled_from([1, 2, 5, 9]),
)  # fmt: skip
def test_no_kept_weight_moves_further_than_its_groups_largest(encoding, rows, group_size):
    weight = torch.tensor(rows)
    mask = torch.ones_like(weight) > 0
    found = nearest(weight, mask, Quantizer(encoding, group_size)).values(mask)
    largest = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in weight.split(group_size, 1)], 1)
    assert ((found - weight).abs() <= largest).all()
    assert ((found * weight >= 0) | (encoding == "nf4")).all()


@pytest.mark.parametrize("step", ["nearest", "compensated", "descended", "rescaled"])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pruned_places_stay_0_and_kept_places_do_not(step, encoding):
    weight, mask = matrix_of()
    gram, quantizer = gram_of(), Quantizer(encoding, 24)
    start = nearest(weight, mask, quantizer)
    found = {
        "nearest": lambda: start,
        "compensated": lambda: compensated(weight * mask, mask, quantizer, gram),
        "descended": lambda: descended(weight, mask, start, gram, 2),
        "rescaled": lambda: rescaled(weight, mask, start, gram),
    }[step]()
    dense = as_file(found, mask).dense()
    assert not dense[~mask.numpy()].any() and (dense[mask.numpy()] != 0).mean() > 0.7
