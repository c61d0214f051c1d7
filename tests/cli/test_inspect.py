"""`salr inspect`: the numbers of the file, as text and as JSON."""

from __future__ import annotations

import json

import pytest
from salr.formats.reader import SalrFile


def test_the_summary_names_origin_sizes_and_errors(salr, packed):
    result = salr("inspect", packed)
    assert result.exit_code == 0
    assert result.stdout.startswith("llama.salr   LlamaForCausalLM   made by salr")
    for word in ("sparsity 0.5", "rank 8", "packed weights", "bits/weight", "residual adapters", "7 tensors", "bound"):
        assert word in result.stdout
    assert "worst modules" in result.stdout and "LICENSE, config.json" in result.stdout


def test_json_holds_every_module_and_the_exact_sizes(salr, packed):
    found = json.loads(salr("inspect", packed, "--json").stdout)
    file = SalrFile(packed)
    assert found["sizes"]["file_bytes"] == packed.stat().st_size and found["assets"] == file.assets
    assert set(found["modules"]) == set(file.modules) and found["dense_tensors"] == file.dense_tensors()
    for name, entry in file.modules.items():
        module = found["modules"][name]
        assert (module["shape"], module["nnz"], module["error"]["mask"]) == (
            list(entry.shape),
            entry.nnz,
            entry.error.mask,
        )


def test_modules_adds_a_row_for_each(salr, packed):
    result = salr("inspect", packed, "--modules")
    for name, entry in SalrFile(packed).modules.items():
        row = next(line for line in result.stdout.splitlines() if line.startswith(name))
        assert f"{entry.shape[0]}x{entry.shape[1]}" in row and "50.0 %" in row and "unstructured" in row


def test_trained_adapters_have_a_line_with_rank_and_scaling(salr, golden):
    result = salr("inspect", golden)
    line = next(line for line in result.stdout.splitlines() if line.startswith("adapter style"))
    assert "1 modules, rank 1, scaling 0.5" in line


def test_a_file_without_packed_modules_can_be_inspected(salr, draft, tmp_path):
    kept = {"norm.weight", "assets/config.json"}
    draft.manifest["modules"] = {}
    for name in set(draft.tensors) - kept:
        draft.drop(name)
    path = draft.write(tmp_path / "bare.salr")
    for arguments in (["inspect", path], ["inspect", path, "--json"], ["inspect", path, "--modules"]):
        result = salr(*arguments)
        assert result.exit_code == 0 and result.exception is None, result.exception


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "nonsense", "missing"])
def test_what_is_no_salr_file_is_one_line(fails, tmp_path, content):
    if content is not None:
        (tmp_path / "f.salr").write_bytes(content)
    assert f"{tmp_path / 'f.salr'}: " in fails("inspect", tmp_path / "f.salr")


def test_a_plain_safetensors_file_is_told_apart(fails, llama):
    assert "a safetensors file without salr_version, needed a .salr file" in fails(
        "inspect", llama / "model.safetensors"
    )


def test_names_that_look_like_markup_are_printed_as_they_are(salr, draft, tmp_path):
    draft.manifest["generator"] = "[red]x[/red] 1"
    draft.manifest["modules"]["[bold]q"] = draft.manifest["modules"].pop("layers.0.attn.k")
    for key in ("values", "bitmap", "row_offsets"):
        dtype, shape, _ = draft.tensors[f"layers.0.attn.k.{key}"]
        draft.put(f"[bold]q.{key}", draft.array(f"layers.0.attn.k.{key}"), dtype=dtype, shape=shape)
        draft.drop(f"layers.0.attn.k.{key}")
    result = salr("inspect", draft.write(tmp_path / "f.salr"), "--modules")
    assert "[red]x[/red] 1" in result.stdout and "[bold]q" in result.stdout


def test_no_view_of_a_file_with_rounded_values_shows_the_bound(salr, source, tmp_path):
    out, page = tmp_path / "q.salr", tmp_path / "page.html"
    made = json.loads(
        salr("convert", source, out, "--values", "int8", "--rank", "4", "--calibration", "none", "--json").stdout
    )
    found = json.loads(salr("inspect", out, "--json").stdout)
    for error in (made["error"], found["error"]):
        assert error["bound"] is None and "rounding" in error["no_bound_because"] and error["residual"] > 0
    assert all(module["error"]["bound"] is None for module in found["modules"].values())
    salr("inspect", out, "--html", page)
    assert "(bound" not in page.read_text() and "rounded values" in page.read_text()
    assert "bound" not in salr("inspect", out).stdout
    compared = salr("inspect", out, out).stdout.splitlines()
    assert next(line for line in compared if line.startswith("bound")).split() == ["bound"]
    name = next(iter(found["modules"]))
    row = next(line for line in salr("inspect", out, "--modules").stdout.splitlines() if line.startswith(name))
    assert row.count("%") == 3  # removed, mask error, with residual


def test_the_bound_of_exact_values_is_in_every_view(salr, packed, tmp_path):
    found = json.loads(salr("inspect", packed, "--json").stdout)
    assert found["error"]["residual"] < found["error"]["bound"] and found["error"]["no_bound_because"] is None
    for name, entry in SalrFile(packed).modules.items():
        assert found["modules"][name]["error"]["bound"] == entry.error.bound
    salr("inspect", packed, "--html", tmp_path / "page.html")
    assert "(bound" in (tmp_path / "page.html").read_text()
