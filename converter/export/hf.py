"""From a .salr file to a directory that transformers loads, packed.

Invariant: the weight file holds the .salr file's very bytes under a name that transformers accepts; of what the model
came with, only config.json differs, and README.md says what was done. Without SALR such a directory fails to load
instead of loading at random.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from ...formats.errors import FormatError, OutputError
from ...formats.output_directory import output_directory
from ...formats.reader import SalrFile
from .model_card import CardEvaluation, model_card

WEIGHTS = "weights.salr.safetensors"
GUARD = (
    "This model is packed by SALR. `pip install salr` and add `import salr` before loading it with transformers: "
    "without it the packed weights would be replaced by random ones."
)


def export_hf(path: str | Path, out: str | Path, evaluation: CardEvaluation | None = None) -> Path:
    """Write the model of a .salr file as a directory for ``AutoModel...from_pretrained`` after ``import salr``.

    Args:
        path: the .salr file.
        out: the directory to make, with a model card.
        evaluation: for the card.

    Raises:
        SalrError: the file is damaged or carries no config.json, or the output exists or cannot be written.
    """
    file = SalrFile(path)
    file.require_one_file("salr export hf")
    config = exported_config(file)
    with output_directory(out) as partial, file.checked():
        try:
            for name in file.assets:
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                (partial / name).write_bytes(file.asset(name))
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            (partial / "README.md").write_text(model_card(file, evaluation), encoding="utf-8")
            shutil.copyfile(path, partial / WEIGHTS)
        except OSError as error:
            raise OutputError(
                f"writing failed ({error.strerror})", path=out, fix="free disk space, or choose another output"
            ) from error
    return Path(out)


def exported_config(file: SalrFile) -> dict[str, Any]:
    """Return the model's config with what makes transformers load it packed.

    Raises:
        FormatError: the file carries no config.json, or that is no JSON object.
    """
    config = None
    if "config.json" in file.assets:
        try:
            config = json.loads(file.asset("config.json"))
        except (ValueError, RecursionError):
            config = None
    if not isinstance(config, dict):
        raise FormatError(
            "is missing or no JSON object",
            path=file.path,
            tensor="assets/config.json",
            fix="convert the model again from its directory",
        )
    return config | {
        "quantization_config": {"quant_method": "salr", "weights": WEIGHTS},
        "transformers_weights": GUARD,
    }
