"""The benchmark of fine-tuning still runs, where that needs neither a GPU nor a model."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
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


class Processes:
    """In the place of a context of multiprocessing: notes on which GPUs processes would begin."""

    Queue = SimpleNamespace

    def __init__(self):
        self.seen = []

    def Process(self, **_):
        return SimpleNamespace(pid=len(self.seen), start=lambda: self.seen.append(os.environ.get(VISIBLE)))


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [([], "3", ["3", "3", "3"]), ([], None, [None] * 3), (["1", "2"], "3", ["1", "2", "1"]), (["5"], None, ["5"] * 3)],
)
def test_workers_see_the_gpus_that_were_asked_for_and_else_what_the_caller_sees(monkeypatch, gpus, visible, expected):
    from finetuning.workers import Crew

    if visible is None:
        monkeypatch.delenv(VISIBLE, raising=False)
    else:
        monkeypatch.setenv(VISIBLE, visible)
    crew, processes = Crew(None, None, (), 3, gpus, 0.0), Processes()
    for _ in range(3):
        crew.hire(processes, None)
    assert processes.seen == expected and os.environ.get(VISIBLE) == visible
