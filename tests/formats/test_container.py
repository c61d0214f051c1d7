"""The safetensors container: planned offsets, alignment, and reading without trust or copies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file
from salr.formats.container import Container, TensorSpec, alignment_of, plan_layout
from salr.formats.errors import FormatError

METADATA = {"format": "pt"}
specs_strategy = st.lists(
    st.tuples(st.sampled_from(["U8", "I8", "BF16", "F32", "U64"]), st.lists(st.integers(0, 70), max_size=3)),
    max_size=12,
).map(lambda items: [TensorSpec(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(items)])


def write_file(path: Path, specs: list[TensorSpec], last: bytes | None = None) -> dict[str, bytes]:
    """Write random bytes where the plan puts them; return them by name."""
    rng = np.random.default_rng(0)
    contents = {spec.name: rng.bytes(spec.n_bytes) for spec in specs}
    layout = plan_layout(specs, METADATA, last=None if last is None else "last")
    header = layout.header(METADATA, len(last or b""))
    with path.open("wb") as file:
        file.write(layout.prefix() + header)
        for tensor in layout.tensors.values():
            assert file.tell() == tensor.begin
            file.write(contents[tensor.name])
        file.write(last or b"")
    return contents


@given(specs_strategy)
def test_each_tensor_starts_at_a_multiple_of_the_power_of_two_that_divides_its_size(specs):
    layout = plan_layout(specs, METADATA, last="last")
    assert layout.data_start % 64 == 0
    for tensor in layout.tensors.values():
        assert tensor.begin % alignment_of(tensor.n_bytes) == 0
        assert tensor.end - tensor.begin == tensor.n_bytes


@given(specs_strategy)
def test_tensors_follow_each_other_without_holes(specs):
    layout = plan_layout(specs, METADATA)
    position = layout.data_start
    for tensor in layout.tensors.values():
        assert tensor.begin == position
        position = tensor.end
    assert layout.last_begin == position and set(layout.tensors) == {spec.name for spec in specs}


@given(specs_strategy, st.integers(0, 2**40))
def test_the_header_always_has_its_planned_length(specs, last_bytes):
    layout = plan_layout(specs, METADATA, last="last")
    header = layout.header(METADATA, last_bytes)
    assert len(header) == layout.header_length
    assert json.loads(header)["last"]["shape"] == [last_bytes]


@pytest.mark.parametrize(("n_bytes", "expected"), [(0, 64), (1, 1), (2, 2), (24, 8), (64, 64), (96, 32), (128, 64)])
def test_alignment_is_the_power_of_two_that_divides_the_size_up_to_64(n_bytes, expected):
    assert alignment_of(n_bytes) == expected


def test_a_planned_file_opens_with_safetensors_and_gives_every_byte_back(tmp_path):
    specs = [
        TensorSpec("a", "U8", (3,)),
        TensorSpec("größe", "BF16", (4, 16)),
        TensorSpec("scalar", "F32", ()),
        TensorSpec("empty", "F32", (0, 4)),
        TensorSpec("wide", "U64", (9,)),
    ]
    contents = write_file(tmp_path / "f", specs, b"12345")
    container = Container(tmp_path / "f")
    with safe_open(tmp_path / "f", framework="np") as file:
        assert set(file.keys()) == {spec.name for spec in specs} | {"last"}
        assert file.get_tensor("wide").tobytes() == contents["wide"]
    for spec in specs:
        assert bytes(container.raw(spec.name)) == contents[spec.name]
        assert container.array(spec.name).shape == spec.shape
    assert bytes(container.raw("last")) == b"12345"


def test_opened_arrays_are_read_only_and_the_file_never_changes(tmp_path):
    save_file({"a": np.arange(4, dtype=np.float32)}, tmp_path / "f")
    before = (tmp_path / "f").read_bytes()
    array = Container(tmp_path / "f").array("a")
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    assert (tmp_path / "f").read_bytes() == before


def test_bf16_is_read_as_its_own_bits(tmp_path):
    import torch
    from safetensors.torch import save_file as save_torch

    tensor = torch.tensor([1.0, -2.5, 3.14159, 1e-40, float("inf")]).bfloat16()
    save_torch({"a": tensor}, tmp_path / "f")
    found = Container(tmp_path / "f").array("a")
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found.view(np.int16), tensor.view(torch.int16).numpy())


def test_metadata_is_optional(tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "f")
    assert Container(tmp_path / "f").metadata == {}


def test_an_unaligned_file_of_another_writer_reads_the_same(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode() + b" "
    header += b" " * (1 - len(header) % 2)
    data = len(header).to_bytes(8, "little") + header + np.array([1, 2], np.float32).tobytes()
    (tmp_path / "f").write_bytes(data)
    assert len(header) % 4 != 0
    assert Container(tmp_path / "f").array("a").tolist() == [1, 2]


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "not a readable safetensors file"),
        (b"\x05\0\0", "not a readable safetensors file"),
        (b"\xff" * 8 + b"{}", "not a readable safetensors file"),
        ((2).to_bytes(8, "little") + b"{}" + b"x", "not a readable safetensors file"),
        ((4).to_bytes(8, "little") + b"nope", "not a readable safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "not a readable safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer.*`git lfs pull`"),
    ],
    ids=["empty", "shorter than a length", "absurd length", "trailing byte", "no JSON", "a list", "LFS"],
)
def test_what_is_no_safetensors_file_is_refused_by_name(tmp_path, content, found):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(FormatError, match=found) as error:
        Container(tmp_path / "bad")
    assert str(error.value).startswith(f"{tmp_path / 'bad'}: ")


@pytest.mark.parametrize("path", ["missing", "."])
def test_a_missing_file_and_a_directory_are_no_files(tmp_path, path):
    with pytest.raises(FormatError, match="no such file"):
        Container(tmp_path / path)


def test_asking_for_a_tensor_that_is_not_there_names_it(tmp_path):
    save_file({"a": np.zeros(1, np.float32)}, tmp_path / "f")
    with pytest.raises(FormatError, match="tensor 'b': there is no such tensor"):
        Container(tmp_path / "f").raw("b")


def test_a_file_that_cannot_be_opened_is_not_called_missing(golden, monkeypatch):
    def denied(self, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(golden), "open", denied)  # permissions mean nothing to a superuser
    with pytest.raises(FormatError, match=r"golden_v1.salr: cannot be read \(Permission denied\); check the file"):
        Container(golden)
