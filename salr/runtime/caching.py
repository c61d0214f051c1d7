"""Where compiled code is kept between processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder(use: str) -> Path:
    """Return the folder for one use: SALR_CACHE/use, or salr/use in the user's cache folder."""
    chosen = os.environ.get("SALR_CACHE")
    if chosen:
        return Path(chosen) / use
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "salr" / use
