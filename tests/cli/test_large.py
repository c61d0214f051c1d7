"""Shards, parts and join on the command line, and links that would carry foreign files along."""

from __future__ import annotations

import json
import re

import pytest
from salr.formats.manifest import MANIFEST_NAME
from salr.formats.reader import SalrFile

MAGNITUDE = ("--method", "magnitude", "--rank", 8)


def test_shards_are_made_inspected_verified_and_joined(salr, source, packed, tmp_path):
    shards, joined = tmp_path / "shards", tmp_path / "joined.salr"
    result = salr("convert", *MAGNITUDE, source, shards, "--max-shard-size", "60KB")
    assert result.exit_code == 0, result.output
    assert f"wrote {shards} in" in result.stdout and len(list(shards.glob("*.salr"))) >= 2
    assert "shards   LlamaForCausalLM" in salr("inspect", shards).stdout
    verified = salr("verify", shards, "--against", source)
    assert verified.exit_code == 0 and "checks are sound; 26 parts equal the source" in verified.stdout
    result = salr("join", shards, joined)
    assert result.exit_code == 0 and f"wrote {joined}" in result.stdout
    assert joined.read_bytes() == packed.read_bytes()


def test_shards_larger_than_was_asked_for_are_told_with_what_to_do(salr, source, tmp_path):
    result = salr("convert", *MAGNITUDE, source, tmp_path / "shards", "--max-shard-size", "10B")
    (line,) = [line for line in result.stdout.splitlines() if "--max-shard-size" in line]
    found = re.search(
        r"! (\d+) of (\d+) shards hold more than the 10 bytes of .*the largest takes ([\d,]+) bytes", line
    )
    made = [sum(t.n_bytes for n, t in SalrFile(p).tensors.items() if n != MANIFEST_NAME) for p in shard_files(tmp_path)]
    assert [int(text.replace(",", "")) for text in found.groups()] == [len(made), len(made), max(made)]
    assert line.endswith("Give at least that, or join them with `salr join`.")
    result = salr("convert", *MAGNITUDE, source, tmp_path / "fitting", "--max-shard-size", f"{max(made)}B")
    assert result.exit_code == 0 and "--max-shard-size" not in result.stdout


def shard_files(folder):
    return sorted((folder / "shards").glob("*.salr"))


def test_verify_names_the_shard_that_is_damaged(salr, source, tmp_path):
    shards = tmp_path / "shards"
    salr("convert", *MAGNITUDE, source, shards, "--max-shard-size", "60KB", "--quiet")
    first = sorted(shards.glob("*.salr"))[0]
    data = bytearray(first.read_bytes())
    tensor = SalrFile(first).tensors["model.embed_tokens.weight"]
    data[tensor.begin + 5] ^= 16
    first.write_bytes(data)
    result = salr("verify", shards)
    assert result.exit_code == 3
    assert f"{first}: tensor 'model.embed_tokens.weight': its bytes differ" in result.stderr


def test_parts_with_a_plan_made_once_are_joined(salr, source, tmp_path):
    plan, options = tmp_path / "plan.json", (*MAGNITUDE, "--scope", "global")
    assert salr("convert", *options, source, tmp_path / "parts", "--plan", plan, "--dry-run").exit_code == 0
    assert json.loads(plan.read_text())["kept_counts"] and not (tmp_path / "parts").exists()
    for part in ("1/2", "2/2"):
        result = salr("convert", *options, source, tmp_path / "parts", "--plan", plan, "--part", part)
        assert result.exit_code == 0, result.output
    assert "shard                   2 of 2" in salr("inspect", tmp_path / "parts" / "model-00002-of-00002.salr").stdout
    salr("convert", *options, source, tmp_path / "whole.salr", "--quiet")
    salr("join", *sorted((tmp_path / "parts").glob("*.salr")), tmp_path / "joined.salr", "--quiet")
    assert (tmp_path / "joined.salr").read_bytes() == (tmp_path / "whole.salr").read_bytes()


def test_the_plan_says_what_memory_and_disk_it_takes(salr, source, tmp_path):
    result = salr("convert", *MAGNITUDE, source, tmp_path / "m.salr")
    (line,) = [line for line in result.stdout.splitlines() if "peak memory about" in line]
    assert "disk 0.1 MB" in line and line.count(" free)") == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-shard-size", "5 apples"], "size '5 apples', needed a number with KB, MB, GB or TB"),
        (["--max-shard-size", "10"], "size '10', needed a number with KB, MB, GB or TB, as 5GB"),
        (["--max-shard-size", "0GB"], "--max-shard-size 0, needed a positive size"),
        (["--part", "3"], "--part '3', needed I/N"),
        (["--part", "3/2"], "--part 3/2, needed i/n with 1 <= i <= n"),
        (["--part", "1/2", "--max-shard-size", "1GB"], "--part with --max-shard-size"),
        (["--executor", "slurm"], "executor 'slurm', needed one of local, ray"),
        (["--device", "cuda:0,1"], "device 'cuda:0' cannot be used"),
    ],
)
def test_a_senseless_option_is_one_line(fails, source, tmp_path, options, words):
    import torch

    if "cuda:0,1" in options and torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert words in fails("convert", *MAGNITUDE, source, tmp_path / "out", "--quiet", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-llama"]


def test_join_of_nothing_and_of_what_is_no_shard_is_one_line(fails, packed, tmp_path):
    assert "one path, needed shards" in fails("join", tmp_path / "out.salr")
    assert "is no shard" in fails("join", packed, tmp_path / "out.salr")
    assert "there are no .salr files" in fails("join", tmp_path, tmp_path / "out.salr")


def test_a_link_that_leads_out_of_the_model_is_refused(fails, source, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (source / "NOTICE").symlink_to(tmp_path / "secret")
    message = fails("convert", *MAGNITUDE, source, tmp_path / "out.salr", "--quiet")
    assert "NOTICE: leads to" in message and "needed a file of the model's directory; copy it there" in message
    assert not list(tmp_path.glob("out*"))


def test_links_inside_a_hubs_cache_are_followed(salr, source, packed, tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    source.rename(cache / "blobs")
    for path in (cache / "blobs").iterdir():
        (snapshot / path.name).symlink_to(path)
    result = salr("convert", *MAGNITUDE, snapshot, tmp_path / "out.salr", "--quiet")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.salr").read_bytes() == packed.read_bytes()
