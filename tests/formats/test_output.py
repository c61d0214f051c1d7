"""Outputs appear under their names only when complete: files and directories, and every way to be refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from salr.formats.errors import OutputError
from salr.formats.output_directory import output_directory
from salr.formats.output_file import OutputFile
from salr.formats.partial_output import check_output

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")


def test_a_file_appears_with_commit_and_its_partial_folder_vanishes(tmp_path):
    path = tmp_path / "f"
    with OutputFile(path, 10) as output:
        output.write(5, b"world")
        output.write(0, memoryview(b"hello"))
        assert not path.exists() and (tmp_path / "f.partial").is_dir()
        output.commit()
    assert path.read_bytes() == b"helloworld" and list(tmp_path.iterdir()) == [path]


def test_an_existing_output_is_refused_unless_forced(tmp_path):
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(OutputError, match=r"f: the output exists already; give --force"):
        OutputFile(tmp_path / "f", 1)
    assert (tmp_path / "f").read_bytes() == b"old" and not (tmp_path / "f.partial").exists()
    with OutputFile(tmp_path / "f", 1, force=True) as output:
        output.write(0, b"new")
        output.commit()
    assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_replaced_file_keeps_its_permissions(tmp_path, mode):
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(mode)
    with OutputFile(tmp_path / "f", 1, force=True) as output:
        output.write(0, b"new")
        output.commit()
    assert (tmp_path / "f").stat().st_mode & 0o777 == mode


def test_a_leftover_partial_folder_is_refused_and_fresh_discards_it(tmp_path):
    partial = tmp_path / "f.partial"
    partial.mkdir()
    (partial / "data").write_bytes(b"half")
    with pytest.raises(
        OutputError, match=r"f.partial: an interrupted run left this; run its command again to go on, or give --fresh"
    ):
        OutputFile(tmp_path / "f", 1)
    assert (partial / "data").read_bytes() == b"half"
    with OutputFile(tmp_path / "f", 1, fresh=True) as output:
        output.write(0, b"x")
        output.commit()
    assert (tmp_path / "f").read_bytes() == b"x" and not partial.exists()


def test_two_writers_of_one_output_refuse_each_other(tmp_path):
    with OutputFile(tmp_path / "f", 1) as output:
        with pytest.raises(OutputError, match=r"f\.partial: another run is writing this output; wait for it"):
            OutputFile(tmp_path / "f", 1)
        output.write(0, b"x")
        output.commit()
    assert (tmp_path / "f").read_bytes() == b"x"


def test_the_lock_dies_with_its_process(tmp_path):
    code = f"""
import os, signal
from salr.formats.output_file import OutputFile
output = OutputFile({str(tmp_path / "f")!r}, 1)
print("locked", flush=True)
signal.pause()
"""
    child = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(OutputError, match="another run is writing this output"):
        OutputFile(tmp_path / "f", 1, fresh=True)
    child.kill()
    child.wait()
    with OutputFile(tmp_path / "f", 1, fresh=True) as output:
        output.write(0, b"x")
        output.commit()
    assert (tmp_path / "f").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("missing/f", "missing: no such directory; make it first"),
        ("file/f", "file: no such directory"),
        ("", "this is a directory"),
    ],
)
def test_a_place_that_cannot_hold_a_file_is_refused(tmp_path, place, words):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match=words):
        check_output(tmp_path / place, force=True)


def test_a_folder_that_nobody_may_write_to_is_refused():
    with pytest.raises(OutputError, match="/proc: cannot write here"):
        OutputFile("/proc/f.salr", 1)


@pytest.mark.parametrize("path", ["", ".", "..", "/"])
def test_the_directory_itself_is_no_name_for_an_output(tmp_path, monkeypatch, path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="this is a directory, needed a file name"):
        OutputFile(path, 1)
    with pytest.raises(OutputError, match="the output exists already"), output_directory(path):
        pass
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_a_file_where_the_partial_folder_would_be_is_named(tmp_path):
    (tmp_path / "f.partial").write_text("mine")
    with pytest.raises(OutputError, match=r"f\.partial: this is a file, needed no such name; remove it"):
        OutputFile(tmp_path / "f", 1)
    assert (tmp_path / "f.partial").read_text() == "mine"


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 5 * 10**6))
    with pytest.raises(OutputError, match="5 MB of disk space free, needed 7 MB; free some"):
        OutputFile(tmp_path / "f", 7 * 10**6)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_writing_gives_a_clear_error_and_leaves_nothing(tmp_path):
    code = f"""
import resource
from salr.formats.errors import OutputError
from salr.formats.output_file import OutputFile
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with OutputFile({str(tmp_path / "f")!r}, 9000) as output:
        output.write(0, b"x" * 9000)
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"{tmp_path / 'f'}: writing failed (File too large)") and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_directory_appears_when_its_block_ends(tmp_path):
    with output_directory(tmp_path / "d") as partial:
        (partial / "a").write_text("1")
        assert not (tmp_path / "d").exists()
    assert (tmp_path / "d" / "a").read_text() == "1" and list(tmp_path.iterdir()) == [tmp_path / "d"]


def test_a_directory_vanishes_when_its_block_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), output_directory(tmp_path / "d") as partial:
        (partial / "a").write_text("1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("there", "there: the output exists already"),
        ("busy", "busy.partial: another run"),
        ("none/d", "none: no such directory; make it first"),
        ("/proc/d", "/proc/d.partial: cannot be made"),
    ],
)
def test_a_directory_that_cannot_be_made_is_refused(tmp_path, name, words):
    (tmp_path / "there").mkdir()
    (tmp_path / "busy.partial").mkdir()
    with pytest.raises(OutputError, match=words), output_directory(tmp_path / name):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["busy.partial", "there"]
