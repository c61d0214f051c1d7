"""What an evaluation found, as data and as the JSON that `salr eval --save` writes and `salr inspect --eval` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..formats.reader import SalrFile
from .errors import EvaluationError
from .protocol import EvalOptions, Text

KIND = "salr-evaluation"


@dataclass(frozen=True)
class EvalResult:
    """One model on one text.

    ``nll`` and ``kl`` (reference || model) are nats a scored token, ``ratio`` is perplexity over the reference's,
    ``agreement`` the share of positions with the reference's first choice; None without a reference.
    ``bits_per_weight`` is of the packed weights, adapters counted; of all parameters for a dense directory.
    """

    model: str
    architecture: str
    is_reference: bool
    perplexity: float
    nll: float
    n_scored: int
    n_windows: int
    n_tokens: int
    n_bytes: int
    bits_per_weight: float
    seconds: float
    ratio: float | None = None
    agreement: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """Results with the protocol they were measured by."""

    protocol: dict[str, Any]
    results: tuple[EvalResult, ...]


def as_json(results: Sequence[EvalResult], text: Text, options: EvalOptions) -> dict[str, Any]:
    """Return results and protocol as JSON values."""
    protocol = {
        "text": text.name,
        "text_sha256": text.sha256,
        "window": options.window,
        "stride": options.step,
        "max_windows": options.max_windows,
        "device": options.device,
        "precision": options.precision,
    }
    return {"kind": KIND, "protocol": protocol, "results": [asdict(result) for result in results]}


def read_results(path: str | Path) -> Evaluation:
    """Read what `salr eval --save` wrote.

    Raises:
        EvaluationError: the file is missing, or is something else.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EvaluationError(f"cannot be read ({error.strerror})", path=path, fix="check the path") from error
    except (ValueError, RecursionError) as error:
        raise _not_results(path, "is not JSON") from error
    if not isinstance(value, dict) or value.get("kind") != KIND:
        raise _not_results(path, f"has no kind {KIND!r}")
    protocol, rows = value.get("protocol"), value.get("results")
    if not isinstance(protocol, dict) or not isinstance(rows, list):
        raise _not_results(path, "has no protocol or no results")
    return Evaluation(protocol, tuple(_parse(row, path) for row in rows))


def results_of(file: SalrFile, path: str | Path) -> Evaluation:
    """Read what `salr eval --save` wrote of a file, which is told by its size.

    Raises:
        EvaluationError: as ``read_results``, or it holds results of others only.
    """
    found = read_results(path)
    if all(result.is_reference or result.n_bytes != file.n_bytes for result in found.results):
        others = ", ".join(result.model for result in found.results) or "nothing"
        raise EvaluationError(
            f"holds results of {others}",
            path=Path(path),
            needed=f"of {file.path}, {file.n_bytes} bytes",
            fix="run `salr eval --save` on it",
        )
    return found


def _parse(row: Any, path: Path) -> EvalResult:
    """Check one result's keys and types; unknown keys are ignored."""
    if not isinstance(row, dict):
        raise _not_results(path, "holds a result that is no object")
    values: dict[str, Any] = {}
    for field in fields(EvalResult):
        kinds = _KINDS[str(field.type)]
        value = row.get(field.name)
        if type(value) not in kinds or (isinstance(value, float) and not math.isfinite(value)):
            raise _not_results(path, f"has {field.name} {value!r:.40}")
        values[field.name] = value
    return EvalResult(**values)


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "float | None": (float, int, type(None)),
}


def _not_results(path: Path, found: str) -> EvaluationError:
    return EvaluationError(found, path=path, needed="a file that `salr eval --save` wrote")
