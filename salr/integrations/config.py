"""``SalrConfig``: the ``quantization_config`` of a packed model, and what to convert a dense one with."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..converter.module_options import ModuleOptions
from ..converter.options import NO_DATA, CalibrationOptions, ConvertOptions
from ..formats.errors import OptionError
from ..runtime.skeleton import Skeleton
from . import METHOD

DATA_FREE = ("alternating", "magnitude")


@register_quantization_config(METHOD)
class SalrConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Tells transformers that a model is packed, or how to pack a dense one while it is loaded (without data).

    Args:
        sparsity: fraction removed, 0 to 0.95.
        rank: of the residual adapter, 0 for none; None for 64, or min(N, K) where that is less.
        method: ``alternating`` (from the weights alone) or ``magnitude``.
        exclude: globs or ``re:`` patterns of modules to keep dense.
        weights: name of the weight file in a directory; None for the names that transformers gives.
        skeleton: what ``salr.load`` planned; never saved.

    Raises:
        OptionError: sparsity or rank are out of range, or the method needs data.
    """

    def __init__(
        self,
        sparsity: float = 0.5,
        rank: int | None = None,
        method: str = "alternating",
        exclude: tuple[str, ...] | list[str] = (),
        weights: str | None = None,
        skeleton: Skeleton | None = None,
        **unknown: Any,
    ) -> None:
        self.quant_method = METHOD
        if method not in DATA_FREE:
            raise OptionError(
                f"method {method!r}", needed="one of " + ", ".join(DATA_FREE), fix="other methods: `salr convert`"
            )
        self.options = ConvertOptions(
            module=ModuleOptions(sparsity, rank),
            method=method,
            calibration=CalibrationOptions(NO_DATA) if method == "alternating" else None,
            exclude=tuple(exclude),
        )
        self.weights = weights
        self._skeleton = skeleton

    @property
    def skeleton(self) -> Skeleton | None:
        """What was planned for a file that is being loaded."""
        return self._skeleton

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json keeps: nothing that the packed weights say themselves."""
        kept = {"quant_method": self.quant_method, "weights": self.weights}
        return {key: value for key, value in kept.items() if value is not None}

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())
