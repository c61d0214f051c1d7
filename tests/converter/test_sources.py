"""Checkpoints on disk: one file, shards, or .bin give the same modules; what is broken is named before any output."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from salr.converter.sources.checkpoint import Checkpoint, sha256
from salr.formats.errors import SourceError

import salr

OPTIONS = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude")
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@pytest.fixture
def source(llama, tmp_path):
    """Return a copy of the tiny Llama, to be damaged."""
    return shutil.copytree(llama, tmp_path / "source")


@pytest.fixture
def sharded(source):
    """Return the copy in two shards with an index."""
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[:9], names[9:]), 1):
        file = f"model-0000{index}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, source / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return source


def to_bin(source, **more):
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(tensors | more, source / "pytorch_model.bin")
    return source


def refused(source, tmp_path, *words):
    """Convert; expect a SourceError with ``words`` and no output."""
    with pytest.raises(SourceError) as error:
        salr.convert(source, tmp_path / "out.salr", OPTIONS)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (tmp_path / "out.salr").exists() and not (tmp_path / "out.salr.partial").exists()


def same_tensors(packed, other):
    first, second = salr.open(packed), salr.open(other)
    assert set(first.tensors) == set(second.tensors)
    for name in first.tensors:
        assert name == "salr.manifest" or first.raw(name) == second.raw(name)
    assert first.modules == second.modules


def test_shards_give_the_same_tensors_as_one_file(sharded, packed, tmp_path):
    salr.convert(sharded, tmp_path / "out.salr", OPTIONS)
    same_tensors(packed, tmp_path / "out.salr")
    files = {line.file for line in salr.open(tmp_path / "out.salr").manifest.ledger}
    assert files == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}


def test_a_bin_file_gives_the_same_tensors(source, packed, tmp_path):
    salr.convert(to_bin(source), tmp_path / "out.salr", OPTIONS)
    same_tensors(packed, tmp_path / "out.salr")


def test_safetensors_are_preferred_to_bin(source, packed, tmp_path):
    torch.save({"junk": torch.zeros(1)}, source / "pytorch_model.bin")
    salr.convert(source, tmp_path / "out.salr", OPTIONS)
    same_tensors(packed, tmp_path / "out.salr")


def test_tensors_of_every_dtype_and_shape_are_carried_along(source, tmp_path):
    extra = {
        "flag": torch.tensor([True, False]), "step": torch.tensor(7), "empty": torch.zeros(0, 3),
        "half": torch.ones(3).half(), "eight": torch.ones(4).to(torch.float8_e4m3fn), "double": torch.ones(1).double(),
    }  # fmt: skip
    save_file(load_file(source / "model.safetensors") | extra, source / "model.safetensors")
    salr.convert(source, tmp_path / "out.salr", OPTIONS)
    file = salr.open(tmp_path / "out.salr")
    assert {file.tensors[name].dtype for name in extra} == {"BOOL", "I64", "F32", "F16", "F8_E4M3", "F64"}
    assert (
        file.tensor("step") == 7
        and file.tensor("empty").shape == (0, 3)
        and file.tensor("flag").tolist() == [True, False]
    )
    assert [problem for _, problem in file.check_all() if problem] == []


def test_an_empty_file_among_the_assets_is_carried_along(source, tmp_path):
    (source / "NOTICE").write_bytes(b"")
    salr.convert(source, tmp_path / "out.salr", OPTIONS)
    assert salr.open(tmp_path / "out.salr").asset("NOTICE") == b""


def test_an_index_and_training_leftovers_are_no_assets(sharded, tmp_path):
    (sharded / "trainer_state.json").write_text("{}")
    names = {path.name for path in Checkpoint(sharded).assets()}
    assert "config.json" in names and not names & {"trainer_state.json", "model.safetensors.index.json"}


def test_a_missing_directory_is_named(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, f"{tmp_path / 'nowhere'}: no such directory")


def test_a_file_in_place_of_a_directory_is_named(tmp_path):
    (tmp_path / "notes").write_bytes(b"")
    refused(tmp_path / "notes", tmp_path, "notes: a file, needed a Hugging Face model directory")
    (tmp_path / "m.salr").write_bytes(b"")
    refused(tmp_path / "m.salr", tmp_path, "m.salr: is a .salr file already", "salr unpack")


def test_a_missing_config_is_named(source, tmp_path):
    (source / "config.json").unlink()
    refused(
        source, tmp_path, "config.json: cannot be read (No such file or directory)", "every model directory has one"
    )


@pytest.mark.parametrize("text", ["{", "", "\ud83d", "[" * 100_000], ids=["cut", "empty", "not UTF-8", "deep"])
def test_a_config_that_is_no_json_is_named(source, tmp_path, text):
    (source / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    refused(source, tmp_path, "config.json: ", "JSON")


def test_a_config_that_is_no_object_is_named(source, tmp_path):
    (source / "config.json").write_text("[1]")
    refused(source, tmp_path, "config.json: holds a list, needed a JSON object")


def test_a_directory_without_weights_is_named(source, tmp_path):
    (source / "model.safetensors").unlink()
    refused(source, tmp_path, "there are no weights here", "needed model.safetensors")


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(sharded, tmp_path, length):
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:length])
    refused(
        sharded, tmp_path, f"{shard}: not a readable safetensors file", "download or save this checkpoint file again"
    )


def test_an_index_that_names_a_missing_shard_is_refused(sharded, tmp_path):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refused(sharded, tmp_path, "index.json: names shard 'model-00002-of-00002.safetensors', which is not there")


def test_an_index_that_leaves_its_directory_is_refused(sharded, tmp_path):
    index = sharded / "model.safetensors.index.json"
    shutil.move(sharded / "model-00002-of-00002.safetensors", tmp_path / "other.safetensors")
    index.write_text(index.read_text().replace("model-00002-of-00002.safetensors", "../other.safetensors"))
    refused(sharded, tmp_path, "names shard '../other.safetensors', which is not there")


def test_an_index_that_names_a_tensor_its_shards_lack_is_refused(sharded, tmp_path):
    shard = sharded / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, shard)
    refused(sharded, tmp_path, "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', "nonsense", "[]"])
def test_an_index_without_a_weight_map_is_refused(sharded, tmp_path, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, tmp_path, "model.safetensors.index.json: ")


def test_one_tensor_in_two_shards_is_refused(sharded, tmp_path):
    second = sharded / "model-00002-of-00002.safetensors"
    name = "model.embed_tokens.weight"
    save_file(load_file(second) | {name: torch.zeros(2)}, second)
    refused(sharded, tmp_path, f"tensor '{name}': stands in model-00001", "and in model-00002")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scope", ["layer", "row", "global"])
def test_nan_and_infinity_in_a_weight_are_named(source, tmp_path, value, scope):
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SourceError, match=rf"source: tensor '{name}': holds NaN or infinity"):
        salr.convert(source, tmp_path / "out.salr", salr.ConvertOptions(scope=scope, method="magnitude"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_weight_with_one_dimension_is_refused(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].reshape(-1)}, source / "model.safetensors")
    refused(source, tmp_path, f"tensor '{name}': shape [4096], needed [64, 64]")


def test_a_weight_of_8_bit_floats_is_refused_with_a_way_out(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, source / "model.safetensors")
    refused(
        source, tmp_path, f"tensor '{name}': F8_E4M3 [64, 64]", "needed BF16, F16 or F32", "--exclude model.layers.0"
    )


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.up_proj.bitmap",
        "model.layers.0.mlp.up_proj.lora_A.residual",
        "salr.manifest",
        "assets/config.json",
        "assets/new.txt",
    ],
)
def test_a_tensor_whose_name_the_format_uses_is_refused_before_anything_is_written(source, tmp_path, name):
    save_file(load_file(source / "model.safetensors") | {name: torch.zeros(3)}, source / "model.safetensors")
    refused(source, tmp_path, f"tensor '{name}'")


@pytest.mark.parametrize("name", ["notes:1.txt", "a\\b.json"])
def test_a_file_that_cannot_be_an_asset_leaves_no_output_that_does_not_open(source, tmp_path, name):
    (source / name).write_text("{}")
    try:
        salr.convert(source, tmp_path / "out.salr", OPTIONS)
    except salr.SalrError as error:
        assert name in str(error)
        assert not (tmp_path / "out.salr").exists()
    else:
        assert name not in salr.open(tmp_path / "out.salr").assets


def test_a_bin_file_with_code_in_it_is_refused_and_never_run(source, tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    (source / "model.safetensors").unlink()
    torch.save({"a": Evil()}, source / "pytorch_model.bin")
    refused(source, tmp_path, "pytorch_model.bin: torch cannot load it safely", "save the checkpoint as safetensors")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_bin_file_is_named(source, tmp_path):
    to_bin(source)
    data = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    refused(source, tmp_path, "pytorch_model.bin: torch cannot load it safely")
    (source / "pytorch_model.bin").write_bytes(LFS_POINTER)
    refused(source, tmp_path, "pytorch_model.bin: a Git LFS pointer, not the file", "git lfs pull")


def test_a_gguf_file_that_git_lfs_has_not_fetched_is_refused(tmp_path):
    (tmp_path / "model.gguf").write_bytes(LFS_POINTER)
    refused(tmp_path / "model.gguf", tmp_path, "model.gguf: a Git LFS pointer, not the file", "git lfs pull")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.gguf"])
def test_weights_that_may_not_be_read_are_refused_with_the_systems_reason(source, tmp_path, monkeypatch, name):
    if name == "pytorch_model.bin":
        to_bin(source)
    (source / name).touch()
    opened = Path.open

    def denied(path, *arguments, **more):
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", denied)
    given = source / name if name == "model.gguf" else source
    refused(given, tmp_path, f"{name}: cannot be read (Permission denied)", "download or save this checkpoint file")


def test_a_bin_tensor_named_as_the_headers_metadata_is_refused(source, tmp_path):
    to_bin(source, __metadata__=torch.zeros(3))
    refused(source, tmp_path, "tensor '__metadata__': collides with a name of the format")


@pytest.mark.parametrize(
    "extra", [{"step": 7}, {"nested": {}}, {3: torch.zeros(1)}, {"s": torch.zeros(2, 2).to_sparse()}]
)
def test_what_is_no_dense_tensor_in_a_bin_file_is_named(source, tmp_path, extra):
    tensors = load_file(source / "model.safetensors") | extra
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    refused(source, tmp_path, f"pytorch_model.bin: tensor '{next(iter(extra))}'", "needed a dense tensor by name")


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"state_dict": {"a": torch.zeros(1)}}, {}])
def test_a_bin_file_without_a_table_of_tensors_is_refused(source, tmp_path, content):
    (source / "model.safetensors").unlink()
    torch.save(content, source / "pytorch_model.bin")
    refused(source, tmp_path, str(source))


def test_a_file_has_its_sha256(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
