"""The benchmark of fine-tuning still runs, where that needs neither a GPU nor a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the benchmark trains adapters of peft")


@pytest.fixture(autouse=True)
def found(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")


def test_what_a_step_costs_the_host_is_measured_for_every_side(monkeypatch, capsys):
    from finetuning import host

    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(host, "WARM_UP", 1)
    host.run(1)
    _, _, *lines = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [line[1] for line in cells] == ["not reentrant"] * 3 + ["reentrant"] * 3
    launches = [int(line[-1]) for line in cells]
    assert launches[:3] == launches[3:] and launches[0] == 0 < min(launches[1:3])
