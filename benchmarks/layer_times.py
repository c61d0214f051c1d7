"""What the benchmarks of one layer share: a row of the table, its line, and the processor's name."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """Times of one layer in milliseconds, fastest and median, by kind of product."""

    shape: str
    n_inputs: int
    threads: int
    fastest_ms: dict[str, float]
    median_ms: dict[str, float]

    def line(self, dense: tuple[str, ...]) -> str:
        """Return a line of the table: milliseconds of all, then what ours gains over the faster of ``dense``.

        Gains are those of the fastest and of the median calls.
        """
        cells = [self.shape, str(self.threads), str(self.n_inputs)]
        cells += [f"{ms:.2f}" for kind, ms in self.fastest_ms.items() if not kind.startswith("salr")]
        for kind, ms in self.fastest_ms.items():
            if kind.startswith("salr"):
                gains = [min(times[d] for d in dense) / times[kind] for times in (self.fastest_ms, self.median_ms)]
                cells.append(f"{ms:.2f}, {gains[0]:.2f}x ({gains[1]:.2f}x)")
        return "| " + " | ".join(cells) + " |"


def processor() -> str:
    """Return the processor's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
