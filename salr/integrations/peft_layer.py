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
from ..runtime.experts import packed_modules
from ..runtime.graph_decoding import forget_decoder
from ..runtime.linear import SalrLinear

_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
_FIX = "train plain LoRA, or unpack the file and use the dense model"


class SalrLoraLinear(Linear):  # type: ignore[misc]
    """A LoRA layer over a ``SalrLinear``: all adapters of a layer are two products, concatenated along the rank.

    They are computed in x's dtype, as peft's own layers do under autocast, and not in the dtype of the factors.

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
        names = self._own_residual if self.disable_adapters else [n for n in self.active_adapters if n in self.lora_A]
        if options or any(name in self.lora_variant or self.lora_bias[name] for name in names):
            return cast(torch.Tensor, super().forward(x, *args, **options))
        y: torch.Tensor = self.base_layer(x, *args)
        dropped = [n for n in names if self.training and not isinstance(self.lora_dropout[n], torch.nn.Identity)]
        plain = [name for name in names if name not in dropped]
        y = self._add(y, x, plain) if plain else y
        for name in dropped:
            y = self._add(y, self.lora_dropout[name](x), [name])
        return y

    def _add(self, y: torch.Tensor, x: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Return y (..., N) + B (A x) of some adapters in y's dtype."""
        lora_a = _joined([self.lora_A[name].weight for name in names], 0).to(x.dtype)
        scaled = [_times(self.lora_B[name].weight, self.scaling[name]) for name in names]
        lora_b = _joined(scaled, 1).to(x.dtype)
        inner = torch.nn.functional.linear(x, lora_a)
        if torch.is_autocast_enabled(x.device.type) or y.dtype != x.dtype:
            return y + torch.nn.functional.linear(inner, lora_b).to(y.dtype)
        rows = y.reshape(-1, y.shape[-1]), inner.reshape(-1, inner.shape[-1])
        return torch.addmm(*rows, lora_b.mT).view(y.shape)

    def _mixed_batch_forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """Do as peft does with an adapter for each sample; the layer's own residual acts on all of them."""
        y: torch.Tensor = super()._mixed_batch_forward(x, *args, **options)
        return self._add(y, x, self._own_residual) if self._own_residual else y

    def merge(self, *args: Any, **options: Any) -> None:
        """Refuse: a merged weight would be dense."""
        raise AdapterError(
            "an adapter cannot be merged into packed weights",
            fix="save it, and convert again with --adapter, or run it unmerged",
        )


def _joined(factors: list[torch.Tensor], dim: int) -> torch.Tensor:
    return factors[0] if len(factors) == 1 else torch.cat(factors, dim)


def _times(factor: torch.Tensor, scaling: float) -> torch.Tensor:
    return factor if scaling == 1 else factor * scaling


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
