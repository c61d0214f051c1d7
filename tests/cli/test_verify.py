"""`salr verify`: 0 where all is sound, 3 where anything differs, and every problem on a line of its own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from salr.formats.reader import SalrFile

MAGNITUDE = ("--method", "magnitude")


def damaged(packed, tmp_path, name: str, *, sealed=None):
    """Write the file with one bit of tensor ``name`` flipped."""
    data = bytearray(packed.read_bytes())
    data[SalrFile(packed).tensors[name].begin] ^= 1
    (tmp_path / "bad.salr").write_bytes(data)
    return tmp_path / "bad.salr"


def test_a_sound_file_passes_alone_and_against_its_source(salr, packed, llama):
    result = salr("verify", packed)
    assert result.exit_code == 0 and "are sound" in result.stdout and result.stderr == ""
    result = salr("verify", packed, "--against", llama)
    assert result.exit_code == 0 and "26 parts equal the source" in result.stdout


def test_json_counts_what_was_checked(salr, packed, llama):
    found = json.loads(salr("verify", packed, "--against", llama, "--json").stdout)
    assert found == {"checked": len(SalrFile(packed).tensors) - 1 + 14, "compared": 26, "problems": []}


def test_quiet_says_nothing_where_all_is_sound(salr, packed):
    result = salr("verify", packed, "--quiet")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize("name", ["model.norm.weight", "assets/LICENSE", "model.layers.0.mlp.up_proj.lora_A.residual"])
def test_a_flipped_bit_exits_with_3_and_names_the_tensor(fails, packed, tmp_path, name):
    line = fails("verify", damaged(packed, tmp_path, name), status=3)
    assert f"bad.salr: tensor '{name}': its bytes differ from their digest" in line


def test_a_flipped_bit_of_the_manifest_exits_with_3(fails, packed, tmp_path):
    assert "the manifest's digest does not match" in fails(
        "verify", damaged(packed, tmp_path, "salr.manifest"), status=3
    )


def test_every_problem_has_a_line(salr, packed, tmp_path):
    result = salr("verify", damaged(packed, tmp_path, "model.layers.0.mlp.up_proj.bitmap"))
    lines = result.stderr.splitlines()
    assert result.exit_code == 3 and len(lines) == 2 and all(line.startswith("salr: ") for line in lines)


def test_problems_are_listed_in_json_too(salr, packed, tmp_path):
    result = salr("verify", damaged(packed, tmp_path, "model.norm.weight"), "--json")
    assert result.exit_code == 3 and "model.norm.weight" in json.loads(result.stdout)["problems"][0]


def test_json_is_json_even_where_the_file_does_not_open(salr, packed, tmp_path):
    result = salr("verify", damaged(packed, tmp_path, "salr.manifest"), "--json")
    assert result.exit_code == 3 and "manifest" in json.loads(result.stdout)["problems"][0]


def test_a_truncated_file_exits_with_3(fails, packed, tmp_path):
    (tmp_path / "bad.salr").write_bytes(packed.read_bytes()[:-1])
    assert "bad.salr: not a readable safetensors file" in fails("verify", tmp_path / "bad.salr", status=3)


def test_a_missing_file_or_source_exits_with_1(fails, packed, tmp_path):
    assert "no such file" in fails("verify", tmp_path / "nowhere.salr")
    assert "--adapter without --against, needed" in fails("verify", packed, "--adapter", tmp_path)
    assert "--base without --against, needed" in fails("verify", packed, "--base", tmp_path)
    assert "no such directory" in fails("verify", packed, "--against", tmp_path / "nowhere", "--quiet")


def test_another_source_exits_with_3(salr, packed, tied_llama):
    result = salr("verify", packed, "--against", tied_llama)
    assert result.exit_code == 3 and "kept values" in result.stderr


def test_a_changed_weight_with_sound_digests_exits_with_3(salr, packed, llama, open_draft, tmp_path):
    draft = open_draft(packed)
    name = "model.layers.1.mlp.down_proj.values"
    draft.put(name, draft.array(name) ^ (np.arange(draft.array(name).size) == 4).astype(np.uint8))
    path = draft.write(tmp_path / "bad.salr")
    assert salr("verify", path).exit_code == 0
    result = salr("verify", path, "--against", llama)
    assert result.exit_code == 3 and "tensor 'model.layers.1.mlp.down_proj': kept values" in result.stderr


def test_adapters_and_base_are_given_as_to_convert(salr, fails, llama32, lora, tmp_path):
    salr("convert", *MAGNITUDE, llama32, tmp_path / "m.salr", "--adapter", f"style={lora}", "--rank", 4)
    assert salr("verify", tmp_path / "m.salr", "--against", llama32, "--adapter", f"style={lora}").exit_code == 0
    assert "holds adapter 'style'; give --adapter style=DIR" in fails(
        "verify", tmp_path / "m.salr", "--against", llama32
    )
    salr("convert", *MAGNITUDE, lora, tmp_path / "l.salr", "--rank", 4)
    assert salr("verify", tmp_path / "l.salr", "--against", lora, "--base", llama32).exit_code == 0
