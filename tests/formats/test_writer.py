"""The writer: digests as they go, the same bytes in any order and from any thread, nothing left unless finished."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from salr.formats.container import TensorSpec
from salr.formats.errors import OutputError
from salr.formats.manifest import Manifest
from salr.formats.reader import SalrFile
from salr.formats.writer import SalrWriter

ARRAYS = {
    "a": ("F32", np.arange(48, dtype=np.float32).reshape(3, 16)),
    "b": ("U8", np.arange(5, dtype=np.uint8)),
    "c": ("BF16", np.arange(64, dtype=np.uint16)),
    "scalar": ("I64", np.array(-3, np.int64)),
    "empty": ("F16", np.zeros((0, 3), np.float16)),
}
SPECS = [TensorSpec(name, dtype, array.shape) for name, (dtype, array) in ARRAYS.items()]
MANIFEST = Manifest(generator="test", modules={}, checksums={})


def write(path, order=tuple(ARRAYS), *, finish=True, **options):
    with SalrWriter(path, SPECS, **options) as writer:
        for name in order:
            writer.write(name, ARRAYS[name][1])
        if finish:
            return writer.finish(MANIFEST)
    return 0


def test_what_was_written_is_read_back_with_sound_digests(tmp_path):
    size = write(tmp_path / "f.salr")
    file = SalrFile(tmp_path / "f.salr")
    assert size == file.n_bytes == (tmp_path / "f.salr").stat().st_size
    assert [problem for _, problem in file.check_all() if problem] == []
    for name, (dtype, array) in ARRAYS.items():
        assert file.tensors[name].dtype == dtype
        np.testing.assert_array_equal(file.tensor(name), array)
        assert file.manifest.checksums[name] == xxhash.xxh3_128(array.tobytes()).hexdigest()


def test_the_file_opens_with_safetensors_and_the_manifest_is_last(tmp_path):
    write(tmp_path / "f.salr")
    with safe_open(tmp_path / "f.salr", framework="np") as file:
        assert file.metadata()["format"] == "pt" and file.metadata()["salr_version"] == "1"
        np.testing.assert_array_equal(file.get_tensor("a"), ARRAYS["a"][1])
    file = SalrFile(tmp_path / "f.salr")
    assert max(file.tensors.values(), key=lambda tensor: tensor.end).name == "salr.manifest"
    assert all(file.tensors[name].begin % 64 == 0 for name in ("a", "c"))


def test_the_order_of_writing_never_changes_the_bytes(tmp_path):
    files = []
    for index, order in enumerate(itertools.islice(itertools.permutations(ARRAYS), 0, 120, 17)):
        write(tmp_path / f"{index}.salr", order)
        files.append((tmp_path / f"{index}.salr").read_bytes())
    assert len(files) == 8 and len(set(files)) == 1


def test_pieces_and_threads_give_the_same_bytes_as_whole_tensors(tmp_path):
    write(tmp_path / "whole.salr")
    with SalrWriter(tmp_path / "pieces.salr", SPECS) as writer, ThreadPoolExecutor(4) as pool:
        for name, (_, array) in ARRAYS.items():
            raw = array.tobytes()
            pool.submit(writer.write_pieces, name, [raw[i : i + 7] for i in range(0, len(raw), 7)]).result()
        writer.finish(MANIFEST)
    assert (tmp_path / "pieces.salr").read_bytes() == (tmp_path / "whole.salr").read_bytes()


def test_nothing_is_left_unless_finished(tmp_path):
    write(tmp_path / "f.salr", finish=False)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_the_block_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), SalrWriter(tmp_path / "f.salr", SPECS):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_finishing_without_a_planned_tensor_names_it_and_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match=r"f.salr: tensor 'scalar': a planned tensor was never written"):
        write(tmp_path / "f.salr", ("a", "b", "c", "empty"))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_of_another_size_than_planned_is_refused(tmp_path):
    needed = "tensor 'a': 4 bytes were produced, needed 192"
    with pytest.raises(OutputError, match=needed), SalrWriter(tmp_path / "f.salr", SPECS) as writer:
        writer.write("a", np.zeros(1, np.float32))
    assert list(tmp_path.iterdir()) == []


def test_force_keeps_the_old_file_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "f.salr"
    path.write_bytes(b"old")
    write(path, finish=False, force=True)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    write(path, force=True)
    assert SalrFile(path).tensor("scalar") == -3
