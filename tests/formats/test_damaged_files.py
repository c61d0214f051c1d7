"""Damage without intent: a flipped bit in any region, and a file cut or lengthened anywhere, is found."""

from __future__ import annotations

import numpy as np
import pytest
from salr.formats.container import Container
from salr.formats.errors import ChecksumError, FormatError, SalrError
from salr.formats.reader import SalrFile


def flipped(golden, path, position: int, bit: int = 0):
    data = bytearray(golden.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)
    return path


def first_problem(path) -> SalrError:
    """Return what opening the file or checking all of it complains about."""
    try:
        problems = [problem for _, problem in SalrFile(path).check_all() if problem]
    except SalrError as error:
        return error
    assert problems, "the damage was not noticed"
    return problems[0]


def test_a_flipped_bit_in_any_tensor_is_found_and_named(golden, tmp_path):
    for tensor in Container(golden).tensors.values():
        middle = (tensor.begin + tensor.end) // 2
        problem = first_problem(flipped(golden, tmp_path / "bad", middle))
        assert isinstance(problem, ChecksumError)
        assert ("manifest's digest" if tensor.name == "salr.manifest" else f"tensor '{tensor.name}'") in str(problem)


def test_a_flipped_bit_anywhere_in_the_header_is_found(golden, tmp_path):
    header_end = Container(golden).data_start
    for position in [*range(0, 40), *range(40, header_end, 13), header_end - 1]:
        problem = first_problem(flipped(golden, tmp_path / "bad", position, bit=position % 8))
        assert isinstance(problem, FormatError) and str(problem).startswith(f"{tmp_path / 'bad'}: ")


def test_a_truncated_file_is_refused_wherever_it_was_cut(golden, tmp_path):
    data = golden.read_bytes()
    for length in np.linspace(0, len(data) - 1, 60, dtype=int):
        (tmp_path / "bad").write_bytes(data[:length])
        with pytest.raises(FormatError, match=r"bad: not a readable safetensors file .*truncated or damaged"):
            SalrFile(tmp_path / "bad")


@pytest.mark.parametrize("tail", [b"\0", b"x" * 64, b"\0" * 4096])
def test_trailing_bytes_are_refused(golden, tmp_path, tail):
    (tmp_path / "bad").write_bytes(golden.read_bytes() + tail)
    with pytest.raises(FormatError, match="bad: not a readable safetensors file"):
        SalrFile(tmp_path / "bad")


def test_a_damaged_module_gives_nothing_of_itself_but_the_others_stay_readable(golden, tmp_path):
    bitmap = Container(golden).tensors["layers.0.attn.q.bitmap"]
    file = SalrFile(flipped(golden, tmp_path / "bad", bitmap.begin))
    for read in (file.module, file.dense, file.slice):
        with pytest.raises(FormatError, match=r"layers.0.attn.q.bitmap"):
            read("layers.0.attn.q")
    np.testing.assert_array_equal(file.dense("layers.0.attn.k"), SalrFile(golden).dense("layers.0.attn.k"))


def test_the_full_check_names_both_the_digest_and_the_structure(golden, tmp_path):
    bitmap = Container(golden).tensors["layers.0.attn.q.bitmap"]
    file = SalrFile(flipped(golden, tmp_path / "bad", bitmap.begin))
    assert [name for name, problem in file.check_all() if problem] == ["layers.0.attn.q.bitmap", "layers.0.attn.q"]
