"""`salr doctor`: which backends can be used here, and why the others cannot."""

from __future__ import annotations

from dataclasses import asdict

from . import console
from .table import show_table


def doctor(as_json: console.Json = False) -> None:
    """Show devices, backends and library versions; say why a backend cannot be used."""
    from ..runtime.doctor import diagnose

    found = diagnose()
    if as_json:
        return console.say_json(asdict(found))
    console.say(f"Python {found.python}, {found.system}")
    console.say("  ".join(f"{name} {version or '-'}" for name, version in found.libraries.items()))
    console.say()
    show_table(
        ["device", "kind", "free memory", "backend"],
        [
            [d.name, d.kind, "?" if d.free_bytes is None else console.megabytes(d.free_bytes), d.backend]
            for d in found.devices
        ],
        left=4,
    )
    console.say()
    show_table(["backend", "here"], [[b.name, b.reason or "usable"] for b in found.backends], left=2)
    return None
