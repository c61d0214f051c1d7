"""`salr eval`: the table, the JSON, and its errors. The numbers are tested in tests/evaluation."""

from __future__ import annotations

import json
import shutil

import pytest

from salr.evaluation.results import read_results


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(" ".join(f"w{number % 50}" for number in range(100)))
    return path


@pytest.fixture
def reader(llama, tmp_path):
    """Return the tiny Llama with a tokenizer of the words w0 to w49."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = shutil.copytree(llama, tmp_path / "reader")
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(50)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def test_the_table_has_a_plain_line_a_model(salr, reader, words):
    result = salr("eval", reader, "--text", words, "--window", 32)
    assert result.exit_code == 0, result.output
    first, titles, line, last = result.stdout.splitlines()
    assert first == "words.txt   3 windows of 32 tokens, stride 32, 93 predictions, float32 on cpu"
    assert titles.split() == ["model", "bits/weight", "size", "perplexity"]
    assert line.startswith(str(reader)) and line.split()[1] == "16.00" and last.startswith("measured in ")


def test_a_reference_adds_ratio_agreement_and_kl(salr, reader, words):
    result = salr("eval", reader, "--reference", reader, "--text", words, "--window", 32)
    _, titles, reference, line, _ = result.stdout.splitlines()
    assert titles.split()[4:] == ["ratio", "agreement", "KL", "(nats)"] and f"{reader} (reference)" in reference
    assert line.split()[-4:] == ["1.000x", "100.0", "%", "0.0000"]


def test_json_and_save_hold_protocol_and_results(salr, reader, words, tmp_path):
    arguments = ["eval", reader, "--text", words, "--window", 16, "--stride", 8, "--max-windows", 4]
    found = json.loads(salr(*arguments, "--json", "--save", tmp_path / "r.json").stdout)
    assert found["protocol"] | {"window": 16, "stride": 8, "max_windows": 4, "text": "words.txt"} == found["protocol"]
    assert [row["n_scored"] for row in found["results"]] == [15 + 3 * 8]
    saved = read_results(tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text()) == found and saved.results[0].model == str(reader)


def test_a_place_for_the_results_that_cannot_be_used_is_refused_before_anything_is_measured(fails, reader, words):
    notes, config = words.with_name("notes.json"), reader / "config.json"
    notes.write_text('{"mine": 1}')
    old = {path: path.read_bytes() for path in (notes, config)}
    for path in (notes, config):
        line = fails("eval", reader, "--text", words, "--window", 32, "--save", path)
        assert f"{path}: the output exists and holds no results of `salr eval`; choose another name" in line
    line = fails("eval", reader / "nowhere", "--text", words, "--save", "/proc/r.json")
    assert "/proc: cannot write here" in line
    assert {path: path.read_bytes() for path in old} == old and not list(words.parent.rglob("*.partial"))


def test_older_results_are_replaced_when_the_new_ones_are_there(salr, fails, reader, words, tmp_path):
    saved = tmp_path / "r.json"
    arguments = ["eval", reader, "--text", words, "--save", saved, "--window"]
    assert salr(*arguments, 32).exit_code == 0
    before = saved.read_bytes()
    fails(*arguments, 1000)
    assert saved.read_bytes() == before
    assert salr(*arguments, 16).exit_code == 0 and read_results(saved).protocol["window"] == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "reader", "words.txt"]


def test_quiet_prints_nothing(salr, reader, words):
    result = salr("eval", reader, "--text", words, "--window", 32, "--quiet")
    assert result.exit_code == 0 and result.output == ""


def test_errors_are_one_line(fails, reader, words, llama, tmp_path):
    assert "no.txt: the text cannot be read" in fails("eval", reader, "--text", tmp_path / "no.txt")
    assert "needed at least one window of 64" in fails("eval", reader, "--text", _short(tmp_path), "--window", 64)
    assert "give --window 64" in fails("eval", reader, "--text", words)
    assert "no usable tokenizer" in fails("eval", llama, "--text", words, "--window", 32)
    assert "no such file or directory" in fails("eval", tmp_path / "x", "--text", words)
    assert "without salr_version" in fails("eval", reader / "model.safetensors", "--text", words)


def _short(folder):
    (folder / "short.txt").write_text("w1 w2 w3")
    return folder / "short.txt"


@pytest.mark.parametrize("name", ["model.salr", "results", "missing/results.json"])
def test_save_refuses_what_is_no_place_for_results(fails, reader, words, tmp_path, name):
    assert "output " in fails("eval", reader, "--text", words, "--window", 32, "--save", tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("content", ["nonsense", "[]", '{"kind": "salr-evaluation"}', '{"kind": "other"}'])
def test_reading_results_refuses_other_files(tmp_path, content):
    from salr.evaluation.errors import EvaluationError

    (tmp_path / "r.json").write_text(content)
    with pytest.raises(EvaluationError, match=r"r.json: .*needed a file that `salr eval --save` wrote"):
        read_results(tmp_path / "r.json")
    with pytest.raises(EvaluationError, match=r"gone.json: cannot be read"):
        read_results(tmp_path / "gone.json")


@pytest.mark.parametrize(("key", "value"), [("perplexity", "20"), ("nll", float("nan")), ("model", None), ("kl", True)])
def test_reading_results_checks_every_type(salr, reader, words, tmp_path, key, value):
    from salr.evaluation.errors import EvaluationError

    path = tmp_path / "r.json"
    salr("eval", reader, "--text", words, "--window", 32, "--save", path)
    found = json.loads(path.read_text())
    found["results"][0][key] = value
    path.write_text(json.dumps(found))
    with pytest.raises(EvaluationError, match=f"has {key} "):
        read_results(path)
