"""What a conversion may be asked for.

Invariant: an options object is valid in itself; what depends on the checkpoint is checked by the plan.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..formats.errors import CalibrationError, OptionError
from .module_options import RECORDED, SETTINGS, ModuleOptions, matches

SCOPES = ("layer", "row", "global")
PATTERNS = ("unstructured", "2:4")
DEFAULT_ROUNDS = 60
SYNTHETIC = "synthetic"
SYNTHETIC_SAMPLES = 16
NO_DATA = "none"
#: of windows, of tokens in a window, and as a seed
_MAX_NUMBER = 2**31 - 1


@dataclass(frozen=True)
class Method:
    """What a method needs and how its kept values come about.

    ``scope``: where weights compete by default. ``sequential``: its statistics come from inputs that went through the
    blocks already packed, otherwise from the source's own. ``corrects``: its target makes up for the difference.
    """

    needs_data: bool
    scope: str
    values_from: str
    sequential: bool = False
    corrects: bool = False


METHODS = {
    "magnitude": Method(False, "layer", "source"),
    "alternating": Method(False, "row", "source_minus_residual"),
    "wanda": Method(True, "row", "source", sequential=True),
    "sparsegpt": Method(True, "layer", "refit", sequential=True),
    "joint": Method(True, "row", "refit", sequential=True, corrects=True),
}


@dataclass(frozen=True)
class CalibrationOptions:
    """Where calibration tokens come from.

    Args:
        text: a .txt or .jsonl file, ``synthetic`` for random tokens, or ``none``.
        samples: windows. length: tokens a window. seed: of their choice.
    """

    text: str
    samples: int = 64
    length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (("samples", self.samples, 1), ("length", self.length, 1), ("seed", self.seed, 0)):
            if type(value) is not int or not least <= value <= _MAX_NUMBER:
                needed = f"an integer, {least} or more, up to {_MAX_NUMBER}"
                raise OptionError(f"--calibration: {name} {value!r}", needed=needed)

    def recorded(self) -> dict[str, Any]:
        """Return what the manifest keeps: no path, but the text's digest.

        Raises:
            CalibrationError: the text cannot be read.
        """
        try:
            digest = None if self.text == SYNTHETIC else hashlib.sha256(Path(self.text).read_bytes()).hexdigest()
        except OSError as error:
            raise CalibrationError(f"cannot be read ({error.strerror})", path=self.text) from error
        kind = {"kind": SYNTHETIC} if digest is None else {"kind": "text", "sha256": digest}
        return {**kind, "samples": self.samples, "length": self.length, "seed": self.seed}


@dataclass(frozen=True)
class ConvertOptions:
    """Options of ``salr.convert``; those of the command line carry the same names.

    Args:
        module: defaults for every packed module.
        method: how mask and residual are chosen; ``magnitude`` is the paper's. None for ``joint`` with calibration
            and ``alternating`` without.
        scope: where weights compete: within a layer, an output row, or the whole model (``global``, for magnitude).
            None for the method's own.
        pattern: ``unstructured``, or ``2:4`` to keep two of every four weights along a row.
        rounds: of alternation in ``alternating`` and ``joint``.
        calibration: the data that ``wanda``, ``sparsegpt`` and ``joint`` need. ``alternating`` takes random tokens
            where it is None, and weights alone where its text is ``none``.
        include, exclude: globs or ``re:`` patterns of module names to pack besides, or to keep dense.
        overrides: (pattern, settings) pairs that replace fields of ``module``; later ones win.
        adapters: (name, directory) of LoRA adapters to keep exact.
        base: the base model when the source is an adapter directory.
        revision: branch, tag or commit, when the source is an id of the Hugging Face hub.
        target_bits: mean bits per packed weight, adapters counted; chooses sparsity and rank of each module, and its
            values and adapter values where ``module`` has the source's.
        device: ``cpu``, ``cuda`` for every GPU that is visible, or ``cuda:i,...``; they must be of one kind.
        workers: threads that convert modules; None for one a core, at most 8. Never changes the bytes.
        force: replace an existing output. fresh: discard what an interrupted run left.
        max_shard_size: bytes; the output becomes a directory of shards of about this size.
        part: (i, n) makes the i-th of n shards only, into the output as a directory; ``join`` puts them together.
        plan_file: keeps the decisions that look at the whole model (``target_bits``, scope ``global``): written where
            it is missing, which parts refuse, and used where it fits.
    """

    module: ModuleOptions = field(default_factory=ModuleOptions)
    method: str | None = None
    scope: str | None = None
    pattern: str = "unstructured"
    rounds: int = DEFAULT_ROUNDS
    calibration: CalibrationOptions | None = None
    target_bits: float | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    adapters: tuple[tuple[str, Path], ...] = ()
    base: Path | None = None
    revision: str | None = None
    device: str = "cpu"
    workers: int | None = None
    force: bool = False
    fresh: bool = False
    max_shard_size: int | None = None
    part: tuple[int, int] | None = None
    plan_file: Path | None = None

    def __post_init__(self) -> None:
        _check_choice("method", self.chosen_method, tuple(METHODS))
        _check_choice("scope", self.chosen_scope, SCOPES)
        _check_choice("pattern", self.pattern, PATTERNS)
        for name, count in (("rounds", self.rounds), ("workers", self.workers)):
            if count is not None and count < 1:
                raise OptionError(f"{count} {name}", needed="1 or more")
        self._check_data()
        self._check_selection()
        self._check_division()
        self._check_names()

    def _check_data(self) -> None:
        """Refuse a method that lacks its data, and data that the method would not use."""
        if self.method_info.needs_data and (self.calibration is None or self.calibration.text == NO_DATA):
            raise OptionError(f"method {self.method!r}", needed="--calibration", fix="give a text, or 'synthetic'")
        if self.calibration is not None and self.chosen_method == "magnitude":
            raise OptionError("method 'magnitude' uses no data", fix="drop --calibration, or use --method joint")

    def _check_selection(self) -> None:
        """Refuse scopes, patterns and budgets that contradict each other."""
        if self.chosen_scope == "global" and (self.method != "magnitude" or self.pattern != "unstructured"):
            raise OptionError("scope 'global'", needed="--method magnitude and an unstructured pattern")
        sparsities = [self.module.sparsity, *(s["sparsity"] for _, s in self.overrides if "sparsity" in s)]
        if self.pattern == "2:4" and any(sparsity != 0.5 for sparsity in sparsities):
            raise OptionError(
                "pattern 2:4 with another sparsity",
                needed="--sparsity 0.5",
                fix="drop --sparsity, or give it beside --preset",
            )
        if self.target_bits is not None and not _is_positive(self.target_bits):
            raise OptionError(f"--target-bits {self.target_bits!r}", needed="a positive number")
        if self.target_bits is not None and (self.chosen_scope == "global" or self.pattern != "unstructured"):
            raise OptionError("--target-bits", needed="an unstructured pattern and scope layer or row")

    def _check_division(self) -> None:
        """Refuse shards and parts that make no sense."""
        if self.max_shard_size is not None and self.max_shard_size < 1:
            raise OptionError(f"--max-shard-size {self.max_shard_size}", needed="a positive size, as 5GB")
        if self.plan_file is not None and self.part is None and not self.looks_at_whole_model:
            raise OptionError("--plan", needed="--part, --target-bits or --scope global", fix="drop --plan")
        if self.part is None:
            return
        if not 1 <= self.part[0] <= self.part[1]:
            raise OptionError(f"--part {self.part[0]}/{self.part[1]}", needed="i/n with 1 <= i <= n")
        if self.max_shard_size is not None:
            raise OptionError("--part with --max-shard-size", needed="one of them: parts are shards already")
        if self.data is not None and self.method_info.sequential:
            raise OptionError(
                f"--part with method {self.chosen_method!r}",
                needed="a method that fits each module by itself",
                fix="drop --part: with calibration each block is fitted to what those before it give",
            )

    def _check_names(self) -> None:
        """Refuse unknown settings and two adapters of one name."""
        for pattern, settings in self.overrides:
            for name in settings:
                if name not in SETTINGS:
                    raise OptionError(f"--set {pattern}: unknown setting {name!r}", needed=", ".join(SETTINGS))
        names = [name for name, _ in self.adapters]
        if len(set(names)) != len(names):
            raise OptionError("two adapters have one name", fix="name them: --adapter NAME=DIR")

    @property
    def chosen_method(self) -> str:
        """The method asked for, or the default with or without data."""
        has_text = self.calibration is not None and self.calibration.text not in (SYNTHETIC, NO_DATA)
        return self.method or ("joint" if has_text else "alternating")

    @property
    def data(self) -> CalibrationOptions | None:
        """The calibration to use: what was asked for, or random tokens for ``alternating``."""
        if self.calibration is None:
            return CalibrationOptions(SYNTHETIC, SYNTHETIC_SAMPLES) if self.chosen_method == "alternating" else None
        return None if self.calibration.text == NO_DATA else self.calibration

    @property
    def method_info(self) -> Method:
        """What the chosen method needs."""
        return METHODS[self.chosen_method]

    @property
    def looks_at_whole_model(self) -> bool:
        """Whether decisions about a module depend on all others."""
        return self.target_bits is not None or self.chosen_scope == "global"

    @property
    def chosen_scope(self) -> str:
        """The scope asked for, or the method's own."""
        return self.scope or self.method_info.scope

    def for_module(self, name: str) -> ModuleOptions:
        """Return the settings of module ``name``, overrides applied in order."""
        chosen = self.module
        for pattern, settings in self.overrides:
            if matches(pattern, name):
                chosen = replace(chosen, **settings)
        return chosen

    def recorded(self) -> dict[str, Any]:
        """Return the options that shape the bytes, for the manifest."""
        return {
            **asdict(self.module),
            "sparsity": float(self.module.sparsity),
            "method": self.chosen_method,
            "scope": self.chosen_scope,
            "pattern": self.pattern,
            "rounds": self.rounds,
            "target_bits": self.target_bits,
            "calibration": None if self.data is None else self.data.recorded(),
            "include": list(self.include),
            "exclude": list(self.exclude),
            "set": [[pattern, dict(settings)] for pattern, settings in self.overrides],
        }

    @staticmethod
    def from_recorded(recorded: Mapping[str, Any], **run: Any) -> ConvertOptions:
        """Return the options that a manifest records, with ``run`` for those that shape no bytes.

        Of calibration only its being there is known: enough to plan, not to convert.
        """
        return ConvertOptions(
            pattern=recorded.get("pattern", "unstructured"),
            rounds=recorded.get("rounds", DEFAULT_ROUNDS),
            calibration=CalibrationOptions(SYNTHETIC) if recorded.get("calibration") else None,
            module=ModuleOptions(**{name: recorded[name] for name in RECORDED if name in recorded}),
            method=recorded["method"],
            scope=recorded["scope"],
            include=tuple(recorded["include"]),
            exclude=tuple(recorded["exclude"]),
            overrides=tuple((pattern, settings) for pattern, settings in recorded["set"]),
            **run,
        )


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{name} {value!r}", needed="one of " + ", ".join(choices))
