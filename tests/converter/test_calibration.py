"""Calibration tokens: the same ones every time, and a clear word on whatever text cannot be used."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from salr.converter.calibration.data import calibration_tokens
from salr.converter.sources.checkpoint import Checkpoint
from salr.formats.errors import CalibrationError, OptionError

import salr

SENTENCE = "the cat sat on a mat and then it ran to see who was at the door of this old house"
WORDS = SENTENCE.split(" ")


@pytest.fixture(scope="module")
def worded(llama32, tmp_path_factory):
    """Return a Llama directory with a tokenizer that knows a few words, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = shutil.copytree(llama32, tmp_path_factory.mktemp("worded") / "m")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def tokenizer_json(source, folder, content) -> Checkpoint:
    """Copy a model directory and give it another tokenizer.json."""
    shutil.copytree(source, folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return Checkpoint(folder)


def added(*ids: int) -> list:
    return [{"id": index, "content": f"<{index}>", "special": True} for index in ids]


def test_random_tokens_are_the_same_twice_and_others_with_another_seed(llama, calibration):
    checkpoint = Checkpoint(llama)
    first, second = (calibration_tokens(calibration(), checkpoint) for _ in range(2))
    assert first.shape == (3, 24) and first.dtype == torch.int64 and torch.equal(first, second)
    assert not torch.equal(first, calibration_tokens(calibration(seed=1), checkpoint))
    assert first.min() >= 0 and first.max() < 128


def test_random_tokens_leave_out_special_ones(llama, calibration, tmp_path):
    content = {"model": {"type": "BPE"}, "added_tokens": [*added(0, 1, 2, 5, 400), {"id": 3, "special": False}]}
    tokens = calibration_tokens(calibration(samples=50, length=60), tokenizer_json(llama, tmp_path / "m", content))
    assert not set(tokens.unique().tolist()) & {0, 1, 2, 5} and {3, 4} <= set(tokens.unique().tolist())


def test_random_tokens_favour_low_ids_unless_the_vocabulary_is_not_ordered_by_frequency(llama, calibration, tmp_path):
    low = {}
    for kind in ("BPE", "WordPiece"):
        checkpoint = tokenizer_json(llama, tmp_path / kind, {"model": {"type": kind}})
        tokens = calibration_tokens(calibration(samples=60, length=64), checkpoint)
        low[kind] = float((tokens < 64).float().mean())
    assert low["BPE"] > 0.65 and 0.45 < low["WordPiece"] < 0.55


@pytest.mark.parametrize(
    "config", [{"n_positions": 40}, {"max_seq_len": 40}, {"text_config": {"max_position_embeddings": 40}}]
)
def test_positions_are_found_by_each_of_their_names(llama, tmp_path, calibration, config):
    folder = shutil.copytree(llama, tmp_path / "m")
    known = json.loads((folder / "config.json").read_text())
    del known["max_position_embeddings"]
    (folder / "config.json").write_text(json.dumps(known | config))
    tokens = calibration_tokens(salr.CalibrationOptions("synthetic", 3, 1000), Checkpoint(folder))
    assert tokens.shape == (3, 40)


def test_a_window_is_never_longer_than_the_models_positions(llama, calibration):
    assert calibration_tokens(calibration(length=1000), Checkpoint(llama)).shape == (3, 64)


def test_a_config_without_a_vocabulary_is_named(llama, calibration, tmp_path):
    source = shutil.copytree(llama, tmp_path / "m")
    config = json.loads((source / "config.json").read_text())
    del config["vocab_size"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CalibrationError, match=r"m: no vocab_size in config\.json; give a text with --calibration FILE"
    ):
        calibration_tokens(calibration(), Checkpoint(source))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.txt", " ".join(WORDS * 5)),
        ("t.jsonl", "\n".join(json.dumps({"text": " ".join(WORDS)}) for _ in range(5))),
        ("q.jsonl", "\n\n".join(json.dumps({"question": "the cat", "answer": " ".join(WORDS)}) for _ in range(5))),
        ("p.jsonl", "\n".join(json.dumps({"prompt": "the cat", "completion": " ".join(WORDS)}) for _ in range(5))),
        ("i.jsonl", "\n".join(json.dumps({"instruction": "the cat", "output": " ".join(WORDS)}) for _ in range(5))),
    ],
)
def test_windows_are_cut_from_the_text(worded, calibration, tmp_path, name, content):
    (tmp_path / name).write_text(content)
    first, second = (calibration_tokens(calibration(tmp_path / name), Checkpoint(worded)) for _ in range(2))
    assert first.shape == (3, 24) and torch.equal(first, second)
    assert 0 not in first.unique().tolist()  # every word is known, so nothing else was put into the text
    assert any(not torch.equal(first[0], row) for row in first)


