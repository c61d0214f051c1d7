"""`salr unpack`: a directory again, complete or not there at all."""

from __future__ import annotations

import pytest
import torch

MAGNITUDE = ("--method", "magnitude")


def test_unpack_writes_a_model_directory(salr, packed, llama, tmp_path):
    result = salr("unpack", packed, tmp_path / "out")
    assert result.exit_code == 0 and result.stdout == f"wrote {tmp_path / 'out'}\n"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in llama.iterdir()}


def test_no_residual_and_merge_change_the_weights(salr, llama32, lora, read_tensors, tmp_path):
    salr("convert", *MAGNITUDE, llama32, tmp_path / "m.salr", "--adapter", f"a={lora}", "--rank", 4)
    found = {}
    for options in ([], ["--no-residual"], ["--merge"], ["--no-residual", "--merge"]):
        out = tmp_path / ("out" + "".join(options))
        assert salr("unpack", tmp_path / "m.salr", out, *options).exit_code == 0
        found[tuple(options)] = read_tensors(out)["model.layers.0.self_attn.q_proj.weight"]
    residual = found[()] - found["--no-residual",]
    torch.testing.assert_close(found["--merge",] - found["--no-residual", "--merge"], residual, atol=1e-5, rtol=0)
    assert residual.abs().max() > 1e-3 and (found["--merge",] - found[()]).abs().max() > 1e-3
    assert (found["--no-residual",] == 0).float().mean() == 0.5


def test_dtype_and_quiet_are_obeyed(salr, packed, read_tensors, tmp_path):
    result = salr("unpack", packed, tmp_path / "out", "--dtype", "fp32", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {torch.float32}


@pytest.mark.parametrize("option", [["--dtype", "int8"], []])
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(fails, packed, tmp_path, option):
    if not option:
        (tmp_path / "out").write_text("a file")
    assert ("dtype 'int8'" if option else "the output exists already") in fails(
        "unpack", packed, tmp_path / "out", *option
    )
    assert len(list(tmp_path.iterdir())) == (0 if option else 1)


def test_an_unwritable_place_is_one_line(fails, packed):
    assert "/proc/out.partial: cannot be made" in fails("unpack", packed, "/proc/out")


def test_a_missing_file_is_one_line(fails, tmp_path):
    assert "no such file" in fails("unpack", tmp_path / "nowhere.salr", tmp_path / "out")


def flipped(packed, tmp_path, name):
    """Return a copy of a file with one bit of a tensor's first byte flipped."""
    import salr as library

    tensor, damaged = library.SalrFile(packed).tensors[name], tmp_path / "damaged.salr"
    data = bytearray(packed.read_bytes())
    data[tensor.begin] ^= 1
    damaged.write_bytes(data)
    return damaged


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.values", "model.embed_tokens.weight"])
@pytest.mark.parametrize("command", [("unpack",), ("export", "hf"), ("export", "peft")])
def test_a_damaged_file_is_refused_by_what_writes_weights_elsewhere(fails, packed, tmp_path, name, command):
    damaged, out = flipped(packed, tmp_path, name), tmp_path / "out"
    assert name in fails(*command, damaged, out) and not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["damaged.salr"]
