"""LoRA of the peft library on packed layers: ``get_peft_model`` takes them as it takes torch.nn.Linear.

Importing this module registers it.

Invariant: the packed base is never changed; what would need its dense weight (merging, DoRA, PiSSA ...) is refused. A
residual that left the packed product to be trained still belongs to the weight: it acts whichever adapters are active,
and where all of them are disabled.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer

from ..formats.errors import AdapterError
from ..formats.manifest import RESIDUAL
from ..runtime import product
from ..runtime.experts import packed_modules
from ..runtime.gradients import TrainedAdapter
from ..runtime.graph_decoding import forget_decoder
from ..runtime.linear import SalrLinear, is_hooked

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
_FIX = "train plain LoRA, or unpack the file and use the dense model"


class SalrLoraLinear(Linear):  # type: ignore[misc]
    """A LoRA layer over a ``SalrLinear``: the packed product and its adapters are one node of autograd.

    They are computed in x's dtype, as peft's own layers do under autocast, and not in the dtype of the factors. Apart
    from the packed product are adapters whose dropout acts, and all of them where hooks watch the base layer.

    Raises:
        AdapterError: the config asks for what needs the dense weight.
    """

    def __init__(self, base_layer: torch.nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        check_config(config)
        super().__init__(base_layer, adapter_name, config=config, **options)

    def _get_in_out_features(self, module: SalrLinear) -> tuple[int, int]:
        """Return K and N, without peft's warning about an unknown layer."""
        return module.in_features, module.out_features

    @property
    def _own_residual(self) -> list[str]:
        """The residual's name where it left the packed product for this layer, else nothing."""
        return [RESIDUAL] if RESIDUAL in self.get_base_layer().taken and RESIDUAL in self.lora_A else []

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, and the layer's own residual with them."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        names += [name for name in self._own_residual if name not in names]
        super().set_adapter(names, inference_mode=inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Return the packed product and the active adapters' (..., N) for x (..., K)."""
        names = self._own_residual if self._disable_adapters else self.active_adapters
        modules, dropped = self._modules, []
        lora_a, dropout = modules["lora_A"]._modules, modules["lora_dropout"]._modules
        adapters: list[TrainedAdapter] = []
        for name in names:
            if name not in lora_a:
                continue
            if self.lora_bias[name] or name in self.lora_variant:
                return cast(torch.Tensor, super().forward(x, *args, **options))
            if self.training and type(dropout[name]) is not torch.nn.Identity:
                dropped.append(name)
            else:
                adapters.append(self._adapter(name))
        if options:
            return cast(torch.Tensor, super().forward(x, *args, **options))
        base = modules["base_layer"]
        if args or is_hooked(base) or type(base) is not SalrLinear:
            y = product.with_adapters(base(x, *args), x, adapters)
        else:
            y = base.forward(x, adapters)
        for name in dropped:
            y = product.with_adapters(y, dropout[name](x), [self._adapter(name)])
        return y

    def _adapter(self, name: str) -> TrainedAdapter:
        """Return an adapter's lora_A (r, K), lora_B (N, r) and scaling."""
        modules = self._modules
        lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        return lora_a.weight, lora_b.weight, self.scaling[name]

    def _mixed_batch_forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Do as peft does with an adapter for each sample; the layer's own residual acts on all of them."""
        y: torch.Tensor = super()._mixed_batch_forward(x, *args, **options)
        return product.with_adapters(y, x, [self._adapter(name) for name in self._own_residual])

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
    """Let peft's LoRA make these layers, and let ``target_modules="all-linear"`` find packed ones.

    peft calls the function wrapped second for every adapter that it adds.
    """
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
        forget_decoder(model)  # it does not know adapters of peft, and its weights would be in memory twice
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            packed = {name for name, module in packed_modules(model) if isinstance(module, SalrLinear)}
            result.target_modules = set(result.target_modules) | {n.removesuffix(".base_layer") for n in packed}
        return result

    LoraModel._create_new_module = staticmethod(create_new_module)
    tuners_utils._maybe_include_all_linear_layers = include_all_linear_layers


_register()
