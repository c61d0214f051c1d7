"""`--target-bits`: the budget is kept, and the choice is never worse than one sparsity and rank for all."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from salr.converter.calibration.budget import allocate
from salr.converter.calibration.candidates import Candidate
from salr.converter.pipeline import plan_conversion
from salr.converter.report import size_report
from salr.converter.verification import compare_with_source
from salr.formats.errors import OptionError

import salr


@st.composite
def curves(draw):
    """Draw modules whose error falls with bits, by any amount, at least one candidate a sparsity and rank."""
    found = {}
    for number in range(draw(st.integers(1, 4))):
        size, scale = draw(st.integers(1, 50)), draw(st.floats(1e-3, 1))
        noise = draw(st.lists(st.floats(0, 1), min_size=6, max_size=6))
        options = []
        for index, (sparsity, rank) in enumerate(itertools.product((0.0, 0.5, 0.8), (0, 8))):
            if sparsity or not rank:
                bits = size * (16 * (1 - sparsity) + (2 if sparsity else 0) + rank / 4)
                options.append(Candidate(sparsity, rank, bits, 0.0 if not sparsity else scale * noise[index]))
        found[f"m{number}"] = options
    return found


def size_of(chosen) -> float:
    return sum(candidate.n_bits for candidate in chosen.values())


def uniform_choices(modules):
    for sparsity, rank in itertools.product((0.0, 0.5, 0.8), (0, 8)):
        choice = {
            name: max((c for c in options if c.sparsity == sparsity and c.rank <= rank), key=lambda c: c.rank)
            for name, options in modules.items()
            if any(c.sparsity == sparsity for c in options)
        }
        if len(choice) == len(modules):
            yield choice


@given(curves(), st.floats(0, 1.2))
def test_the_budget_is_kept_and_no_uniform_choice_is_better(modules, share):
    smallest = sum(min(c.n_bits for c in options) for options in modules.values())
    largest = sum(max(c.n_bits for c in options) for options in modules.values())
    budget = smallest + share * (largest - smallest)
    allocation = allocate(modules, budget)
    assert set(allocation.chosen) == set(modules)
    assert all(allocation.chosen[name] in modules[name] for name in modules)
    assert size_of(allocation.chosen) <= budget * (1 + 1e-12)
    assert allocation.objective == pytest.approx(sum(c.error for c in allocation.chosen.values()))
    assert allocation.objective <= allocation.uniform_objective
    for choice in uniform_choices(modules):
        if size_of(choice) <= budget:
            assert allocation.objective <= sum(c.error for c in choice.values()) + 1e-12


@given(curves())
def test_a_budget_for_everything_leaves_no_error(modules):
    largest = sum(max(c.n_bits for c in options) for options in modules.values())
    assert allocate(modules, largest).objective == 0


def test_a_sensitive_module_gets_the_bits():
    grid = [(0.0, 16.0), (0.5, 10.0), (0.8, 5.2)]
    modules = {
        name: [Candidate(sparsity, 0, bits, sparsity * weight) for sparsity, bits in grid]
        for name, weight in (("deaf", 0.01), ("keen", 1.0))
    }
    chosen = allocate(modules, 22.0).chosen
    assert (chosen["keen"].sparsity, chosen["deaf"].sparsity) == (0.0, 0.8)


def test_where_a_uniform_choice_is_better_than_what_multiplier_and_rest_find_it_is_taken():
    points = {"a": [(9, 0), (8, 1), (7, 11)], "b": [(10, 0), (6, 2), (2, 5)]}
    modules = {
        name: [Candidate(sparsity, 0, bits, error) for sparsity, (bits, error) in zip((0.0, 0.5, 0.8), p, strict=True)]
        for name, p in points.items()
    }
    allocation = allocate(modules, 14.0)
    assert allocation.objective == allocation.uniform_objective == 3
    assert {candidate.sparsity for candidate in allocation.chosen.values()} == {0.5}


def test_a_budget_below_the_smallest_is_refused():
    with pytest.raises(OptionError, match="--target-bits"):
        allocate({"m": [Candidate(0.8, 0, 100.0, 0.5), Candidate(0.5, 0, 200.0, 0.2)]}, 99.0)


@pytest.mark.parametrize("method", ["magnitude", "joint"])
@pytest.mark.parametrize("target", [7.0, 11.0])
def test_a_converted_file_keeps_its_budget_and_agrees_with_its_source(calibration, llama, tmp_path, method, target):
    data = None if method == "magnitude" else calibration()
    options = salr.ConvertOptions(method=method, rounds=3, calibration=data, target_bits=target)
    salr.convert(llama, tmp_path / "m.salr", options)
    file = salr.open(tmp_path / "m.salr")
    bits = size_report(file).bits_per_weight
    # padding of values is not in the budget: at most 128 bytes a module
    slack = 8 * 128 * len(file.modules) / size_report(file).packed_weights
    assert target - 2 < bits <= target + slack
    assert len({(round(1 - e.nnz / e.n_weights, 2), e.adapters[:1]) for e in file.modules.values()}) > 1
    recorded = file.manifest.options
    assert recorded["target_bits"] == target and len(recorded["set"]) == len(file.modules)
    assert [str(problem) for _, problem in compare_with_source(file, llama) if problem] == []


def test_a_target_that_no_choice_reaches_is_refused_before_anything_is_written(llama, tmp_path):
    options = salr.ConvertOptions(method="magnitude", target_bits=1.0)
    with pytest.raises(OptionError, match="--target-bits is below what the smallest choice takes"):
        salr.convert(llama, tmp_path / "m.salr", options)
    assert list(tmp_path.iterdir()) == []


def test_planning_twice_chooses_the_same(llama):
    options = salr.ConvertOptions(method="magnitude", target_bits=9.0)
    first, second = (plan_conversion(llama, options).options.overrides for _ in range(2))
    assert first == second and len(first) == 14


@pytest.mark.parametrize("target", [float("nan"), float("inf"), -3.0, 0, "8"])
def test_a_target_that_is_no_positive_number_is_refused(llama, tmp_path, target):
    with pytest.raises(OptionError, match="target-bits"):
        salr.convert(llama, tmp_path / "m.salr", salr.ConvertOptions(method="magnitude", target_bits=target))
    assert list(tmp_path.iterdir()) == []


def test_trained_adapters_count_too(llama32, lora, tmp_path):
    options = salr.ConvertOptions(method="magnitude", adapters=(("a", lora),), target_bits=16.0)
    salr.convert(llama32, tmp_path / "m.salr", options)
    sizes = size_report(salr.open(tmp_path / "m.salr"))
    slack = 8 * 128 * 14 / sizes.packed_weights
    assert sizes.adapter_bytes and sizes.bits_per_weight <= 16.0 + slack


def test_without_data_asked_for_a_model_that_cannot_be_run_is_budgeted_by_weights_alone(moe, tmp_path):
    report = salr.convert(moe, tmp_path / "m.salr", salr.ConvertOptions(rounds=2, target_bits=20.0))
    assert any("by weights alone" in note for note in report.notes)
    assert [str(problem) for _, problem in compare_with_source(salr.open(tmp_path / "m.salr"), moe) if problem] == []
