"""The model card of an exported directory: front matter that the hub reads, and numbers that are the file's own."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from huggingface_hub import metadata_load
from salr.converter.export.hf import export_hf
from salr.converter.export.model_card import CardEvaluation, model_card
from salr.converter.report import error_report, size_report

import salr


@pytest.fixture
def file(packed) -> salr.SalrFile:
    return salr.open(packed)


def test_the_card_has_the_files_sizes_errors_recipe_and_digests(packed, file, tmp_path):
    card = (export_hf(packed, tmp_path / "hf") / "README.md").read_text()
    sizes, error = size_report(file), error_report(file.modules)
    assert f"{sizes.file_bytes / 1e6:.1f} MB ({sizes.file_bytes / sizes.source_bytes:.2f}x)" in card
    assert f"{sizes.bits_per_weight:.2f} bits a packed weight" in card
    for share in (error.mask, error.residual, error.bound):
        assert f"{100 * share:.2f} %" in card
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == file.manifest.options
    for entry in file.manifest.source["files"]:
        assert f"| `{entry['name']}` | `{entry['sha256']}` |" in card
    assert f"{len(file.manifest.ledger) - 14} kept, 14 packed" in card and file.manifest.generator in card
    assert "| `residual` | corrects what the mask removed | 14 | 8 | 1 |" in card and "None was recorded" in card


def test_the_front_matter_names_base_licence_and_library(packed, tmp_path):
    plain = metadata_load(export_hf(packed, tmp_path / "plain") / "README.md")
    assert plain == {"library_name": "transformers", "tags": ["salr", "sparse", "low-rank", "compressed"]}
    file = salr.open(packed)
    source = {**file.manifest.source, "repository": "some/base", "revision": "a" * 40, "license": "apache-2.0"}
    file.manifest = replace(file.manifest, source=source)
    (tmp_path / "README.md").write_text(model_card(file))
    known = metadata_load(tmp_path / "README.md")
    assert (known["base_model"], known["license"]) == ("some/base", "apache-2.0")
    assert "from `some/base`" in model_card(file) and f"| revision | {'a' * 40} |" in model_card(file)


def test_what_a_stranger_wrote_into_the_manifest_cannot_break_the_front_matter(file, tmp_path):
    file.manifest = replace(file.manifest, source={"repository": "a\n---\nb: [", "license": 7, "files": [3, {}]})
    (tmp_path / "README.md").write_text(model_card(file))
    assert set(metadata_load(tmp_path / "README.md")) == {"library_name", "tags"}


def test_a_recorded_evaluation_is_a_table_of_the_card(file):
    card = model_card(file, CardEvaluation("Measured so.", ["model", "perplexity"], [["a|b", "12.5"]]))
    assert "| a\\|b | 12.5 |\n\nMeasured so." in card and "None was recorded" not in card
