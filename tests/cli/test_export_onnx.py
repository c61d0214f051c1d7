"""`salr export onnx`: a directory that ONNX Runtime runs, or one line and nothing."""

from __future__ import annotations


def test_it_says_what_it_wrote_and_how_far_it_is_from_torch(export_command):
    result, folder = export_command
    assert result.exit_code == 0, result.output
    first, *_, last = result.stdout.splitlines()
    assert first.startswith("differs from torch by (share of the largest output): function body ")
    assert last == f"wrote {folder}"
    names = {path.name for path in folder.iterdir()}
    assert {"model.onnx", "model.salr", "genai_config.json", "config.json", "tokenizer.json"} <= names


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(fails, packed, tmp_path):
    assert "opset 12, needed 18 to 25" in fails("export", "onnx", packed, tmp_path / "out", "--opset", 12)
    assert "weights 'csr'" in fails("export", "onnx", packed, tmp_path / "out", "--weights", "csr")
    assert list(tmp_path.iterdir()) == []
