"""Registering with transformers and PEFT when they are imported, not before.

Invariant: ``import salr`` imports neither library. A finder stands first on ``sys.meta_path``, answers for the few
modules named here, and leaves it again with the last of them; what is imported already is registered at once. A
registration that fails becomes a warning, never a failed import of the other library.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

#: another library's module -> ours, which register themselves where they are imported, once that one is
REGISTRATIONS = {
    "transformers.quantizers.auto": ("salr.integrations.config", "salr.integrations.quantizer"),
    "peft.tuners.lora.model": ("salr.integrations.peft_layer",),
}


def install() -> None:
    """Register with what is imported already, and wait for the rest."""
    for name in REGISTRATIONS:
        if name in sys.modules:
            _register(name)
    waiting = {name for name in REGISTRATIONS if name not in sys.modules}
    if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(waiting))


def _register(name: str) -> None:
    try:
        for own in REGISTRATIONS[name]:
            import_module(own)
    except Exception as error:  # whatever a version of the other library lacks, it must still be importable
        warnings.warn(f"salr could not register with {name}: {type(error).__name__}: {error}", stacklevel=2)


class _Finder(MetaPathFinder):
    """Finds the awaited modules where the ordinary finders do, and adds the registration to their loading."""

    def __init__(self, waiting: set[str]) -> None:
        self._waiting = waiting

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._waiting:
            return None
        self._waiting.discard(fullname)
        if not self._waiting:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as the loader it stands for does, then registers."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        _register(module.__name__)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)
