"""The ledger's lines for a checkpoint: what became of each tensor of its files.

Invariant: each input has exactly one line, whether one tensor of the model is made from it, several, or none.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..formats.manifest import LedgerLine
from .sources.checkpoint import Checkpoint


def ledger_lines(checkpoint: Checkpoint, fates: Mapping[str, tuple[str, str]]) -> list[LedgerLine]:
    """Return a line for each input of ``checkpoint``; ``fates`` gives fate and reason of each of its tensors."""
    uses: dict[str, list[str]] = {}
    for name in sorted(fates):
        uses.setdefault(checkpoint.origin(name), []).append(name)
    lines = []
    for key, names in uses.items():
        names.sort(key=lambda name: (fates[name][0] != "packed", name != key, name))
        fate, reason = fates[names[0]]
        other = "" if names == [key] else f"; as {', '.join(sorted(names))}"
        lines.append(LedgerLine(key, fate, reason + other, checkpoint.inputs[key].file))
    for key, (fate, reason) in checkpoint.set_aside().items():
        lines.append(LedgerLine(key, fate, reason, checkpoint.inputs[key].file))
    return lines
