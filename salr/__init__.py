"""SALR: bitmap-sparse weights with a low-rank correction, in one checksummed file (arXiv 2601.16991)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

_package_dir = Path(__file__).parent
if not (_package_dir / "converter").is_dir():
    # In a checkout converter/, formats/ and cuda/ sit beside salr/; a wheel holds them inside it.
    __path__.append(str(_package_dir.parent))

from .formats.version import VERSION  # noqa: E402 - below the line that finds sibling folders
from .integrations.hooks import install as _install_hooks  # noqa: E402

__version__ = VERSION
_install_hooks()

if TYPE_CHECKING:
    from .converter.adapters.editing import add_adapter as add_adapter
    from .converter.adapters.editing import remove_adapter as remove_adapter
    from .converter.adapters.editing import scale_adapter as scale_adapter
    from .converter.adapters.merging import merge_adapters as merge_adapters
    from .converter.adapters.summary import list_adapters as list_adapters
    from .converter.export.peft import export_peft as export_peft
    from .converter.export.unpack import unpack as unpack
    from .converter.module_options import ModuleOptions as ModuleOptions
    from .converter.options import CalibrationOptions as CalibrationOptions
    from .converter.options import ConvertOptions as ConvertOptions
    from .converter.pipeline import convert as convert
    from .converter.report import ConvertReport as ConvertReport
    from .evaluation.evaluate import evaluate as evaluate
    from .evaluation.protocol import EvalOptions as EvalOptions
    from .evaluation.results import EvalResult as EvalResult
    from .formats.errors import SalrError as SalrError
    from .formats.joining import join as join
    from .formats.reader import SalrFile as SalrFile
    from .formats.rewriting import Destination as Destination
    from .integrations.config import SalrConfig as SalrConfig
    from .runtime.adapters import set_adapters as set_adapters
    from .runtime.loading import load as load
    from .runtime.loading import load_tokenizer as load_tokenizer
    from .training.parameter_groups import param_groups as param_groups
    from .training.preparing import prepare_for_training as prepare_for_training
    from .training.saving import SaveReport as SaveReport
    from .training.saving import save as save

#: public name -> the module that holds it; loaded at first use, so that `import salr` stays light
_PUBLIC = {
    "CalibrationOptions": ".converter.options",
    "ConvertOptions": ".converter.options",
    "ConvertReport": ".converter.report",
    "Destination": ".formats.rewriting",
    "EvalOptions": ".evaluation.protocol",
    "EvalResult": ".evaluation.results",
    "ModuleOptions": ".converter.module_options",
    "SalrConfig": ".integrations.config",
    "SalrError": ".formats.errors",
    "SalrFile": ".formats.reader",
    "add_adapter": ".converter.adapters.editing",
    "convert": ".converter.pipeline",
    "join": ".formats.joining",
    "evaluate": ".evaluation.evaluate",
    "export_peft": ".converter.export.peft",
    "list_adapters": ".converter.adapters.summary",
    "merge_adapters": ".converter.adapters.merging",
    "remove_adapter": ".converter.adapters.editing",
    "scale_adapter": ".converter.adapters.editing",
    "load": ".runtime.loading",
    "load_tokenizer": ".runtime.loading",
    "SaveReport": ".training.saving",
    "param_groups": ".training.parameter_groups",
    "prepare_for_training": ".training.preparing",
    "save": ".training.saving",
    "set_adapters": ".runtime.adapters",
    "unpack": ".converter.export.unpack",
}
__all__ = [
    "CalibrationOptions",
    "ConvertOptions",
    "ConvertReport",
    "Destination",
    "EvalOptions",
    "EvalResult",
    "ModuleOptions",
    "SalrConfig",
    "SalrError",
    "SalrFile",
    "SaveReport",
    "add_adapter",
    "convert",
    "evaluate",
    "export_peft",
    "join",
    "list_adapters",
    "load",
    "load_tokenizer",
    "merge_adapters",
    "open",
    "param_groups",
    "prepare_for_training",
    "remove_adapter",
    "save",
    "scale_adapter",
    "set_adapters",
    "unpack",
]


def open(path: str | Path) -> SalrFile:
    """Open a .salr file for reading: lazy, memory-mapped, header and manifest checked.

    Raises:
        SalrError: it is not a sound .salr file of a known version.
    """
    from .formats.reader import SalrFile

    return SalrFile(path)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'salr' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)
