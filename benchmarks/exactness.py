"""Is the file what it claims to be? Sizes, alignment, determinism and exactness on a real model.

    python benchmarks/exactness.py MODEL [--json FILE]

Converts MODEL with the paper's method at 50 % and rank 64, with one worker and with two, and with a LoRA made by the
peft library; then compares bytes, bits and merged weights. Exits 1 if a comparison fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from safetensors import safe_open
from salr.converter.options import ConvertOptions
from salr.converter.sources.checkpoint import Checkpoint
from salr.converter.verification import compare_with_source
from salr.formats import naming

import salr


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def size_facts(path: Path) -> dict[str, Any]:
    """Return bytes a packed weight, what header, manifest and gaps take, and how many large tensors are not aligned."""
    file = salr.open(path)
    entries = file.modules.values()
    kept = sum(
        file.tensors[naming.values_name(m)].n_bytes + file.tensors[naming.bitmap_name(m)].n_bytes for m in file.modules
    )
    offsets = sum(file.tensors[naming.row_offsets_name(m)].n_bytes for m in file.modules)
    tensors = sum(tensor.n_bytes for name, tensor in file.tensors.items() if name != "salr.manifest")
    large = [
        t for t in file.tensors.values() if t.n_bytes > 4096 and not t.name.startswith(("assets/", "salr.manifest"))
    ]
    with safe_open(path, framework="pt") as opened:
        n_opened = len(list(opened.keys()))
    return {
        "bytes a packed weight, values + bitmap": kept / sum(entry.n_weights for entry in entries),
        "bytes a row, row_offsets": offsets / sum(entry.n_rows for entry in entries),
        "header, manifest and padding, share of the file": 1 - tensors / file.n_bytes,
        "tensors seen by safetensors": n_opened,
        "tensors above 4 KB that are not 64-byte aligned": [
            t.name for t in large if t.begin % 64 and not t.name.endswith("row_offsets")
        ],
    }


def kept_weights_equal(path: Path, model: Path) -> bool:
    """Tell whether every kept weight has the bits of the source's."""
    file, checkpoint = salr.open(path), Checkpoint(model)
    return all(
        np.array_equal(
            np.frombuffer(checkpoint.raw(entry.source_tensor), np.uint16).reshape(entry.shape)[
                file.module(name).mask()
            ],
            file.module(name).stored(),
        )
        for name, entry in file.modules.items()
    )


def make_lora(model: Path, out: Path) -> None:
    """Save a LoRA with random factors, made by the peft library."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(out)


def merge_difference(path: Path, lora: Path, folder: Path) -> float:
    """Return the largest difference, over all weights, of `unpack --merge` from peft's merge of the unpacked base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    salr.unpack(path, folder / "merged", merge=True, dtype="fp32")
    salr.unpack(path, folder / "base", dtype="fp32")
    ours = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).state_dict()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, lora).merge_and_unload().state_dict()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)


def adapters_equal(path: Path, lora: Path) -> bool:
    """Tell whether every trained factor is stored bit for bit."""
    file, equal, count = salr.open(path), True, 0
    with safe_open(lora / "adapter_model.safetensors", framework="np") as trained:
        for name, entry in file.modules.items():
            for adapter in entry.adapters:
                if adapter.name == "lora":
                    for factor in ("A", "B"):
                        found = trained.get_tensor(f"base_model.model.{name}.lora_{factor}.weight")
                        equal &= np.array_equal(found, file.tensor(f"{name}.lora_{factor}.lora"))
                        count += 1
    return equal and count > 0


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, two, tuned, lora = folder / "one.salr", folder / "two.salr", folder / "tuned.salr", folder / "lora"
        for out, workers in ((one, 1), (two, 2)):
            salr.convert(args.model, out, ConvertOptions(method="magnitude", workers=workers))
        facts = size_facts(one)
        make_lora(args.model, lora)
        salr.convert(args.model, tuned, ConvertOptions(method="magnitude", adapters=(("lora", lora),)))
        mismatches = [str(p) for _, p in compare_with_source(salr.open(one), args.model) if p is not None]
        difference = merge_difference(tuned, lora, folder)
        checks = {
            "1 and 2 workers give the same bytes": file_digest(one) == file_digest(two),
            "kept weights have the source's bits": kept_weights_equal(one, args.model),
            "verify --against finds nothing": not mismatches,
            "adapters have the trained bits": adapters_equal(tuned, lora),
            "large tensors are aligned": not facts["tensors above 4 KB that are not 64-byte aligned"],
            "unpack --merge equals peft's merge within 1e-6": difference < 1e-6,
        }
    result = {**facts, "largest difference from peft's merge": difference, **checks}
    for key, value in result.items():
        print(f"{key:<52} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))
    return 0 if all(checks.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
