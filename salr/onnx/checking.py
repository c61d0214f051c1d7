"""Does an exported graph compute what torch computes? ONNX Runtime, with the native library and without it.

Invariant: what is compared are all outputs for a prompt and for one more token; the torch side decodes every weight in
float32. Nothing here decides by a figure that was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..formats.dtypes import Array
from ..runtime.loading import load
from .errors import ExportError, LibraryError
from .genai import GRAPH_NAME
from .library import get_library_path
from .signature import Signature, signature_of

#: largest difference that is let pass, in units of the largest output, by the graph's activations
TOLERANCES = {"fp32": 1e-4, "fp16": 5e-2}
_PROMPT, _SEED = 8, 0


@dataclass(frozen=True)
class Verification:
    """Largest difference of any output from torch's, in units of the largest output; None where it was not run.

    ``library_missing`` says why the native library could not be used.
    """

    with_body: float
    with_library: float | None
    library_missing: str | None = None


def verify_export(folder: Path, path: Path, dtype: str) -> Verification:
    """Compare the graph in ``folder`` with the model of the .salr file at ``path``.

    Raises:
        ExportError: they differ by more than ``TOLERANCES``.
    """
    model = load(path, dtype="fp32", backend="reference")
    signature = signature_of(model)
    with_body = _largest_difference(folder, signature, dtype, None)
    try:
        library = get_library_path()
    except LibraryError as error:
        return _judged(Verification(with_body, None, str(error)), folder, dtype)
    return _judged(Verification(with_body, _largest_difference(folder, signature, dtype, library)), folder, dtype)


def session(graph: Path, library: Path | None = None, threads: int = 0) -> Any:
    """Return an ONNX Runtime session on the CPU; ``threads`` 0 leaves the number to it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def _judged(verification: Verification, folder: Path, dtype: str) -> Verification:
    for label, found in (("the function body", verification.with_body), ("the library", verification.with_library)):
        if found is not None and not found <= TOLERANCES[dtype]:
            raise ExportError(
                f"with {label} ONNX Runtime differs from torch by {found:.2g} of the largest output",
                path=folder / GRAPH_NAME,
                needed=f"at most {TOLERANCES[dtype]:.0e}",
                fix="report this model; --no-verify writes it all the same",
            )
    return verification


def _largest_difference(folder: Path, signature: Signature, dtype: str, library: Path | None) -> float:
    runner, worst = session(folder / GRAPH_NAME, library), 0.0
    random = torch.Generator().manual_seed(_SEED)
    vocabulary = signature.wrapper.model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    ids = torch.randint(0, int(vocabulary), (1, _PROMPT + 1), generator=random)
    past: list[torch.Tensor] = []
    for begin, end in ((0, _PROMPT), (_PROMPT, _PROMPT + 1)) if signature.is_decoder else ((0, _PROMPT + 1),):
        inputs = _inputs(signature, ids[:, begin:end], end, past)
        expected = _torch_outputs(signature, inputs)
        found = runner.run(None, _feed(signature, inputs, dtype))
        for one, other in zip(found, expected, strict=True):
            worst = max(worst, _difference(np.asarray(one, np.float32), other.numpy()))
        past = expected[1:]
    return worst


def _difference(found: Array, expected: Array) -> float:
    """Return the largest difference in units of the largest output; infinite for NaN where there should be none."""
    difference = np.abs(found - expected).max(initial=0) / max(float(np.abs(expected).max(initial=0)), 1e-30)
    return float(difference) if np.isfinite(difference) else float("inf")


def _inputs(signature: Signature, ids: torch.Tensor, total: int, past: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the graph's inputs in order: ``ids`` (1, S) are the last of ``total`` tokens."""
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones(1, total, dtype=torch.int64),
        "position_ids": torch.arange(total - ids.shape[1], total)[None],
        "token_type_ids": torch.zeros_like(ids),
    }
    plain = [made[name] for name in signature.input_names if name in made]
    if not signature.is_decoder:
        return plain
    empty = [tensor[:1, :, :0] for pair in signature.inputs[-1] for tensor in pair]
    return [*plain, *(past or empty)]


def _torch_outputs(signature: Signature, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    n_plain = sum(not name.startswith("past_key_values.") for name in signature.input_names)
    plain, past = inputs[:n_plain], inputs[n_plain:]
    with torch.inference_mode():
        if not signature.is_decoder:
            return list(signature.wrapper(*plain))
        logits, layers = signature.wrapper(*plain, list(zip(past[::2], past[1::2], strict=True)))
    return [logits, *(tensor for layer in layers for tensor in layer)]


def _feed(signature: Signature, inputs: list[torch.Tensor], dtype: str) -> dict[str, Array]:
    half = dtype == "fp16"
    return {
        name: (tensor.half() if half and tensor.is_floating_point() else tensor).numpy()
        for name, tensor in zip(signature.input_names, inputs, strict=True)
    }
