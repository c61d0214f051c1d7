"""The README.md of an exported directory: what the model was made from, how, and what that cost.

Invariant: every number is read from the file's manifest, its tensor sizes, or a recorded evaluation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...formats.manifest import RESIDUAL
from ...formats.reader import SalrFile
from ..adapters.summary import list_adapters
from ..report import error_report, size_report, worst_modules

_TAGS = ("salr", "sparse", "low-rank", "compressed")
_WORST = 5


@dataclass(frozen=True)
class CardEvaluation:
    """A recorded evaluation as a table: how it was measured, names of the columns, one row a model."""

    protocol: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def model_card(file: SalrFile, evaluation: CardEvaluation | None = None) -> str:
    """Return the model card of a .salr file, YAML front matter first."""
    source = file.manifest.source
    parts = [
        f"---\n{_front_matter(source)}\n---",
        f"# {file.path.stem}\n\n{_lead(source)}",
        "\n".join(_USAGE),
        f"## Sizes\n\n{_sizes(file)}",
        f"## Errors\n\n{_errors(file)}",
        f"## Evaluation\n\n{_evaluation(evaluation)}",
        f"## Adapters\n\n{_adapters(file)}",
        f"## Recipe\n\n```json\n{json.dumps(file.manifest.options, indent=2, sort_keys=True)}\n```",
        f"## Provenance\n\n{_provenance(file)}",
    ]
    return "\n\n".join(parts) + "\n"


_USAGE = (
    "## Use",
    "",
    "```python",
    "import salr  # pip install salr; without it this directory does not load",
    "from transformers import AutoModelForCausalLM",
    "",
    'model = AutoModelForCausalLM.from_pretrained("this directory")',
    "```",
)


def _front_matter(source: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=_text(source.get("repository")),
        license=_text(source.get("license")),
        library_name="transformers",
        tags=list(_TAGS),
    )
    return str(data.to_yaml()).strip()


def _lead(source: dict[str, Any]) -> str:
    kind = _text(source.get("class")) or _text(source.get("architecture")) or "model"
    origin = f" from `{source['repository']}`" if _text(source.get("repository")) else ""
    return (
        f"A {kind}{origin}, packed by SALR: linear layers as kept weights and low-rank adapters, everything else as it "
        "was. Files that came with the model (licence, notices, tokenizer) are in this directory."
    )


def _sizes(file: SalrFile) -> str:
    sizes = size_report(file)
    rows = [
        ("packed weights", _mb(sizes.packed_source_bytes), _mb(sizes.packed_bytes)),
        ("kept dense", _mb(sizes.kept_bytes), _mb(sizes.kept_bytes)),
        ("all", _mb(sizes.source_bytes), f"{_mb(sizes.file_bytes)} ({sizes.file_bytes / sizes.source_bytes:.2f}x)"),
    ]
    bits = f"{sizes.bits_per_weight:.2f} bits a packed weight, {sizes.bits_without_adapters:.2f} without adapters."
    return f"{_table(('', 'before', 'here'), rows)}\n\n{bits}"


def _errors(file: SalrFile) -> str:
    error = error_report(file.modules)
    bound = "none: " + str(error.no_bound_because) if error.bound is None else _percent(error.bound)
    rows = [
        ("what the mask removed", _percent(error.mask)),
        (f"left with the residual{', ' + error.before if error.before else ''}", _percent(error.residual)),
        ("bound of the theorem", bound),
        *((f"worst: `{name}`", _percent(share)) for name, share in worst_modules(file.modules, _WORST)),
    ]
    return _table(("squared error, share of the weights' own square", ""), rows)


def _evaluation(evaluation: CardEvaluation | None) -> str:
    if evaluation is None:
        return "None was recorded. `salr eval FILE --reference SOURCE --text TEXT` measures perplexity and agreement."
    return f"{_table(evaluation.columns, evaluation.rows)}\n\n{evaluation.protocol}"


def _adapters(file: SalrFile) -> str:
    rows = [
        (
            f"`{adapter.name}`",
            "corrects what the mask removed" if adapter.name == RESIDUAL else "; ".join(adapter.origins),
            str(adapter.n_modules),
            _range(adapter.ranks),
            _range(adapter.scalings),
            _mb(adapter.n_bytes),
        )
        for adapter in list_adapters(file.path)
    ]
    return _table(("name", "what", "modules", "rank", "scaling", "size"), rows) if rows else "None."


def _provenance(file: SalrFile) -> str:
    manifest = file.manifest
    known = {
        "made by": manifest.generator,
        "source": _text(manifest.source.get("repository")),
        "revision": _text(manifest.source.get("revision")),
        **{str(key): str(value) for key, value in manifest.environment.items()},
    }
    files = manifest.source.get("files")
    digests = [
        (f"`{entry.get('name')}`", f"`{entry.get('sha256')}`")
        for entry in (files if isinstance(files, list) else [])
        if isinstance(entry, dict)
    ]
    fates = ", ".join(
        f"{count} {fate}" for fate, count in sorted(Counter(line.fate for line in manifest.ledger).items())
    )
    return "\n\n".join([
        _table(("", ""), [(key, value) for key, value in known.items() if value]),
        _table(("input file", "SHA-256"), digests),
        f"Every input tensor is accounted for in the manifest: {fates}. Every tensor has a checksum: `salr verify`.",
    ])  # fmt: skip


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value.isprintable() and value else None


def _range(numbers: Sequence[float]) -> str:
    return f"{numbers[0]:g}" if len(numbers) == 1 else f"{numbers[0]:g} to {numbers[-1]:g}"


def _mb(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:.1f} MB"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
