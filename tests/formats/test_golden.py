"""The version 1 file stays readable to the exact number, by our reader and by one written from docs/format.md."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from safetensors import safe_open
from salr.formats.container import TensorSpec
from salr.formats.reader import SalrFile
from salr.formats.writer import SalrWriter

SHA256 = "bac2c49c28fa73ec19a83ee575f5a01870ce244bb553dc731a2f367de38b72e0"
MODULES = {
    "layers.0.attn.q": ((5, 9), 16, "unstructured", "bf16", "source", ["residual", "style"]),
    "layers.0.attn.k": ((3, 8), 12, "2:4", "fp16", "refit", []),
    "layers.0.mlp.up": ((3, 10), 10, "unstructured", "int8", "source_minus_residual", ["residual"]),
    "layers.0.mlp.down": ((2, 7), 7, "unstructured", "nf4", "refit", []),
    "layers.0.mlp.gate": ((2, 3), 6, "dense", "fp32", "source", []),
    "layers.1.experts.up": ((2, 3, 10), 18, "unstructured", "bf16", "source", ["residual"]),
}
BASES = {
    "layers.0.attn.q": [
        [-8, 0, -7, 0, -6, 0, -5, 0, -4],
        [0] * 9,
        [-3, -2, -1, 0, 1, 2, 3, 4, 5],
        [0, 0, 0, 0, 0, 0, 0, 0, 6],
        [7, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    "layers.0.attn.k": [
        [0.5, 1.5, 0, 0, 2.5, 0, 3.5, 0],
        [0, 0, 4.5, 5.5, 0, 6.5, 7.5, 0],
        [0, 8.5, 0, 9.5, 0, 10.5, 0, 11.5],
    ],
    "layers.0.mlp.up": [
        [-63.5, 0, -50, 0, -0.25, 0, 0, 0, 2, 0],
        [127, 64, -64, 3, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 20],
    ],
    "layers.0.mlp.down": [
        [-1, 0, 0, 2, np.float32(-0.6961928009986877) * 2, 0, np.float32(0.7229568362236023) * 3],
        [0, 0, 0, np.float32(0.07958029955625534) * np.float32(0.5), 0, 0, np.float32(-0.5250730514526367) * 8],
    ],
    "layers.0.mlp.gate": [[0, -1, np.float32(1 / 3)], [np.float32(1e-40), np.float32(3e38), -0.0]],
    "layers.1.experts.up": [
        [[1, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0, -2, 0, 3, 0, -4, 0, 5, 0, -6], [0] * 10],
        [[7, -8, 9, -10, 11, -12, 13, -14, 15, -16], [0] * 10, [17, 0, 0, 0, 0, 0, 0, 0, 0, -18]],
    ],
}
RESIDUALS = {
    "layers.0.attn.q": [[n * k + 0.5 for k in range(9)] for n in range(5)],
    "layers.0.mlp.up": [
        [63.5 * k + 15.875 * k for k in range(10)],
        [0.5 * k - 0.25 * k for k in range(10)],
        [-0.375 * k for k in range(10)],
    ],
    "layers.1.experts.up": [[[1] * 10, [2] * 10, [3] * 10], [[8] * 10, [10] * 10, [12] * 10]],
}


def test_the_golden_file_is_the_one_that_was_committed(golden):
    assert hashlib.sha256(golden.read_bytes()).hexdigest() == SHA256


def test_every_digest_and_structure_of_the_golden_file_is_sound(golden):
    file = SalrFile(golden)
    findings = list(file.check_all())
    assert len(findings) == len(file.tensors) - 1 + len(MODULES)
    assert [problem for _, problem in findings if problem] == []


@pytest.mark.parametrize("name", MODULES)
def test_a_golden_module_entry_says_what_was_written(golden, name):
    entry = SalrFile(golden).modules[name]
    found = (entry.shape, entry.nnz, entry.pattern, entry.encoding, entry.values_from, [a.name for a in entry.adapters])
    assert found == MODULES[name]
    assert entry.source_tensor == f"{name}.weight"
    assert (entry.error.energy, entry.error.mask, entry.error.residual, entry.error.bound) == (
        64,
        0.125,
        0.0625,
        0.09375,
    )


@pytest.mark.parametrize("name", MODULES)
def test_a_golden_module_reads_to_the_exact_weights(golden, name):
    found = SalrFile(golden).dense(name, residual=False)
    expected = np.array(BASES[name], np.float32)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", RESIDUALS)
def test_a_golden_residual_reads_to_the_exact_product(golden, name):
    file = SalrFile(golden)
    expected = np.array(RESIDUALS[name], np.float32)
    np.testing.assert_array_equal(file.adapters(name, ["residual"]).product(), expected)
    np.testing.assert_array_equal(file.dense(name), np.array(BASES[name], np.float32) + expected)


def test_the_golden_trained_adapter_comes_back_as_it_was_trained(golden):
    file = SalrFile(golden)
    residual, style = file.pairs("layers.0.attn.q")
    assert (residual.name, residual.dtype, style.name, style.dtype) == ("residual", "BF16", "style", "F32")
    np.testing.assert_array_equal(style.lora_A, np.arange(9, dtype=np.float32).reshape(1, 9) / 3)
    np.testing.assert_array_equal(style.lora_B, np.arange(5, dtype=np.float32).reshape(5, 1) / 7)
    np.testing.assert_array_equal(style.scaling, [0.5])
    entry = file.modules["layers.0.attn.q"].adapters[1]
    assert (entry.alpha, entry.converted, entry.origin) == (0.5, "lora_B / 1", "PEFT LoRA")


def test_rank_scales_of_an_int8_residual_multiply_its_ranks(golden):
    (pair,) = SalrFile(golden).pairs("layers.0.mlp.up")
    assert pair.dtype == "I8"
    np.testing.assert_array_equal(pair.scaling, [0.5, 0.125])


def test_golden_tensors_that_are_kept_and_assets_come_back(golden):
    file = SalrFile(golden)
    assert sorted(file.dense_tensors()) == ["embed.weight", "logit_scale", "norm.weight", "position_ids"]
    assert file.tensor("logit_scale").shape == () and file.tensor("logit_scale") == np.float32(0.75)
    assert file.tensor("position_ids").tolist() == [[0, 1, -2, 2**40]]
    assert file.tensor("norm.weight").tolist() == [1, 2.5, -3]
    assert file.tensor("embed.weight").tolist()[0] == [0x3F80, 0x4000]
    assert file.assets == ["additional_chat_templates/tools.jinja", "config.json"]
    assert json.loads(file.asset("config.json")) == {"architectures": ["GoldenModel"]}
    assert file.asset("additional_chat_templates/tools.jinja").decode() == "{{ größe }}"


def test_the_golden_ledger_holds_every_fate(golden):
    lines = {line.key: line for line in SalrFile(golden).manifest.ledger}
    assert {line.fate for line in lines.values()} == {"packed", "kept", "folded", "dropped"}
    assert (lines["old.weight"].file, lines["old.weight"].reason) == ("a.bin", "into q")


def test_writing_the_golden_contents_in_any_order_gives_the_same_bytes(golden, tmp_path):
    file = SalrFile(golden)
    names = [name for name in file.tensors if name != "salr.manifest"]
    specs = [TensorSpec(name, file.tensors[name].dtype, file.tensors[name].shape) for name in names]
    with SalrWriter(tmp_path / "again.salr", specs) as writer:
        for name in sorted(names, key=lambda name: name[::-1]):
            writer.write(name, file.tensor(name))
        writer.finish(file.manifest)
    assert (tmp_path / "again.salr").read_bytes() == golden.read_bytes()


def test_a_reader_written_from_the_page_alone_finds_the_same_weights(golden):
    data = golden.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    zeroed = data[8 : 8 + length].replace(header["__metadata__"]["salr_header_xxh3"].encode(), b"0" * 32)
    assert xxhash.xxh3_128(zeroed).hexdigest() == header["__metadata__"]["salr_header_xxh3"]
    assert (8 + length) % 64 == 0

    def tensor(name: str) -> bytes:
        begin, end = header[name]["data_offsets"]
        return data[8 + length + begin : 8 + length + end]

    assert list(header)[-1] == "salr.manifest"
    manifest = json.loads(tensor("salr.manifest"))
    assert xxhash.xxh3_128(tensor("salr.manifest")).hexdigest() == header["__metadata__"]["salr_manifest_xxh3"]
    assert set(manifest["checksums"]) == set(header) - {"salr.manifest", "__metadata__"}
    bitmap, values = tensor("layers.0.attn.k.bitmap"), tensor("layers.0.attn.k.values")
    kept = iter(struct.unpack("<12e", values[:24]))
    rows = [[next(kept) if byte >> bit & 1 else 0 for bit in range(8)] for byte in bitmap]
    assert rows == BASES["layers.0.attn.k"]
    assert len(values) == 128 and not any(values[24:])
    assert struct.unpack("<4Q", tensor("layers.0.attn.k.row_offsets")) == (0, 4, 8, 12)


def test_the_golden_file_opens_with_safetensors(golden):
    with safe_open(golden, framework="np") as file:
        assert file.metadata()["format"] == "pt"
        assert file.get_tensor("norm.weight").tolist() == [1, 2.5, -3]


def test_todays_generator_still_writes_the_golden_bytes(golden, tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("make_golden", Path(golden).with_name("make_golden.py"))
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    generator.write(tmp_path / "today.salr")
    assert (tmp_path / "today.salr").read_bytes() == golden.read_bytes()
