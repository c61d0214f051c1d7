"""One SparseLinear node with its tensors, for graphs of one's own.

Invariant: the node, its initializers and its function body belong together and are a sound part of a model of opset 18
or later once all three are in it; no weight is decoded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..formats.dtypes import FLOAT_ENCODINGS, Array, from_float32
from ..formats.errors import OptionError
from ..formats.manifest import ModuleEntry
from ..formats.module import AdapterStack, ModuleTensors
from ..formats.values import values_dtype
from .body import function_body
from .contract import DEFAULT_OPSET, DOMAIN, FIRST_OPSET, INPUTS, LAST_OPSET, OPERATOR, Form

#: safetensors dtype -> ONNX element type
ONNX_TYPES = {
    "BF16": TensorProto.BFLOAT16, "F16": TensorProto.FLOAT16, "F32": TensorProto.FLOAT, "U8": TensorProto.UINT8,
    "I8": TensorProto.INT8, "U64": TensorProto.UINT64,
}  # fmt: skip


@dataclass(frozen=True)
class SparseLinearNode:
    """What to add to a graph: ``node`` and ``initializers``; and to the model: ``function``, once an overload."""

    node: onnx.NodeProto
    initializers: tuple[onnx.TensorProto, ...]
    function: onnx.FunctionProto

    def model(self, n_inputs: str | int = "batch", elem_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
        """Return a model of this node alone: x (``n_inputs``, K) -> y (``n_inputs``, N)."""
        facts = {attribute.name: attribute.i for attribute in self.node.attribute}
        x = helper.make_tensor_value_info(self.node.input[0], elem_type, [n_inputs, facts["in_features"]])
        y = helper.make_tensor_value_info(self.node.output[0], elem_type, [n_inputs, facts["out_features"]])
        graph = helper.make_graph([self.node], OPERATOR, [x], [y], list(self.initializers))
        opset = self.function.opset_import[0].version
        imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
        return helper.make_model(graph, opset_imports=imports, functions=[self.function], ir_version=10)


def sparse_linear_node(
    tensors: ModuleTensors,
    adapters: AdapterStack | None = None,
    *,
    name: str = "linear",
    x: str = "x",
    y: str = "y",
    factors: str = "fp32",
    opset: int = DEFAULT_OPSET,
) -> SparseLinearNode:
    """Return a node that computes y = W x + adapters (..., N) for x (..., K) with its initializers and function.

    Args:
        tensors: of a 2-D module: ``salr.open(path).module(name)``.
        adapters: what to add to it: ``salr.open(path).adapters(name)``; None for nothing.
        name: of the node, and what the initializers' names begin with.
        x, y: names of input and output in the graph.
        factors: how the adapters are stored: bf16, fp16 or fp32.
        opset: of the model that it goes into, 18 to 25.

    Raises:
        OptionError: the module is a stack of experts, or ``factors`` or ``opset`` is none of these.
    """
    check_opset(opset)
    if len(tensors.entry.shape) != 2:
        raise OptionError("a stack of experts", needed="a 2-D module", fix="take one expert with file.slice")
    if factors not in FLOAT_ENCODINGS:
        raise OptionError(f"factors {factors!r}", needed="one of " + ", ".join(FLOAT_ENCODINGS))
    arrays = _weight_arrays(tensors)
    if adapters is not None and adapters.scaling.size:
        dtype = FLOAT_ENCODINGS[factors]
        arrays["lora_A"] = dtype, from_float32(adapters.lora_A, dtype)
        arrays["lora_B"] = dtype, from_float32(adapters.lora_B, dtype)
        arrays["rank_scaling"] = "F32", adapters.scaling
    form = Form(tensors.entry.encoding, tensors.bitmap is not None, "lora_A" in arrays)
    initializers = [_initializer(f"{name}.{role}", *array) for role, array in arrays.items()]
    inputs = [x, *(f"{name}.{role}" if role in arrays else "" for role in INPUTS[1:])]
    node = helper.make_node(OPERATOR, inputs, [y], name, domain=DOMAIN, **node_attributes(tensors.entry))
    node.overload = form.overload
    return SparseLinearNode(node, tuple(initializers), function_body(form, opset))


def check_opset(opset: int) -> None:
    """Refuse an opset that is too old, or newer than what runs.

    Raises:
        OptionError: see above.
    """
    if not FIRST_OPSET <= opset <= LAST_OPSET:
        raise OptionError(f"opset {opset}", needed=f"{FIRST_OPSET} to {LAST_OPSET}")


def node_attributes(entry: ModuleEntry) -> dict[str, int | str]:
    """Return the attributes of the node of a 2-D module; group_size is at most K, and 0 without scales."""
    n_rows, n_columns = entry.shape
    return {
        "out_features": n_rows,
        "in_features": n_columns,
        "nnz": entry.nnz,
        "encoding": entry.encoding,
        "group_size": min(entry.group_size or 0, n_columns),
    }


def _weight_arrays(tensors: ModuleTensors) -> dict[str, tuple[str, Array]]:
    """Return safetensors dtype and array of everything that stands for the weight, by input."""
    found: dict[str, tuple[str, Array]] = {"values": (values_dtype(tensors.entry.encoding), tensors.values)}
    if tensors.bitmap is not None and tensors.row_offsets is not None:
        found = {"bitmap": ("U8", tensors.bitmap), **found, "row_offsets": ("U64", tensors.row_offsets)}
    if tensors.scales is not None:
        found["scales"] = "F32", tensors.scales
    return found


def _initializer(name: str, dtype: str, array: Array) -> onnx.TensorProto:
    raw = np.ascontiguousarray(array).tobytes()
    return helper.make_tensor(name, ONNX_TYPES[dtype], array.shape, raw, raw=True)
