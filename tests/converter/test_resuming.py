"""Interrupted conversions: nothing opens before it is complete, and the same command goes on to the same bytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from salr.converter.execution.jobs import Job
from salr.converter.execution.packers import DevicePacker
from salr.converter.execution.spool import HiddenSpool
from salr.converter.options import CalibrationOptions
from salr.formats.errors import InputLostError, OutputError, SalrError, SourceError
from salr.formats.output_file import DataFile

import salr

ROOT = Path(__file__).parents[2]
MAGNITUDE = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude", workers=2)
UNTIL = "layers.1.mlp"


class Stopped(Exception):
    pass


@pytest.fixture
def stopped(monkeypatch):
    """Return a function that converts until the first module named ``UNTIL...`` and then fails with ``error``."""

    def run(source, out, options, error=Stopped):
        with monkeypatch.context() as patch:
            original = DevicePacker.matrices

            def matrices(self, module, *arguments):
                if UNTIL in module.name:
                    raise error() if error is Stopped else error("stopped")
                return original(self, module, *arguments)

            patch.setattr(DevicePacker, "matrices", matrices)
            with pytest.raises(error):
                salr.convert(source, out, options)

    return run


def note_of(report) -> int:
    """Return how many modules an interrupted run had left, as the report's note says."""
    notes = [note for note in report.notes if note.startswith("Went on with")]
    return int(notes[0].split()[3]) if notes else 0


OPTIONS = {
    "magnitude": MAGNITUDE,
    "shards": dataclasses.replace(MAGNITUDE, max_shard_size=40_000),
    "random tokens": salr.ConvertOptions(
        salr.ModuleOptions(0.5, 4), rounds=3, workers=2, calibration=CalibrationOptions("synthetic", 3, 24)
    ),
    "joint": salr.ConvertOptions(
        salr.ModuleOptions(0.5, 4), rounds=3, method="joint", calibration=CalibrationOptions("synthetic", 3, 24)
    ),
    "target bits": salr.ConvertOptions(
        method="magnitude", target_bits=11.5, module=salr.ModuleOptions(values="bf16"), workers=1
    ),
}


def bytes_of(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in ([out] if out.is_file() else sorted(out.iterdir()))}


@pytest.mark.parametrize("kind", OPTIONS)
def test_the_same_command_goes_on_and_gives_the_same_bytes(llama, tmp_path, stopped, kind):
    (tmp_path / "whole").mkdir()
    salr.convert(llama, tmp_path / "whole" / "m.salr", OPTIONS[kind])
    out = tmp_path / "m.salr"
    stopped(llama, out, OPTIONS[kind])
    assert not out.exists() and (tmp_path / "m.salr.partial").is_dir()
    report = salr.convert(llama, out, OPTIONS[kind])
    assert 0 < note_of(report) < 14
    assert bytes_of(out) == bytes_of(tmp_path / "whole" / "m.salr")
    assert not (tmp_path / "m.salr.partial").exists()


def test_a_calibrated_run_goes_on_at_the_block_it_was_in(llama, tmp_path, stopped, monkeypatch):
    out, loaded = tmp_path / "m.salr", []
    stopped(llama, out, OPTIONS["joint"])
    original = HiddenSpool.load
    monkeypatch.setattr(
        HiddenSpool, "load", lambda self, note, device: loaded.append(note["block"]) or original(self, note, device)
    )
    assert note_of(salr.convert(llama, out, OPTIONS["joint"])) == 7 and loaded == [1]


def test_damaged_hidden_states_are_not_trusted(llama, tmp_path, stopped):
    out = tmp_path / "m.salr"
    salr.convert(llama, tmp_path / "whole.salr", OPTIONS["joint"])
    stopped(llama, out, OPTIONS["joint"])
    hidden = tmp_path / "m.salr.partial" / "hidden-1"
    data = bytearray(hidden.read_bytes())
    data[100] ^= 1
    hidden.write_bytes(data)
    assert note_of(salr.convert(llama, out, OPTIONS["joint"])) == 0
    assert out.read_bytes() == (tmp_path / "whole.salr").read_bytes()


