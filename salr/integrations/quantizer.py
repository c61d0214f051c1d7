"""The transformers quantizer: packed models load, save and convert through ``from_pretrained`` and ``save_pretrained``.

Invariant: packed tensors are checked before the model gets them, and are saved bit for bit under the names that they
were loaded with; nothing is left at random.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..runtime.adapters import set_adapters
from ..runtime.experts import packed_modules
from ..runtime.layout import buffer_name
from ..runtime.loading import check_integrity
from ..runtime.skeleton import Skeleton, build, plan_skeleton
from . import METHOD
from .on_the_fly import Packer, PackOnLoad
from .saved import SavedModel, save_guarded, saved_state

if TYPE_CHECKING:
    from .config import SalrConfig


@register_quantizer(METHOD)
class SalrQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces linear layers and experts by packed modules before weights are loaded."""

    requires_calibration = False
    quantization_config: SalrConfig

    def __init__(self, quantization_config: SalrConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.skeleton: Skeleton | None = quantization_config.skeleton

    def update_attn_implementation(self, config: Any) -> Any:
        """Put the weight file's real name in the place of the guard, which this process has passed."""
        if "import salr" in (getattr(config, "transformers_weights", None) or ""):
            config.transformers_weights = self.quantization_config.weights
        return config

    #: the hook of transformers before 5.20 that sees the config so early
    update_tp_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **options: Any
    ) -> None:
        if self.pre_quantized:
            if self.skeleton is None:
                file = SavedModel(checkpoint_files or [])
                check_integrity(file)
                self.skeleton = plan_skeleton(model, file.manifest, file.tensors)
                file.refuse_dense(self.skeleton)
            dtype = model.dtype
            build(model, self.skeleton)
            for _, module in packed_modules(model):
                module.compute_dtype = dtype
            ignored = {r"^assets/", r"^salr\.manifest$"}
            model._keys_to_ignore_on_load_unexpected = ignored | set(model._keys_to_ignore_on_load_unexpected or ())
        else:
            self.packer = Packer(model, self.quantization_config.options)

    def get_weight_conversions(self) -> list[Any]:
        """Return the renamings of the factors of packed modules, from a file's names to the model's."""
        entries = self.skeleton.manifest.modules.values() if self.skeleton is not None else ()
        names = sorted({adapter.name for entry in entries for adapter in entry.adapters})
        return [
            WeightRenaming(rf"\.{stored}\.{name}$", f".{buffer_name(stored)}.{name}")
            for name in names
            for stored in ("lora_A", "lora_B")
        ]

    def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
        """Tell whether a dense weight that is being loaded has to be packed."""
        return not self.pre_quantized and param_name in self.packer.roles

    def get_quantize_ops(self) -> PackOnLoad:
        """Return the operation that packs a weight while it is loaded."""
        return PackOnLoad(self.packer)

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        if not self.pre_quantized:
            self.packer.finish(model)
        # saved_state speaks of factors by their names in files already
        own = {str(renaming) for renaming in self.get_weight_conversions()}
        model._weight_conversions = [c for c in model._weight_conversions or [] if str(c) not in own]
        model.set_adapters = types.MethodType(set_adapters, model)
        model.save_pretrained = types.MethodType(save_guarded, model)
        self.quantization_config.weights = None
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Return the model's tensors with a manifest that digests them all; nothing where only adapters are saved."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}
        return saved_state(model, None if self.skeleton is None else self.skeleton.manifest), {}

    def is_serializable(self, *args: Any, **options: Any) -> bool:
        """Tell that save_pretrained works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell Trainers that adapters can be trained on the packed weights."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Tell that torch.compile works: packed products are one operator."""
        return True
