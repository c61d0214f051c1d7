"""From a loaded model to an ONNX graph without weights.

Invariant: every parameter and packed tensor is a fake tensor while the graph is traced, so that tracing costs no memory
for weights; the graph's initializers carry the model's own names, and the sources of the same names fill them later.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..formats.manifest import ModuleEntry
from ..runtime.experts import SalrStack, packed_modules
from ..runtime.linear import SalrLinear
from .contract import DOMAIN, INPUTS, OPERATOR, VERSION, register_schema
from .errors import ExportError
from .signature import Signature
from .sources import (
    Source,
    adapter_sources,
    dense_sources,
    packed_sources,
    residual_adapters,
    trained_adapters,
)

ROLES = INPUTS[1:]


@dataclass(frozen=True)
class Traced:
    """An ONNX graph (``onnx_ir.Model``) and what its initializers of the same names stand for."""

    model: Any
    sources: Mapping[str, Source]


class NodeLinear(torch.nn.Module):
    """Stands for a SalrLinear while a graph is traced: a SparseLinear node, or a dense product.

    Args:
        entry: of the module.
        sources: roles of a node's inputs, or ``weight`` (K, N); ``adapter_A`` and ``adapter_B`` for a part beside it.
        bias: of the layer.
    """

    weight: torch.Tensor | None
    adapter_A: torch.Tensor | None
    adapter_B: torch.Tensor | None
    bias: torch.nn.Parameter | None

    def __init__(self, entry: ModuleEntry, sources: Mapping[str, Source], bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.entry, self.sources = entry, sources
        for role in (*ROLES, "weight", "adapter_A", "adapter_B"):
            source = sources.get(role)
            tensor = None if source is None else torch.empty(source.shape, dtype=source.dtype, device="meta")
            self.register_buffer(role, tensor)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return W x + adapters + bias (..., N)."""
        y: torch.Tensor = self._product(x) if self.weight is None else x @ self.weight
        if self.adapter_A is not None and self.adapter_B is not None:
            y = y + (x @ self.adapter_A) @ self.adapter_B
        return y if self.bias is None else y + self.bias

    def _product(self, x: torch.Tensor) -> Any:
        entry = self.entry
        facts = entry.n_rows, entry.n_columns, entry.nnz, entry.encoding, entry.pattern, entry.group_size, None
        tensors = self.values, self.bitmap, self.row_offsets, self.scales, self.lora_A, self.lora_B, self.rank_scaling
        return torch.ops.salr.linear(x, *tensors, *facts)


def stand_in(linear: SalrLinear, *, weights: str, adapters: str, dtype: torch.dtype) -> NodeLinear:
    """Return what is traced for a packed layer; ``weights`` and ``adapters`` as in ``export_onnx``."""
    is_fused = adapters == "fused"
    chosen = [*residual_adapters(linear), *(trained_adapters(linear) if is_fused else [])]
    chosen.sort(key=linear.entry.adapters.index)
    sources = dense_sources(linear, chosen, dtype) if weights == "dense" else packed_sources(linear, chosen)
    if not is_fused and trained_adapters(linear):
        sources |= adapter_sources(linear, trained_adapters(linear), dtype)
    return NodeLinear(linear.entry, sources, linear.bias)


def replace_packed(model: torch.nn.Module, *, weights: str, adapters: str, dtype: torch.dtype) -> None:
    """Put a stand-in in the place of every packed layer.

    Raises:
        ExportError: the model has packed experts.
    """
    for name, module in list(packed_modules(model)):
        if isinstance(module, SalrStack) or ".experts." in name or not isinstance(module, SalrLinear):
            raise ExportError(
                "a mixture of experts, which has no ONNX form here",
                tensor=name,
                fix="`salr unpack` makes a dense directory for another exporter",
            )
        model.set_submodule(name, stand_in(module, weights=weights, adapters=adapters, dtype=dtype))


def trace(signature: Signature, opset: int, dtype: torch.dtype) -> Traced:
    """Trace a model whose packed layers have stand-ins.

    Raises:
        ExportError: torch cannot export it.
    """
    sources = _fake(signature.wrapper, dtype)
    register_schema()
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                signature.wrapper,
                _as(signature.inputs, dtype),
                dynamo=True,
                dynamic_shapes=signature.dynamic_shapes,
                custom_translation_table={torch.ops.salr.linear.default: _node()},
                input_names=signature.input_names,
                output_names=signature.output_names,
                opset_version=opset,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
        raise ExportError(
            f"torch {torch.__version__} cannot export this model ({reason})", fix="upgrade torch and transformers"
        ) from error
    assert program is not None
    return Traced(program.model, sources)


def _fake(wrapper: torch.nn.Module, dtype: torch.dtype) -> dict[str, Source]:
    """Replace parameters and the stand-ins' buffers by fake tensors; return their sources by name.

    Dense tensors are traced in ``dtype``, whatever they are stored in; buffers that the model computes stay real.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    sources: dict[str, Source] = {}
    made: dict[int, torch.nn.Parameter] = {}
    for path, module in wrapper.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                sources[f"{path}.{name}"] = Source.of(parameter.detach())
                if id(parameter) not in made:
                    with mode:
                        fake = torch.empty(parameter.shape, dtype=dtype if parameter.is_floating_point() else None)
                    made[id(parameter)] = torch.nn.Parameter(fake, requires_grad=False)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if isinstance(module, NodeLinear):
                sources[f"{path}.{name}"] = module.sources[name]
                with mode:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            elif buffer.dtype in (torch.bfloat16, torch.float16):
                module._buffers[name] = buffer.to(dtype)
    return sources


def _as(inputs: Any, dtype: torch.dtype) -> Any:
    """Return example inputs with their float tensors in ``dtype``."""
    return torch.utils._pytree.tree_map(
        lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor, inputs
    )


def _node() -> Any:
    """Return the translation of ``salr::linear`` to a SparseLinear node."""
    import onnxscript

    operator = getattr(onnxscript.values.Opset(DOMAIN, VERSION), OPERATOR)

    def translate(
        x: Any, values: Any, bitmap: Any, row_offsets: Any, scales: Any, lora_A: Any, lora_B: Any, scaling: Any,
        n_rows: int, n_columns: int, nnz: int, encoding: str, pattern: str, group_size: int | None = None,
        backend: str | None = None,
    ) -> Any:  # fmt: skip
        return operator(
            x, bitmap, values, row_offsets, scales, lora_A, lora_B, scaling,
            out_features=n_rows, in_features=n_columns, nnz=nnz, encoding=encoding,
            group_size=min(group_size or 0, n_columns),
        )  # fmt: skip

    return translate


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence what torch and onnxscript tell about their own business."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