def test_a_tensor_that_was_damaged_meanwhile_and_a_torn_line_are_made_again(llama, packed, tmp_path, stopped):
    out, partial = tmp_path / "m.salr", tmp_path / "m.salr.partial"
    stopped(llama, out, MAGNITUDE)
    lines = (partial / "journal").read_bytes().splitlines(keepends=True)
    n_modules = sum('"module"' in line.decode() for line in lines)
    data = bytearray((partial / "data").read_bytes())
    middle = next(i for i in range(len(data) // 3, len(data)) if data[i])
    data[middle] ^= 4
    (partial / "data").write_bytes(data)
    (partial / "journal").write_bytes(b"".join(lines) + b'{"tensors":{"model.nor')
    assert note_of(salr.convert(llama, out, MAGNITUDE)) in (n_modules - 1, n_modules)
    assert out.read_bytes() == packed.read_bytes()


def test_nothing_is_packed_or_hashed_again(llama, tmp_path, stopped, monkeypatch):
    out, packed_again = tmp_path / "m.salr", []
    stopped(llama, out, MAGNITUDE)
    notes = [json.loads(line).get("note") or {} for line in (tmp_path / "m.salr.partial/journal").open()]
    stood = {note["module"] for note in notes if "module" in note}
    original = DevicePacker.matrices
    monkeypatch.setattr(
        DevicePacker,
        "matrices",
        lambda self, module, *a: packed_again.append(module.name) or original(self, module, *a),
    )
    monkeypatch.setattr("salr.converter.pipeline.sha256", lambda path: pytest.fail(f"{path} is hashed again"))
    assert len(stood) == note_of(salr.convert(llama, out, MAGNITUDE)) > 0
    assert sorted([*packed_again, *stood]) == sorted(salr.open(out).modules)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"module": salr.ModuleOptions(0.6, 8)}, r"another options.sparsity left this \(then 0.5, now 0.6\)"),
        ({"max_shard_size": 50_000}, "another options.max_shard_size"),
        ({"adapters": ()}, None),
        ({"workers": 1}, None),
    ],
)
def test_other_options_are_refused_with_the_reason_and_fresh_starts_over(llama, tmp_path, stopped, change, words):
    out = tmp_path / "m.salr"
    stopped(llama, out, MAGNITUDE)
    options = dataclasses.replace(MAGNITUDE, **change)
    if words is not None:
        with pytest.raises(OutputError, match=words + ".*run its command again to go on, or give --fresh"):
            salr.convert(llama, out, options)
        options = dataclasses.replace(options, fresh=True)
    report = salr.convert(llama, out, options)
    assert (note_of(report) == 0) == (words is not None) and out.exists()


def test_another_input_is_refused(llama, tmp_path, stopped):
    source = shutil.copytree(llama, tmp_path / "source")
    stopped(source, tmp_path / "m.salr", MAGNITUDE)
    os.utime(source / "model.safetensors", (1, 1))
    with pytest.raises(OutputError, match=r"another inputs.model.safetensors left this"):
        salr.convert(source, tmp_path / "m.salr", MAGNITUDE)


def test_other_versions_are_refused(llama, tmp_path, stopped, monkeypatch):
    stopped(llama, tmp_path / "m.salr", MAGNITUDE)
    monkeypatch.setattr("salr.converter.execution.fingerprint.VERSION", "9.9")
    with pytest.raises(OutputError, match=r"another environment.salr left this \(then '0.1.0', now '9.9'\)"):
        salr.convert(llama, tmp_path / "m.salr", MAGNITUDE)


def test_bad_input_leaves_nothing(llama, tmp_path, stopped):
    stopped(llama, tmp_path / "m.salr", MAGNITUDE, SourceError)
    assert list(tmp_path.iterdir()) == []


def test_two_conversions_to_one_output_refuse_each_other(llama, packed, tmp_path, monkeypatch):
    out, refused = tmp_path / "m.salr", []
    original = DevicePacker.matrices

    def matrices(self, module, *arguments):
        if not refused:
            with pytest.raises(OutputError, match=r"m.salr.partial: another run is writing this output") as error:
                salr.convert(llama, out, MAGNITUDE)
            refused.append(error)
        return original(self, module, *arguments)

    monkeypatch.setattr(DevicePacker, "matrices", matrices)
    salr.convert(llama, out, dataclasses.replace(MAGNITUDE, workers=1))
    assert refused and out.read_bytes() == packed.read_bytes()