def test_chat_messages_go_through_the_chat_template(worded, calibration, tmp_path):
    source = shutil.copytree(worded, tmp_path / "m")
    (source / "chat_template.jinja").write_text("{% for m in messages %}door {{ m.content }} {% endfor %}")
    messages = [{"role": "user", "content": "cat"}, {"role": "assistant", "content": "mat"}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for _ in range(12)))
    found = set(calibration_tokens(calibration(tmp_path / "t.jsonl"), Checkpoint(source)).unique().tolist())
    known = json.loads((worded / "tokenizer.json").read_text())["model"]["vocab"]
    assert found == {known[word] for word in ("door", "cat", "mat")}


BAD = {
    "empty.txt": (b"", "0 tokens of text, needed more than 24; give more text"),
    "short.txt": (b"the cat sat", "3 tokens of text, needed more than 24; give more text"),
    "latin.txt": ("höuse".encode("latin-1") * 50, "is no UTF-8 text, needed a .txt or .jsonl file"),
    "notext.jsonl": (
        b'{"text": "the cat"}\n\n{"body": "x"}\n',
        "line 3 has no text, needed an object with one of: text",
    ),
    "list.jsonl": (b'["the cat"]', "line 1 has no text"),
    "number.jsonl": (b'{"text": 5}', "line 1 has no text"),
    "half.jsonl": (b'{"question": "the cat"}', "line 1 has no text"),
    "cut.jsonl": (b'{"text": "the cat"}\n{"text', "line 2 is not JSON"),
    "chat.jsonl": (
        b'{"messages": [{"role": "user", "content": "x"}]}',
        "line 1 holds chat messages, needed a tokenizer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_text_that_cannot_be_used_is_named_and_nothing_is_written(worded, calibration, tmp_path, name):
    content, words = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        salr.convert(worded, tmp_path / "m.salr", salr.ConvertOptions(calibration=calibration(tmp_path / name)))
    assert str(error.value).startswith(f"{tmp_path / name}: {words}") and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_missing_text_is_named(worded, calibration, tmp_path):
    with pytest.raises(CalibrationError, match=r"no.txt: cannot be read \(No such file or directory\)"):
        salr.convert(worded, tmp_path / "m.salr", salr.ConvertOptions(calibration=calibration(tmp_path / "no.txt")))
    assert list(tmp_path.iterdir()) == []


def test_a_text_without_a_tokenizer_is_refused_with_a_way_out(llama32, calibration, tmp_path):
    source = shutil.copytree(llama32, tmp_path / "m")
    (source / "tokenizer.json").unlink()
    (tmp_path / "t.txt").write_text(" ".join(WORDS * 5))
    with pytest.raises(CalibrationError, match=r"m: no usable tokenizer .*; copy the model's tokenizer files") as error:
        calibration_tokens(calibration(tmp_path / "t.txt"), Checkpoint(source))
    assert "\n" not in str(error.value)


def test_what_is_recorded_names_the_text_by_its_digest_and_holds_no_path(worded, calibration, tmp_path):
    import hashlib

    (tmp_path / "secret.txt").write_text(" ".join(WORDS * 5))
    options = salr.ConvertOptions(
        salr.ModuleOptions(0.5, 2), calibration=calibration(tmp_path / "secret.txt"), rounds=2
    )
    salr.convert(worded, tmp_path / "m.salr", options)
    file = salr.open(tmp_path / "m.salr")
    digest = hashlib.sha256((tmp_path / "secret.txt").read_bytes()).hexdigest()
    expected = {"kind": "text", "sha256": digest, "samples": 3, "length": 24, "seed": 0}
    assert file.manifest.options["method"] == "joint" and file.manifest.options["calibration"] == expected
    manifest = bytes(file.raw("salr.manifest")).decode()
    assert "secret" not in manifest and str(tmp_path) not in manifest


@pytest.mark.parametrize("settings", [{"samples": 0}, {"length": 0}, {"samples": -1}, {"length": -5}], ids=str)
def test_windows_that_make_no_sense_are_refused(llama, calibration, tmp_path, settings):
    with pytest.raises((OptionError, CalibrationError)):
        salr.convert(llama, tmp_path / "m.salr", salr.ConvertOptions(calibration=calibration(**settings)))


@pytest.mark.parametrize(
    "content", [{"model": []}, {"added_tokens": [{"special": True}]}, {"added_tokens": 5}, [], {"added_tokens": [7]}]
)
def test_a_tokenizer_file_of_another_form_never_ends_in_a_traceback(llama, calibration, tmp_path, content):
    checkpoint = tokenizer_json(llama, tmp_path / "m", content)
    try:
        assert calibration_tokens(calibration(), checkpoint).shape == (3, 24)
    except salr.SalrError as error:
        assert "tokenizer.json" in str(error)
