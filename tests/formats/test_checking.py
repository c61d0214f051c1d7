"""The check of a whole file on threads: the order of its findings, and that its threads end with it."""

from __future__ import annotations

import itertools
import threading
import time

import pytest
from salr.formats import checking, validation
from salr.formats.checking import IntegrityCheck
from salr.formats.container import Container
from salr.formats.errors import ChecksumError, FormatError
from salr.formats.reader import SalrFile

Q = "layers.0.attn.q"


@pytest.fixture(autouse=True)
def threads_of_its_own(monkeypatch):
    """Give each tensor and module a call of its own and four threads; see that none is left."""
    monkeypatch.setattr(checking, "_GROUP_BYTES", 1)
    monkeypatch.setattr(checking.os, "cpu_count", lambda: 4)
    yield
    assert checking_threads() == []


def checking_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("salr-check")]


@pytest.fixture
def damaged(golden, tmp_path):
    """Return the golden file with a flipped bit in a bitmap and in a dense tensor."""
    tensors, data = Container(golden).tensors, bytearray(golden.read_bytes())
    for name in ("norm.weight", f"{Q}.bitmap"):
        data[tensors[name].begin] ^= 1
    (tmp_path / "bad.salr").write_bytes(data)
    return SalrFile(tmp_path / "bad.salr")


def test_digests_by_name_and_then_modules_are_found_whichever_thread_is_first(golden, monkeypatch):
    file, calls, digest = SalrFile(golden), itertools.count(), validation.digest

    def unevenly(data):
        time.sleep(0.002 if next(calls) % 3 else 0)
        return digest(data)

    monkeypatch.setattr(validation, "digest", unevenly)
    expected = [(name, None) for name in (*sorted(file.manifest.checksums), *file.modules)]
    assert list(file.check_all()) == expected


def test_digests_are_computed_by_several_threads_at_once(golden, monkeypatch):
    file, calls, digest = SalrFile(golden), itertools.count(), validation.digest
    meeting = threading.Barrier(4)

    def together(data):
        if next(calls) < 4:
            meeting.wait(20)
        return digest(data)

    monkeypatch.setattr(validation, "digest", together)
    assert all(problem is None for _, problem in file.check_all())


def test_every_problem_is_found_and_the_first_by_name_is_raised(damaged):
    names = [name for name, problem in damaged.check_all() if problem]
    assert names == [f"{Q}.bitmap", "norm.weight", Q]
    with IntegrityCheck(damaged) as check, pytest.raises(ChecksumError, match=rf"tensor '{Q}.bitmap': its bytes"):
        check.require_all()


def test_structure_can_be_required_by_itself(damaged, draft, tmp_path):
    with IntegrityCheck(damaged) as check, pytest.raises(FormatError, match="another number of set bits"):
        check.require_modules()
    draft.manifest["checksums"]["norm.weight"] = "0" * 32
    with IntegrityCheck(SalrFile(draft.write(tmp_path / "digest.salr"))) as check:
        check.require_modules()
        with pytest.raises(ChecksumError, match=r"norm\.weight"):
            check.require_all()


@pytest.mark.parametrize("error", [ValueError("nothing fits"), FormatError("a lie")])
def test_damage_takes_the_place_of_an_error_that_it_may_have_caused(golden, damaged, error):
    with pytest.raises(ChecksumError, match=rf"{Q}.bitmap") as raised:
        meet(damaged, error)
    assert raised.value.__context__ is error
    with pytest.raises(type(error), match=str(error)):
        meet(SalrFile(golden), error)


def meet(file, error):
    """Raise an error while a file is being checked."""
    with IntegrityCheck(file) as check, check.awaited():
        raise error


def test_an_interrupt_waits_for_no_check(damaged):
    with pytest.raises(KeyboardInterrupt):
        meet(damaged, KeyboardInterrupt())


def test_leaving_drops_what_is_not_under_way(golden, monkeypatch):
    file, seen, go_on = SalrFile(golden), [], threading.Event()

    def slowly(data):
        seen.append(data)
        assert go_on.wait(20)
        return "0" * 32

    monkeypatch.setattr(validation, "digest", slowly)
    with IntegrityCheck(file):
        while len(seen) < 4:
            go_on.wait(0.001)
        threading.Timer(0.05, go_on.set).start()
    assert len(seen) == 4 < len(file.manifest.checksums)


def test_a_check_that_is_not_read_to_its_end_leaves_no_thread(golden):
    findings = SalrFile(golden).check_all()
    next(findings)
    findings.close()
    assert checking_threads() == []


def test_a_damaged_asset_is_not_handed_out(draft, tmp_path):
    name = "assets/config.json"
    path = draft.write(tmp_path / "bad.salr")
    data = bytearray(path.read_bytes())
    data[Container(path).tensors[name].begin] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=rf"bad.salr: tensor '{name}': its bytes differ"):
        SalrFile(path).asset("config.json")
    path = draft.write(tmp_path / "sound.salr")
    assert SalrFile(path).asset("config.json") == draft.tensors[name][2]
