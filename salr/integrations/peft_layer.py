"""LoRA of the peft library on packed layers: ``get_peft_model`` takes them as it takes torch.nn.Linear.

Importing this module registers it.

Invariant: the packed base is never changed; what would need its dense weight (merging, DoRA, PiSSA ...) is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..formats.errors import AdapterError
from ..runtime.experts import packed_modules
from ..runtime.linear import SalrLinear

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
_FIX = "train plain LoRA, or unpack the file and use the dense model"


class SalrLoraLinear(Linear):  # type: ignore[misc]
    """A LoRA layer over a ``SalrLinear``.

    Raises:
        AdapterError: the config asks for what needs the dense weight.
    """

    def __init__(self, base_layer: torch.nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        check_config(config)
        super().__init__(base_layer, adapter_name, config=config, **options)

    def _get_in_out_features(self, module: SalrLinear) -> tuple[int, int]:
        """Return K and N, without peft's warning about an unknown layer."""
        return module.in_features, module.out_features

    def merge(self, *args: Any, **options: Any) -> None:
        """Refuse: a merged weight would be dense."""
        raise AdapterError(
            "an adapter cannot be merged into packed weights",
            fix="save it, and convert again with --adapter, or run it unmerged",
        )


def check_config(config: Any) -> None:
    """Refuse LoRA variants that need the base layer's dense weight.

    Raises:
        AdapterError: see above.
    """
    start = getattr(config, "init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise AdapterError(f"init_lora_weights={start!r} needs the dense weight", fix=_FIX)
    if getattr(config, "use_dora", False):
        raise AdapterError("use_dora=True needs the dense weight", fix=_FIX)


def _register() -> None:
    """Let peft's LoRA make these layers, and let ``target_modules="all-linear"`` find packed ones."""
    create = LoraModel._create_new_module
    include = tuners_utils._maybe_include_all_linear_layers

    @functools.wraps(create)
    def create_new_module(lora_config: Any, adapter_name: str, target: Any, **options: Any) -> Any:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, SalrLinear):
            return SalrLoraLinear(target, adapter_name, config=lora_config, **options)
        return create(lora_config, adapter_name, target, **options)

    @functools.wraps(include)
    def include_all_linear_layers(peft_config: Any, model: torch.nn.Module) -> Any:
        wanted = getattr(peft_config, "target_modules", None)
        result = include(peft_config, model)
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            packed = {name for name, module in packed_modules(model) if isinstance(module, SalrLinear)}
            result.target_modules = set(result.target_modules) | {n.removesuffix(".base_layer") for n in packed}
        return result

    LoraModel._create_new_module = staticmethod(create_new_module)
    tuners_utils._maybe_include_all_linear_layers = include_all_linear_layers


_register()
