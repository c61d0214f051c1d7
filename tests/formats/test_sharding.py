"""Shards: each a valid file, together the model; joined, the very file of a conversion without them."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
from salr.formats.errors import FormatError, OutputError, SalrError
from salr.formats.joining import join
from salr.formats.reader import SalrFile

import salr

INDEX = "model.salr.index.json"


def options(**more) -> salr.ConvertOptions:
    return salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude", **more)


@pytest.fixture(scope="module")
def shards(llama, tmp_path_factory):
    """Return ``llama`` converted to shards of at most 40 kB."""
    out = tmp_path_factory.mktemp("shards") / "model"
    salr.convert(llama, out, options(max_shard_size=40_000))
    return out


@pytest.fixture
def copy(shards, tmp_path):
    return shutil.copytree(shards, tmp_path / "copy")


def files(folder):
    return sorted(folder.glob("*.salr"))


def test_each_shard_is_a_valid_file_of_at_most_its_size_and_assets_lie_in_the_first(shards, packed):
    opened = [SalrFile(path) for path in files(shards)]
    assert len(opened) >= 3 and [f.manifest.shard for f in opened] == [
        (i, len(opened)) for i in range(1, len(opened) + 1)
    ]
    assert len({f.manifest.set_id for f in opened}) == 1
    assert all([p for _, p in f.check_all() if p] == [] for f in opened)
    assert [bool(f.assets) for f in opened] == [True, *[False] * (len(opened) - 1)]
    for file in opened:
        assert sum(t.n_bytes for n, t in file.tensors.items() if n != "salr.manifest") <= 40_000
    whole = SalrFile(packed)
    assert sorted(m for f in opened for m in f.modules) == sorted(whole.modules)
    lines = [(line.file, line.key) for f in opened for line in f.manifest.ledger]
    assert sorted(lines) == [(line.file, line.key) for line in whole.manifest.ledger]


def test_blocks_stay_together_in_natural_order(shards):
    numbers = [int(m.split(".")[2]) for path in files(shards) for m in sorted(SalrFile(path).modules)]
    assert numbers == sorted(numbers)


def test_the_index_is_that_of_hugging_face(shards):
    index = json.loads((shards / INDEX).read_text())
    held = {n: path.name for path in files(shards) for n in SalrFile(path).tensors if n != "salr.manifest"}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.n_bytes for t in SalrFile(shards).tensors.values())


@pytest.mark.parametrize("place", ["", INDEX])
def test_a_directory_or_its_index_is_read_as_one_file(shards, packed, place):
    file, whole = SalrFile(shards / place), SalrFile(packed)
    assert file.is_sharded and list(file.modules) and dict(file.modules) == dict(whole.modules)
    assert file.manifest.checksums == whole.manifest.checksums and file.manifest.ledger == whole.manifest.ledger
    assert file.assets == whole.assets and sorted(file.dense_tensors()) == sorted(whole.dense_tensors())
    for name in file.modules:
        np.testing.assert_array_equal(file.dense(name), whole.dense(name))
    assert [problem for _, problem in file.check_all() if problem] == []


def test_joined_shards_are_the_file_of_a_conversion_without_shards(shards, packed, tmp_path):
    join([shards], tmp_path / "a.salr")
    join(reversed(files(shards)), tmp_path / "b.salr")
    assert (tmp_path / "a.salr").read_bytes() == (tmp_path / "b.salr").read_bytes() == packed.read_bytes()


def test_a_sharded_model_loads_and_computes_as_the_file_does(shards, packed):
    import torch

    tokens = torch.arange(12)[None]
    with torch.no_grad():
        found, expected = (salr.load(path)(tokens).logits for path in (shards, packed))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", range(40))
def test_any_flipped_bit_of_a_shard_or_the_index_is_found_and_its_file_is_named(copy, seed):
    rng = random.Random(seed)
    path = rng.choice([*files(copy), copy / INDEX])
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    try:
        problems = [str(problem) for _, problem in SalrFile(copy).check_all() if problem]
    except SalrError as error:
        problems = [str(error)]
    assert problems and (path.name in problems[0] or path.name == INDEX)


def test_a_missing_shard_is_named(copy):
    files(copy)[1].unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-\d+\.salr: no such file"):
        SalrFile(copy)
    with pytest.raises(FormatError, match=r"shard 2 of \d+ is missing"):
        join([copy], copy / "out.salr")


def test_shards_of_two_sets_are_refused(copy, llama, tmp_path):
    salr.convert(llama, tmp_path / "other", options(max_shard_size=40_000, exclude=("*.layers.1.mlp.down_proj",)))
    shutil.copy(files(tmp_path / "other")[1], copy / files(copy)[1].name)
    for opened in (SalrFile, lambda path: join([path], tmp_path / "out.salr")):
        with pytest.raises(FormatError, match="belongs to another set than model-00001"):
            opened(copy)


def test_a_plain_file_is_no_shard(packed, tmp_path):
    with pytest.raises(FormatError, match="is no shard"):
        join([packed], tmp_path / "out.salr")


@pytest.mark.parametrize("name", ["../model-00001-of-00004.salr", "/etc/passwd", "a/b.salr", "a\\b", "nul\0", ".."])
def test_an_index_that_leads_out_of_its_folder_is_refused(copy, name):
    index = json.loads((copy / INDEX).read_text())
    index["weight_map"]["evil"] = name
    (copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(FormatError, match=r"could lie elsewhere|no such file"):
        SalrFile(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "[" * 10**5])
def test_an_index_that_is_none_is_refused(copy, text):
    (copy / INDEX).write_text(text)
    with pytest.raises(FormatError, match="index"):
        SalrFile(copy)


@pytest.mark.parametrize("shard", [[0, 3], [4, 3], [1], "1", [1, 10**9], [1.0, 3], [True, 3]])
def test_an_absurd_shard_number_is_refused(draft, tmp_path, shard):
    draft.manifest |= {"shard": shard, "set_id": "x"}
    with pytest.raises(FormatError, match=r"manifest .*shard is"):
        SalrFile(draft.write(tmp_path / "hostile.salr"))


def test_a_directory_without_an_index_says_what_to_do(copy):
    (copy / INDEX).unlink()
    with pytest.raises(FormatError, match=r"a directory without model.salr.index.json.*salr join DIR"):
        SalrFile(copy)


def test_a_models_directory_says_what_makes_a_file_of_it(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match=r"a directory without .*salr convert DIR OUT.salr"):
        SalrFile(tmp_path)


def test_what_needs_one_file_says_so(shards, tmp_path):
    from salr.converter.export.hf import export_hf

    for use in (lambda: export_hf(shards, tmp_path / "hf"), lambda: salr.remove_adapter(shards, "a")):
        with pytest.raises(SalrError, match=r"needs one file; make it with `salr join|no adapter"):
            use()


def test_one_shard_alone_is_neither_edited_nor_taken_for_the_model(copy, tmp_path):
    from salr.converter.export.hf import export_hf

    second = files(copy)[1]
    before, n_shards = second.read_bytes(), len(files(copy))
    for use in (
        lambda: salr.remove_adapter(second, "residual"),
        lambda: salr.scale_adapter(second, "residual", factor=0.5),
        lambda: export_hf(second, tmp_path / "out"),
    ):
        with pytest.raises(
            FormatError, match=r"00002.*\.salr: .* needs one file; make it with `salr join .* OUT.salr`"
        ):
            use()
    for use in (
        lambda: salr.unpack(second, tmp_path / "out"),
        lambda: salr.export_peft(second, tmp_path / "out"),
        lambda: salr.load(second),
    ):
        with pytest.raises(
            FormatError, match=rf"is shard 2 of {n_shards}, needed the whole model for .*; give the direc"
        ):
            use()
    assert second.read_bytes() == before and not list(tmp_path.glob("out*"))
    assert SalrFile(copy).is_sharded


def test_joining_into_one_of_the_shards_is_refused(copy):
    first = files(copy)[0]
    before = first.read_bytes()
    with pytest.raises(OutputError, match=r"00001.*: the output is one of the inputs; choose another name"):
        join([copy], first, force=True)
    assert first.read_bytes() == before and SalrFile(copy).modules


def test_an_existing_directory_is_never_replaced(shards, llama):
    with pytest.raises(OutputError, match="the output exists already; remove it"):
        salr.convert(llama, shards, options(max_shard_size=40_000, force=True))
