"""Compensation, descent and refitted scales: each lowers the error in the output, and keeps what is not its own."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from salr.converter.methods.quantization import Quantized, Quantizer, compensated, descended, nearest, rescaled
from salr.converter.methods.weighted import damped_gram, output_energy

pytestmark = pytest.mark.usefixtures("one_thread")
ENCODINGS = ["int8", "nf4"]
#: of 70 columns: one each, no divisor, one more than the piece of 64 that compensation works in, more than all columns
GROUP_SIZES = [1, 24, 65, 128]


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


def energy(weight: torch.Tensor, mask: torch.Tensor, quantized: Quantized, gram: torch.Tensor) -> float:
    return output_energy((weight - quantized.values(mask)).double(), gram.double())


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kept", [0.5, 1.0])
@pytest.mark.parametrize("group_size", GROUP_SIZES[1:])
def test_compensation_beats_rounding_to_nearest_under_correlated_inputs(encoding, kept, group_size):
    for seed in range(3):
        weight, mask = matrix_of(seed=seed, kept=kept)
        weight, gram, quantizer = weight * mask, gram_of(seed=seed), Quantizer(encoding, group_size)
        plain = energy(weight, mask, nearest(weight, mask, quantizer, gram.diagonal()), gram)
        assert energy(weight, mask, compensated(weight, mask, quantizer, gram), gram) < 0.5 * plain


def test_compensation_is_column_after_column_with_the_rest_refitted():
    """Compare with the definition: after each column the rest takes its least-squares values, in float64."""
    weight, mask = matrix_of(12, 150, kept=0.8)
    weight, gram, quantizer = weight * mask, gram_of(150), Quantizer("nf4", 24)
    found = compensated(weight, mask, quantizer, gram)
    scale = quantizer.each(found.scales, 150)
    order, rest = torch.argsort(gram.diagonal(), descending=True, stable=True), weight.double()
    expected, exact = torch.zeros(12, 150), gram.double()
    for number, column in enumerate(order):
        later = order[number + 1 :]
        codes = quantizer.codes(rest[:, column].float(), scale[:, column])
        expected[:, column] = quantizer.decoded(codes, scale[:, column]) * mask[:, column]
        error = rest[:, column] - expected[:, column]
        if len(later):
            rest[:, later] += error[:, None] * torch.linalg.solve(exact[later][:, later], exact[later, column])
    same = (found.values(mask) == expected).all(1)
    assert same.sum() > 8  # in float32 a code at the border of two may fall to either side, and move those behind it
    ratio = energy(weight, mask, found, gram) / output_energy((weight - expected).double(), exact)
    assert 0.95 < ratio < 1.05


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_compensation_between_independent_inputs_is_rounding_to_nearest(encoding, group_size):
    weight, mask = matrix_of()
    weight, quantizer = weight * mask, Quantizer(encoding, group_size)
    sizes = torch.rand(70, generator=torch.Generator().manual_seed(1)) + 0.1
    found, plain = compensated(weight, mask, quantizer, torch.diag(sizes)), nearest(weight, mask, quantizer, sizes)
    assert torch.equal(found.scales, plain.scales) and torch.equal(found.values(mask), plain.values(mask))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_compensation_counts_what_falls_on_pruned_places_as_an_error(encoding):
    """With it passed on, the error is less than if pruned places were left out of the sum until the end."""
    weight, mask = matrix_of(32)
    weight, gram, quantizer = weight * mask, gram_of(), Quantizer(encoding, 24)
    found = compensated(weight, mask, quantizer, gram)
    everywhere = compensated(weight, torch.ones_like(mask), quantizer, gram)
    masked = Quantized(quantizer, everywhere.codes, everywhere.scales)
    assert energy(weight, mask, found, gram) < 0.9 * energy(weight, mask, masked, gram)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("kept", [0.5, 1.0])
def test_descent_and_refitted_scales_never_raise_the_error(encoding, group_size, kept):
    for seed in range(3):
        target, mask = matrix_of(seed=seed, kept=kept)
        gram, quantizer = gram_of(seed=seed), Quantizer(encoding, group_size)
        found = nearest(target, mask, quantizer)
        errors = [energy(target, mask, found, gram)]
        for _ in range(3):
            found = rescaled(target, mask, found, gram)
            errors.append(energy(target, mask, found, gram))
            found = descended(target, mask, found, gram, 1)
            errors.append(energy(target, mask, found, gram))
        assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
        assert errors[2] < 0.8 * errors[0]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_descent_ends_where_no_other_code_lowers_the_error(encoding):
    target, mask = matrix_of(2, 16)
    gram, quantizer = gram_of(16), Quantizer(encoding, 6)
    found = descended(target, mask, nearest(target, mask, quantizer), gram, 60)
    scale, reached = quantizer.each(found.scales, 16), energy(target, mask, found, gram)
    for row, column in mask.nonzero().tolist():
        for code in range(16) if encoding == "nf4" else (*range(128), *range(129, 256)):  # int8 never stores -128
            codes = found.codes.clone()
            codes[row, column] = code
            values = quantizer.decoded(codes, scale).masked_fill(~mask, 0)
            assert output_energy((target - values).double(), gram.double()) > reached * (1 - 1e-5)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_two_sweeps_are_one_sweep_twice(encoding):
    target, mask = matrix_of(kept=0.7)
    gram, start = gram_of(), nearest(target, mask, Quantizer(encoding, 24))
    both = descended(target, mask, start, gram, 2).values(mask)
    twice = descended(target, mask, descended(target, mask, start, gram, 1), gram, 1).values(mask)
    assert (both == twice).double().mean() > 0.95  # codes at a border may fall to either side
    assert torch.equal(descended(target, mask, start, gram, 0).values(mask), start.values(mask))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_no_other_scale_is_better_than_a_refitted_one(encoding, group_size):
    """The last group is fitted to all others as they stand: float16 has no better number, and 2 % away it is worse."""
    target, mask = matrix_of(8)
    mask[:, -1] = True
    gram = gram_of()
    found = rescaled(target, mask, nearest(target, mask, Quantizer(encoding, group_size)), gram)
    reached, last = row_energies(target, mask, found, gram), found.scales[:, -1].half().numpy()

    def with_last(scales: np.ndarray) -> torch.Tensor:
        changed = torch.cat([found.scales[:, :-1], torch.from_numpy(scales).float()[:, None]], 1)
        return row_energies(target, mask, Quantized(found.quantizer, found.codes, changed), gram)

    held = last > 0
    assert held.sum() > 4
    for direction in (-1, 1):
        beside = np.nextafter(last, np.float16(direction * np.inf))
        assert (reached <= with_last(np.maximum(beside, 0)) * (1 + 1e-5)).all()
        assert (reached < with_last(last * np.float16(1 + 0.02 * direction)))[held].all()


def row_energies(target, mask, quantized, gram) -> torch.Tensor:
    error = (target - quantized.values(mask)).double()
    return ((error @ gram.double()) * error).sum(1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_refitting_scales_keeps_codes_and_descent_keeps_scales(encoding):
    target, mask = matrix_of()
    gram, start = gram_of(), nearest(target, mask, Quantizer(encoding, 24))
    fitted, moved = rescaled(target, mask, start, gram), descended(target, mask, start, gram, 1)
    assert torch.equal(fitted.codes, start.codes) and not torch.equal(fitted.scales, start.scales)
    assert torch.equal(moved.scales, start.scales) and not torch.equal(moved.codes[mask], start.codes[mask])


def test_steps_leave_their_input_as_it_was():
    target, mask = matrix_of()
    gram, start = gram_of(), nearest(target, mask, Quantizer("nf4", 24))
    held = [target, mask, gram, start.codes, start.scales]
    before = [tensor.clone() for tensor in held]
    compensated(target, mask, start.quantizer, gram)
    descended(target, mask, start, gram, 2)
    rescaled(target, mask, start, gram)
    assert all(torch.equal(one, two) for one, two in zip(held, before, strict=True))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_same_input_gives_the_same_codes_and_scales(encoding):
    def once() -> Quantized:
        target, mask = matrix_of()
        gram = gram_of()
        found = compensated(target * mask, mask, Quantizer(encoding, 24), gram)
        return descended(target, mask, rescaled(target, mask, found, gram), gram, 2)

    first, second = once(), once()
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scales, second.scales)
