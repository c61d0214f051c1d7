"""Which runs are wanted next, from those that are done.

Invariant: the plan is a function of the results alone, so that a call goes on where the one before it was cut.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .training import Protocol
from .variants import SEEDS, Variant


@dataclass(frozen=True)
class Task:
    """What a worker is given: a run, or (``variant`` None) a base to convert."""

    base: str
    variant: Variant | None = None
    rate: float = 0.0
    seed: int = 0
    wants_before: bool = False
    #: exact match takes as long as training: it is left out while the rate is searched
    wants_exact: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells tasks apart."""
        return self.base, self.variant and self.variant.name, self.rate, self.seed


class Results:
    """Lines of a JSON-lines file: the protocol first, then bases, starting scores and runs as they come."""

    def __init__(self, path: Path, protocol: Protocol | None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]  # a kill may have left part of a line
            if whole != text:
                path.write_text(whole)
            self.rows = [json.loads(line) for line in whole.splitlines()]
        expected = None if protocol is None else asdict(protocol)
        if not self.rows and protocol is not None:
            self.add([{"kind": "protocol", **(expected or {})}])
        found = {name: value for name, value in self.of("protocol")[0].items() if name != "kind"} if self.rows else None
        if expected is not None and found != expected:
            raise SystemExit(f"{path} holds results of {found}, not of {expected}: give another --out")

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows, whole lines at once."""
        new = list(rows)
        self.rows += new
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the rows of a kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def runs(self, variant: Variant) -> dict[tuple[float, int], dict[str, Any]]:
        """Return the runs of a variant by rate and seed."""
        return {(row["rate"], row["seed"]): row for row in self.of("run") if row["variant"] == variant.name}


def best_rate(variant: Variant, runs: dict[tuple[float, int], dict[str, Any]]) -> float | None:
    """Return the rate of seed 0 with the least held-out NLL; None before any run."""
    first = {rate: held_out(row) for (rate, seed), row in runs.items() if seed == SEEDS[0]}
    return min(first, key=lambda rate: first[rate]) if first else None


def held_out(row: dict[str, Any]) -> float:
    """Return a run's held-out NLL, infinite where it is no number."""
    value = float(row["held_out_nll"])
    return value if math.isfinite(value) else math.inf


def wanted(variant: Variant, runs: dict[tuple[float, int], dict[str, Any]]) -> list[tuple[float, int]]:
    """Return (rate, seed) of the runs to make next: the bracket, one rate beyond its end, then the other seeds."""
    bracket = [(rate, SEEDS[0]) for rate in variant.rates if (rate, SEEDS[0]) not in runs]
    if bracket:
        return bracket
    lowest, highest = min(variant.rates), max(variant.rates)
    inside = {key: row for key, row in runs.items() if lowest <= key[0] <= highest}
    best = best_rate(variant, inside)
    beyond = {lowest: lowest / 2, highest: highest * 2}.get(best or 0.0)
    if beyond is not None and (beyond, SEEDS[0]) not in runs:
        return [(beyond, SEEDS[0])]
    rate = best_rate(variant, runs)
    return [(rate, seed) for seed in SEEDS if rate is not None and (rate, seed) not in runs]


def tasks(variants: Sequence[Variant], results: Results, work: Path, taken: set[tuple[Any, ...]]) -> list[Task]:
    """Return the tasks that can be begun now, the most important first; ``taken`` are under way or given up."""
    found: list[Task] = []
    known = {row["base"] for row in results.of("before")}
    for variant in variants:
        if variant.base != "dense" and not (work / f"{variant.base}.salr").is_file():
            found.append(Task(variant.base))
            continue
        runs = results.runs(variant)
        for rate, seed in wanted(variant, runs):
            found.append(Task(variant.base, variant, rate, seed, variant.base not in known, seed != SEEDS[0]))
    unique: dict[tuple[Any, ...], Task] = {}
    for task in found:
        unique.setdefault(task.key, task)
    return [task for key, task in unique.items() if key not in taken]
