"""The protocol of an evaluation: which tokens are predicted, from which context.

Invariant: the whole text is one string; every window of ``window`` tokens is scored alone; a remainder shorter than
one window is dropped; no token is scored twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..formats.errors import OptionError
from .errors import EvaluationError


@dataclass(frozen=True)
class EvalOptions:
    """How to evaluate.

    ``window`` and ``stride`` are tokens (stride 0: as the window, so windows do not overlap); ``max_windows`` takes
    the first ones only; ``device`` is cpu (float32) or cuda[:i] (float32 weights, bf16 autocast).
    """

    window: int = 1024
    stride: int = 0
    max_windows: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.window < 2:
            raise OptionError(f"window {self.window}", needed="at least 2 tokens")
        if not 0 <= self.stride <= self.window:
            raise OptionError(f"stride {self.stride}", needed=f"0 (the window) to the window's {self.window} tokens")
        if self.max_windows is not None and self.max_windows < 1:
            raise OptionError(f"max_windows {self.max_windows}", needed="at least 1")
        if self.device != "cpu" and self.device.partition(":")[0] != "cuda":
            raise OptionError(f"device {self.device!r}", needed="cpu or cuda[:i]")

    @property
    def step(self) -> int:
        """Tokens from one window's start to the next one's."""
        return self.stride or self.window

    @property
    def precision(self) -> str:
        """The arithmetic of the forward pass."""
        return "float32" if self.device == "cpu" else "float32 weights, bf16 autocast"


class Window(NamedTuple):
    """Tokens ``start`` to ``stop`` of the text; predictions ``first`` to the window's end - 1 count.

    Prediction i is that of the window's token i + 1.
    """

    start: int
    stop: int
    first: int

    @property
    def n_scored(self) -> int:
        """Predictions that count."""
        return self.stop - self.start - 1 - self.first


@dataclass(frozen=True)
class Text:
    """The text to predict, under the name it is reported by."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Digest of the text in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(text: str | Path) -> Text:
    """Return the text itself, or what the file at a Path holds, byte for byte in UTF-8.

    Raises:
        EvaluationError: the file is missing, is no UTF-8 text, or there is nothing in it.
    """
    if isinstance(text, Path):
        try:
            found = Text(text.name, text.read_bytes().decode("utf-8"))
        except OSError as error:
            raise EvaluationError(
                f"the text cannot be read ({error.strerror})", path=text, fix="check the path"
            ) from error
        except UnicodeDecodeError as error:
            raise EvaluationError("is no UTF-8 text", path=text, needed="a plain text file") from error
    else:
        found = Text("text", text)
    if not found.content.strip():
        raise EvaluationError("there is no text in it", path=text if isinstance(text, Path) else None)
    return found


def plan_windows(n_tokens: int, options: EvalOptions) -> list[Window]:
    """Return the windows over ``n_tokens`` tokens; empty if there is not even one.

    The first scores window - 1 predictions; each other one those of its tokens that no window before it scored.
    """
    n_windows = max(0, (n_tokens - options.window) // options.step + 1)
    starts = [number * options.step for number in range(min(n_windows, options.max_windows or n_windows))]
    later = max(0, options.window - 1 - options.step)
    return [Window(start, start + options.window, later if start else 0) for start in starts]


def n_scored(windows: Sequence[Window]) -> int:
    """Return the predictions that count over all windows."""
    return sum(window.n_scored for window in windows)
