"""`salr inspect --html` and `salr inspect A B`; the page itself is tested in tests/evaluation."""

from __future__ import annotations

import json

import pytest
from salr.formats.reader import SalrFile

from salr.evaluation.report_data import headline


def test_html_writes_the_page_with_the_results(salr, packed, tmp_path):
    row = {
        "model": "llama.salr", "architecture": "LlamaForCausalLM", "is_reference": False, "perplexity": 77.5,
        "nll": 4.35, "n_scored": 31, "n_windows": 1, "n_tokens": 40, "n_bytes": packed.stat().st_size,
        "bits_per_weight": 12.0, "seconds": 1, "ratio": None, "agreement": None, "kl": None,
    }  # fmt: skip
    protocol = {"text": "t.txt", "window": 32, "stride": 32, "precision": "float32", "device": "cpu"}
    saved = {"kind": "salr-evaluation", "protocol": protocol, "results": [row]}
    (tmp_path / "r.json").write_text(json.dumps(saved))
    result = salr("inspect", packed, "--html", tmp_path / "page.html", "--eval", tmp_path / "r.json")
    page = (tmp_path / "page.html").read_text()
    assert result.stdout == f"wrote {tmp_path / 'page.html'}\n"
    assert page.startswith("<!doctype html>") and "77.50" in page and "llama.salr" in page


def test_two_files_stand_side_by_side(salr, packed, golden):
    result = salr("inspect", packed, golden)
    lines = {line[:22].strip(): line[22:].split() for line in result.stdout.splitlines()}
    one, other = headline(SalrFile(packed)), headline(SalrFile(golden))
    assert result.stdout.splitlines()[0].split() == ["llama.salr", "golden_v1.salr"]
    assert lines["bits/weight"] == [f"{one.bits_per_weight:.2f}", f"{other.bits_per_weight:.2f}"]
    assert lines["error, mask"] == [f"{100 * one.error_mask:.2f}", "%", f"{100 * other.error_mask:.2f}", "%"]
    assert lines["removed"][:2] == ["50.0", "%"] and lines["residual rank"][0] == "8"


def test_files_of_one_name_are_told_apart_by_their_paths(salr, packed, tmp_path):
    (tmp_path / packed.name).write_bytes(packed.read_bytes())
    first = salr("inspect", packed, tmp_path / packed.name).stdout.splitlines()[0]
    assert first.split() == [str(packed), str(tmp_path / packed.name)]


def test_json_of_several_files_holds_each_headline(salr, packed, golden):
    files = json.loads(salr("inspect", packed, golden, golden, "--json").stdout)["files"]
    assert [file["path"] for file in files] == [str(packed), str(golden), str(golden)]
    assert files[0]["bits_per_weight"] == headline(SalrFile(packed)).bits_per_weight
    assert files[0]["ranks"] == [8, 8] and files[0]["error_output"] is None


@pytest.mark.parametrize("name", ["page.salr", "page", "missing/page.html"])
def test_the_page_needs_a_name_that_destroys_nothing(fails, packed, tmp_path, name):
    assert "output " in fails("inspect", packed, "--html", tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_is_one_line(fails, packed):
    assert "/proc: cannot write here" in fails("inspect", packed, "--html", "/proc/page.html")


def test_what_the_system_refuses_is_one_line(fails, packed, tmp_path):
    long = "x" * 300
    assert f"{long[:200]}: File name too long; check the path" in fails("inspect", long)
    assert "File name too long" in fails("unpack", packed, tmp_path / long)
    assert "File name too long" in fails("adapters", "list", long)
    assert list(tmp_path.iterdir()) == []


def test_combinations_without_a_meaning_are_refused(fails, packed, golden, tmp_path):
    assert "2 files, needed one file" in fails("inspect", packed, golden, "--html", tmp_path / "p.html")
    assert "2 files, needed one file" in fails("inspect", packed, golden, "--modules")
    assert "--html and --json, needed one of them" in fails("inspect", packed, "--html", tmp_path / "p.html", "--json")
    assert "--eval without --html" in fails("inspect", packed, "--eval", tmp_path / "r.json")


def test_results_of_another_file_are_refused(salr, fails, speaker, golden, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3 w4 w5 " * 20)
    saved = tmp_path / "r.json"
    assert salr("eval", speaker, "--text", tmp_path / "text.txt", "--window", 32, "--save", saved).exit_code == 0
    said = fails("inspect", golden, "--html", tmp_path / "p.html", "--eval", saved)
    assert f"holds results of {speaker}" in said and f"needed of {golden}" in said
    assert not (tmp_path / "p.html").exists()


def test_broken_results_leave_no_page(fails, packed, tmp_path):
    (tmp_path / "r.json").write_text("nonsense")
    assert "r.json: is not JSON" in fails(
        "inspect", packed, "--html", tmp_path / "p.html", "--eval", tmp_path / "r.json"
    )
    assert not (tmp_path / "p.html").exists()
