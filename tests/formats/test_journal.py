"""The journal: whole lines only, in order, and each after its data."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from salr.formats.errors import OutputError
from salr.formats.journal import Journal, read_journal


def test_records_come_back_in_order_and_later_ones_are_appended(tmp_path):
    for start in (0, 50):
        journal = Journal(tmp_path / "journal", lambda: None)
        assert len(journal.records) == start
        for number in range(start, start + 50):
            journal.append({"n": number})
        journal.close()
    assert [record["n"] for record in read_journal(tmp_path / "journal")[0]] == list(range(100))


@pytest.mark.parametrize("torn", [b'{"n":', b'{"n": 2}', b"\0" * 40, b"[1]\n", b"\xff\n", b'{"n": 2}\0\n{"n": 3}\n'])
def test_a_torn_line_ends_the_journal_and_is_overwritten(tmp_path, torn):
    path = tmp_path / "journal"
    path.write_bytes(b'{"n":1}\n' + torn)
    journal = Journal(path, lambda: None)
    journal.append({"n": 4})
    journal.close()
    assert path.read_bytes() == b'{"n":1}\n{"n":4}\n'


def test_a_line_is_written_only_after_the_data_was_synced(tmp_path):
    may_sync, path = threading.Event(), tmp_path / "journal"
    journal = Journal(path, may_sync.wait)
    journal.append({"n": 1})
    assert path.read_bytes() == b""
    may_sync.set()
    journal.flush()
    assert path.read_bytes() == b'{"n":1}\n'
    journal.close()


def test_a_failing_disk_is_told_to_whoever_appends_flushes_or_closes(tmp_path, monkeypatch):
    def full():
        raise OutputError("writing failed (No space left on device)", path="out.salr")

    for sync, fdatasync in ((full, os.fdatasync), (lambda: None, failing)):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fdatasync)
            journal = Journal(tmp_path / "journal", sync)
            journal.append({"n": 1})
            for use in (journal.flush, lambda journal=journal: journal.append({"n": 2}), journal.close):
                with pytest.raises(OutputError, match="writing failed"):
                    use()


def failing(handle):
    raise OSError(errno.EIO, "Input/output error")


def test_a_journal_that_cannot_be_read_is_an_error(tmp_path):
    (tmp_path / "journal").mkdir()
    with pytest.raises(OutputError, match="journal: cannot be read"):
        read_journal(tmp_path / "journal")
