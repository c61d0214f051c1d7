"""salr bench: every figure is there; which is larger is the machine's business."""

from __future__ import annotations

import json

import pytest

from salr.runtime import benchmark
from salr.runtime.benchmark import BenchOptions, BenchResult, Speed

QUICK = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1)


def test_one_file_gives_a_line_a_batch(salr, speaker):
    result = salr("bench", speaker, "--batch", 1, "--batch", 3, *QUICK)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{speaker} (") and "of memory" in lines[0]
    assert [line.split()[0] for line in lines[2:]] == ["batch", "1", "3"]
    assert all(float(cell) > 0 for line in lines[3:] for cell in line.split())


def test_against_dense_there_are_ratios_and_a_verdict(salr, speaker, llama):
    result = salr("bench", speaker, "--against", llama, "--batch", 1, "--batch", 2, *QUICK)
    lines = result.stdout.splitlines()
    assert lines[1].startswith(f"{llama} (torch)   loaded in ")
    assert [line.count("x") for line in lines[4:6]] == [2, 2]
    assert lines[6].startswith(("dense writes faster from batch ", "packed writes faster at every batch up to 2"))


def test_json_has_every_figure(salr, speaker):
    found = json.loads(salr("bench", speaker, "--json", "--batch", 2, *QUICK).stdout)
    (result,) = found["results"]
    assert found["crossover"] is None and result["speeds"][0]["batch"] == 2
    assert result["speeds"][0]["tokens_per_second"] > 0 and result["first_call_seconds"] > 0


@pytest.mark.parametrize("border", [1, 2, 5, 8, 19, 32])
def test_the_crossover_is_found_between_the_measured_batches(border, monkeypatch):
    def measure(model, batch, options):
        return Speed(batch, 1.0, 10.0 + (model == "dense") * (1 if batch >= border else -1))

    monkeypatch.setattr(benchmark, "measure", measure)
    options = BenchOptions()
    results = tuple(
        BenchResult(model, "", 0, 0, None, tuple(measure(model, batch, options) for batch in options.batches))
        for model in ("packed", "dense")
    )
    assert benchmark._crossover(["packed", "dense"], results, options) == border


def test_there_is_no_crossover_where_packed_always_wins():
    results = tuple(
        BenchResult("m", "", 0, 0, None, (Speed(1, 1.0, speed), Speed(8, 1.0, speed))) for speed in (2.0, 1.0)
    )
    assert benchmark._crossover([None, None], results, BenchOptions((1, 8))) is None


def test_a_batch_beyond_the_memory_is_one_line(fails, speaker, monkeypatch):
    monkeypatch.setattr(benchmark, "_MOST_SEQUENCES", 10**13)  # more bytes than an address space has
    line = fails("bench", speaker, "--batch", 10**13, *QUICK)
    assert f"{10**13} sequences do not fit in the memory of cpu; give a smaller --batch" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", 0), "--batch (0,), needed positive numbers"),
        (("--batch", 10**30), f"--batch {10**30}, needed at most"),
        (("--new-tokens", 0), "--new-tokens 0, needed 1 or more"),
        (("--prompt-tokens", 63, "--new-tokens", 9), "72 tokens a sequence, needed at most 64"),
        (("--against", "/nowhere", *QUICK), "no model directory, needed the dense model"),
    ],
)
def test_what_cannot_be_measured_is_one_line(fails, speaker, options, message):
    assert message in fails("bench", speaker, *options)