@pytest.mark.parametrize("what", ["vanishes", "is cut short", "is replaced"])
def test_an_input_that_is_lost_midway_is_named_and_the_run_goes_on_when_it_is_back(llama, tmp_path, monkeypatch, what):
    source, out = shutil.copytree(llama, tmp_path / "source"), tmp_path / "m.salr"
    weights, aside = source / "model.safetensors", tmp_path / "aside"
    with monkeypatch.context() as patch:
        patch.setattr("salr.converter.execution.fingerprint._INTERVAL_S", 0.0)
        original = Job._record

        def record(self, module, *arguments):
            entry = original(self, module, *arguments)
            self._writer.flush()
            if weights.exists() and not aside.exists():
                weights.rename(aside)
                if what != "vanishes":
                    data = aside.read_bytes()
                    weights.write_bytes(data[: len(data) // 2] if what == "is cut short" else data)
            return entry

        patch.setattr(Job, "_record", record)
        with pytest.raises(
            InputLostError, match=r"model.safetensors: (cannot be read any more|was changed).*same command"
        ):
            salr.convert(source, out, dataclasses.replace(MAGNITUDE, workers=1))
    assert not out.exists()
    aside.rename(weights)
    assert note_of(salr.convert(source, out, MAGNITUDE)) >= 1
    assert [problem for _, problem in salr.open(out).check_all() if problem] == []


def test_a_full_disk_is_a_clear_error_and_the_run_goes_on_when_there_is_room(llama, packed, tmp_path, monkeypatch):
    import errno

    out, written = tmp_path / "m.salr", []
    with monkeypatch.context() as patch:
        original = os.pwrite

        def pwrite(handle, data, position):
            written.append(len(data))
            if sum(written) > 60_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(handle, data, position)

        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(OutputError, match=r"m.salr: writing failed \(No space left on device\); free disk space"):
            salr.convert(llama, out, MAGNITUDE)
    assert note_of(salr.convert(llama, out, MAGNITUDE)) >= 1
    assert out.read_bytes() == packed.read_bytes()


def test_lines_follow_their_bytes_to_the_disk(llama, tmp_path, monkeypatch):
    """Every journal write is preceded by a sync of the data that comes after the bytes it speaks of."""
    from salr.formats.journal import Journal

    order = []
    sync, append = DataFile.sync, Journal._append

    def noted(self, records):
        order.append("append")
        append(self, records)

    monkeypatch.setattr(DataFile, "sync", lambda self: order.append("sync") or sync(self))
    monkeypatch.setattr(Journal, "_append", noted)
    salr.convert(llama, tmp_path / "m.salr", MAGNITUDE)
    assert order.count("append") >= 2 and order[:2] == ["append", "sync"]
    assert all(a != b for a, b in itertools.pairwise(order))


# --- kill -9 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slower(tmp_path_factory):
    """Return a checkpoint that takes a while: 36 linears of 256 x 512 in 6 blocks, and how to convert it."""
    folder = tmp_path_factory.mktemp("slower") / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"blocks.{block}.{name}.weight": torch.randn(256, 512, generator=generator).bfloat16()
        for block in range(6)
        for name in ("a", "b", "c", "d", "e", "f")
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}")
    return folder


def command(source: Path, out: Path) -> list[str]:
    options = ("--rank", "8", "--rounds", "6", "--calibration", "none", "--workers", "2", "--quiet")
    return [sys.executable, "cli.py", "convert", str(source), str(out), *options]


def kill_at_random_moments(source: Path, folder: Path, n_kills: int) -> None:
    whole, out, rng = folder / "whole.salr", folder / "m.salr", random.Random(7)
    subprocess.run(command(source, whole), cwd=ROOT, check=True)
    n_killed = 0
    while n_killed < n_kills:
        until, delay = lines_of(out) + rng.randint(0, 8), rng.random() * 0.05
        child = subprocess.Popen(command(source, out), cwd=ROOT, start_new_session=True)
        while child.poll() is None and lines_of(out) < until:
            time.sleep(0.002)
        time.sleep(delay)
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        n_killed += child.wait() == -signal.SIGKILL
        if out.exists():  # it was faster than the killing
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
        else:
            with pytest.raises(SalrError):
                salr.open(folder / "m.salr.partial" / "data")
    subprocess.run(command(source, out), cwd=ROOT, check=True)
    assert out.read_bytes() == whole.read_bytes() and not (folder / "m.salr.partial").exists()


def lines_of(out: Path) -> int:
    journal = Path(f"{out}.partial") / "journal"
    return journal.read_bytes().count(b'"module"') if journal.exists() else 0


def test_3_kills_at_random_moments_end_in_the_same_bytes(slower, tmp_path):
    kill_at_random_moments(slower, tmp_path, 3)


@pytest.mark.fuzz
def test_30_kills_at_random_moments_end_in_the_same_bytes(slower, tmp_path):
    kill_at_random_moments(slower, tmp_path, 30)
