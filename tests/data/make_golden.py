"""How golden_v1.salr was made. It was run once, for format version 1, and MUST NOT be run over that file again.

Every later release has to read the very bytes that version 1 wrote: a change that alters them is a new format
version with a golden file of its own. The contents are fixed here by hand (no random numbers), so that
test_golden.py can state every expected number. Run it into another place to see what today's writer makes:

    .venv/bin/python tests/data/make_golden.py /tmp/again.salr
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from salr.formats.bitmap import pack_bitmap, row_offsets
from salr.formats.container import TensorSpec
from salr.formats.dtypes import from_float32
from salr.formats.manifest import AdapterEntry, ErrorEntry, LedgerLine, Manifest, ModuleEntry
from salr.formats.values import pad_values
from salr.formats.writer import SalrWriter

Tensors = dict[str, tuple[str, np.ndarray]]
ERROR = ErrorEntry(energy=64.0, mask=0.125, residual=0.0625, bound=0.09375)

UNSTRUCTURED_MASK = ["1.1.1.1.1", ".........", "111111111", "........1", "1........"]
TWO_OF_FOUR_MASK = ["11..1.1.", "..11.11.", ".1.1.1.1"]
INT8_MASK = ["1.1.1.1.1.", "1111......", ".........1"]
NF4_MASK = ["11.11.1", "...1..1"]
EXPERT_MASKS = [["1.........", ".1.1.1.1.1", ".........."], ["1111111111", "..........", "1........1"]]


def mask_of(rows: list) -> np.ndarray:
    return np.array([[c == "1" for c in row] if isinstance(row, str) else mask_of(row) for row in rows])


def bf16(values: list) -> np.ndarray:
    return from_float32(np.array(values, np.float32), "BF16")


def sparse(name: str, mask: np.ndarray, values: np.ndarray, encoding: str, dtype: str, n_kept: int) -> Tensors:
    bitmap = pack_bitmap(mask)
    return {
        f"{name}.values": (dtype, pad_values(values, encoding, n_kept)),
        f"{name}.bitmap": ("U8", bitmap),
        f"{name}.row_offsets": ("U64", row_offsets(bitmap)),
    }


def entry(name: str, shape: tuple[int, ...], dtype: str, nnz: int, pattern: str, encoding: str, **more) -> ModuleEntry:
    fields = {"source_shape": shape, "transposed": False, "values_from": "source", "error": ERROR, **more}
    return ModuleEntry(
        f"{name}.weight", shape=shape, dtype=dtype, nnz=nnz, pattern=pattern, encoding=encoding, **fields
    )


def residual(rank: int) -> AdapterEntry:
    return AdapterEntry("residual", rank, 1.0, "truncated SVD of the magnitude residual")


def unstructured() -> tuple[ModuleEntry, Tensors]:
    """Kept weight number i is i - 8; residual of rank 2; a trained adapter of rank 1 in float32."""
    name, mask = "layers.0.attn.q", mask_of(UNSTRUCTURED_MASK)
    tensors = sparse(name, mask, bf16([i - 8 for i in range(16)]), "bf16", "BF16", 16)
    tensors[f"{name}.lora_A.residual"] = ("BF16", bf16([[k for k in range(9)], [1] * 9]))
    tensors[f"{name}.lora_B.residual"] = ("BF16", bf16([[n, 0.5] for n in range(5)]))
    tensors[f"{name}.lora_A.style"] = ("F32", np.arange(9, dtype=np.float32).reshape(1, 9) / 3)
    tensors[f"{name}.lora_B.style"] = ("F32", np.arange(5, dtype=np.float32).reshape(5, 1) / 7)
    style = AdapterEntry("style", 1, 0.5, "PEFT LoRA", alpha=0.5, converted="lora_B / 1")
    return entry(name, (5, 9), "BF16", 16, "unstructured", "bf16", adapters=(residual(2), style)), tensors


def two_of_four() -> tuple[ModuleEntry, Tensors]:
    """Kept weight number i is i + 0.5."""
    name, mask = "layers.0.attn.k", mask_of(TWO_OF_FOUR_MASK)
    tensors = sparse(name, mask, np.arange(12, dtype=np.float16) + np.float16(0.5), "fp16", "F16", 12)
    return entry(name, (3, 8), "F16", 12, "2:4", "fp16", values_from="refit"), tensors


def eight_bits() -> tuple[ModuleEntry, Tensors]:
    """Codes -127, -100, ...; scales of groups of 4 columns in float16, 0 where a group keeps nothing; int8 residual."""
    name, mask = "layers.0.mlp.up", mask_of(INT8_MASK)
    codes = np.array([-127, -100, -1, 0, 1, 127, 64, -64, 3, 5], np.int8).view(np.uint8)
    tensors = sparse(name, mask, codes, "int8", "U8", 10)
    tensors[f"{name}.scales"] = ("F16", np.array([[0.5, 0.25, 2], [1, 0, 0], [0, 0, 4]], np.float16))
    tensors[f"{name}.lora_A.residual"] = ("I8", np.array([range(10), range(0, -10, -1)], np.int8))
    tensors[f"{name}.lora_B.residual"] = ("I8", np.array([[127, -127], [1, 2], [0, 3]], np.int8))
    tensors[f"{name}.rank_scales.residual"] = ("F32", np.array([0.5, 0.125], np.float32))
    more = {"values_from": "source_minus_residual", "group_size": 4, "adapters": (residual(2),)}
    return entry(name, (3, 10), "BF16", 10, "unstructured", "int8", **more), tensors


def four_bits() -> tuple[ModuleEntry, Tensors]:
    """Codes 0, 7, 15, 1, 14, 8, 2 (an odd number), low nibble first; scales of groups of 3 columns."""
    name, mask = "layers.0.mlp.down", mask_of(NF4_MASK)
    packed = np.array([0 | 7 << 4, 15 | 1 << 4, 14 | 8 << 4, 2], np.uint8)
    tensors = sparse(name, mask, packed, "nf4", "U8", 7)
    tensors[f"{name}.scales"] = ("F32", np.array([[1, 2, 3], [0, 0.5, 8]], np.float32))
    return entry(name, (2, 7), "BF16", 7, "unstructured", "nf4", values_from="refit", group_size=3), tensors


def dense() -> tuple[ModuleEntry, Tensors]:
    """Nothing removed, stored transposed in the source (a Conv1D)."""
    name = "layers.0.mlp.gate"
    values = np.array([0, -1, 1 / 3, 1e-40, 3e38, -0.0], np.float32)
    more = {"source_shape": (3, 2), "transposed": True}
    tensors: Tensors = {f"{name}.values": ("F32", pad_values(values, "fp32", 6))}
    return entry(name, (2, 3), "F32", 6, "dense", "fp32", **more), tensors


def experts() -> tuple[ModuleEntry, Tensors]:
    """Two stacked experts; kept weight number i is (-1)^i (i + 1); residual of rank 1."""
    name, mask = "layers.1.experts.up", mask_of(EXPERT_MASKS)
    tensors = sparse(name, mask, bf16([(-1) ** i * (i + 1) for i in range(18)]), "bf16", "BF16", 18)
    tensors[f"{name}.lora_A.residual"] = ("BF16", bf16([[[1] * 10], [[2] * 10]]))
    tensors[f"{name}.lora_B.residual"] = ("BF16", bf16([[[1], [2], [3]], [[4], [5], [6]]]))
    return entry(name, (2, 3, 10), "BF16", 18, "unstructured", "bf16", adapters=(residual(1),)), tensors


def kept() -> Tensors:
    return {
        "norm.weight": ("F32", np.array([1, 2.5, -3], np.float32)),
        "embed.weight": ("BF16", bf16([[1, 2], [3, 4], [5, 6], [7, 8]])),
        "logit_scale": ("F32", np.array(0.75, np.float32)),
        "position_ids": ("I64", np.array([[0, 1, -2, 2**40]], np.int64)),
        "assets/config.json": ("U8", np.frombuffer(b'{"architectures": ["GoldenModel"]}', np.uint8)),
        "assets/additional_chat_templates/tools.jinja": ("U8", np.frombuffer("{{ größe }}".encode(), np.uint8)),
    }


def build() -> tuple[Manifest, Tensors]:
    parts = [part() for part in (unstructured, two_of_four, eight_bits, four_bits, dense, experts)]
    tensors = {name: tensor for _, part in parts for name, tensor in part.items()} | kept()
    modules = {module.source_tensor.removesuffix(".weight"): module for module, _ in parts}
    ledger = [LedgerLine(module.source_tensor, "packed", "by hand", "model.safetensors") for module in modules.values()]
    ledger += [LedgerLine("old.weight", "folded", "into q", "a.bin"), LedgerLine("rope", "dropped", "derived")]
    ledger += [LedgerLine(name, "kept", "by hand", "model.safetensors") for name in kept() if "/" not in name]
    manifest = Manifest(
        generator="salr 0.1.0",
        modules=modules,
        checksums={},
        ledger=tuple(ledger),
        options={"sparsity": 0.5, "rank": 2, "method": "magnitude", "scope": "layer"},
        source={"architecture": "GoldenModel", "class": None, "files": [{"name": "a.bin", "sha256": "0" * 64}]},
        environment={"device": "cpu: by hand", "numpy": "2.0"},
    )
    return manifest, tensors


def write(path: Path) -> None:
    manifest, tensors = build()
    specs = [TensorSpec(name, dtype, array.shape) for name, (dtype, array) in tensors.items()]
    with SalrWriter(path, specs) as writer:
        for name, (_, array) in tensors.items():
            writer.write(name, array)
        writer.finish(manifest)


if __name__ == "__main__":
    if len(sys.argv) != 2 or Path(sys.argv[1]).exists():
        sys.exit("usage: make_golden.py NEW_FILE (the golden file itself is never made again)")
    write(Path(sys.argv[1]))
