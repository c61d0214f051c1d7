"""AddressSanitizer in a library that Python loads: a process of its own, with the sanitizer loaded first."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from salr.onnx.library import find_compiler


def preloaded() -> dict[str, str]:
    """Return the environment in which Python can load a library with AddressSanitizer in it."""
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [find_compiler(), f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        libraries.append(found)
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
