"""The function bodies of SparseLinear: what the operator means, in standard ONNX operators.

Invariant: a body computes y = x W^T + (rank_scaling * (x A^T)) B^T with W decoded in float32, and gathers from nothing
but the first nnz stored values. Any runtime that knows opset 18 runs it; a native kernel of the same name replaces it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..formats.dtypes import Array
from ..formats.values import NF4_CODE_BOOK
from .contract import ATTRIBUTES, DOMAIN, INPUTS, OPERATOR, Form


def function_body(form: Form, opset: int) -> onnx.FunctionProto:
    """Return the model-local function for nodes of ``form``; its name's overload is the form's."""
    graph = _Body()
    weight = graph.node("CastLike", _scaled(graph, form), "x")
    y = graph.node("MatMul", "x", graph.node("Transpose", weight, perm=[1, 0]))
    if form.is_low_rank:
        down = graph.node("Transpose", graph.node("CastLike", "lora_A", "x"), perm=[1, 0])
        up = graph.node("Transpose", graph.node("CastLike", "lora_B", "x"), perm=[1, 0])
        inner = graph.node("Mul", graph.node("MatMul", "x", down), graph.node("CastLike", "rank_scaling", "x"))
        y = graph.node("Add", y, graph.node("MatMul", inner, up))
    graph.nodes[-1].output[0] = "y"
    function = helper.make_function(
        DOMAIN, OPERATOR, list(INPUTS), ["y"], graph.nodes, [helper.make_opsetid("", opset)], list(ATTRIBUTES)
    )
    function.overload = form.overload
    return function


class _Body:
    """Nodes under way; every method returns the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self._made: dict[Any, str] = {}

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, dtype: Any) -> str:
        """Add a constant, or return the one that is there already."""
        array: Array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._made:
            self._made[key] = self.node("Constant", value=numpy_helper.from_array(array))
        return self._made[key]

    def attribute(self, name: str) -> str:
        """Add an int64 vector of one element that holds a node's attribute."""
        if name not in self._made:
            scalar = self.node("Constant")
            self.nodes[-1].attribute.append(
                onnx.AttributeProto(name="value_int", ref_attr_name=name, type=onnx.AttributeProto.INT)
            )
            self._made[name] = self.node("Reshape", scalar, self.constant([-1], np.int64))
        return self._made[name]

    def shape(self) -> str:
        """Add (N, K)."""
        if "shape" not in self._made:
            both = self.attribute("out_features"), self.attribute("in_features")
            self._made["shape"] = self.node("Concat", *both, axis=0)
        return self._made["shape"]


def _scaled(graph: _Body, form: Form) -> str:
    """Add W (N, K) float32."""
    unit = _sparse(graph, form) if form.is_sparse else _full(graph, form)
    if not form.is_quantized:
        return unit
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    in_features = graph.node("Squeeze", graph.attribute("in_features"))
    columns = graph.node("Range", zero, in_features, one)
    groups = graph.node("Div", columns, graph.attribute("group_size"))
    scales = graph.node("Gather", "scales", groups, axis=1)
    return graph.node("Mul", unit, graph.node("Cast", scales, to=TensorProto.FLOAT))


def _sparse(graph: _Body, form: Form) -> str:
    """Add the kept values in place, zeros elsewhere: bit -> index into values -> value."""
    shifts = graph.constant(np.arange(8).reshape(1, 1, 8), np.uint8)
    bytes_ = graph.node("Unsqueeze", "bitmap", graph.constant([2], np.int64))
    bits = graph.node("BitShift", bytes_, shifts, direction="RIGHT")
    bits = graph.node("BitwiseAnd", bits, graph.constant(1, np.uint8))
    bits = graph.node("Reshape", bits, graph.constant([0, -1], np.int64))
    ones = graph.constant([1], np.int64)
    bits = graph.node("Slice", bits, graph.constant([0], np.int64), graph.attribute("in_features"), ones, ones)
    counted = graph.node("Cast", bits, to=TensorProto.INT32)
    within = graph.node("CumSum", counted, graph.constant(1, np.int32), exclusive=1)
    starts = graph.node("Slice", "row_offsets", graph.constant([0], np.int64), graph.constant([-1], np.int64))
    starts = graph.node("Unsqueeze", graph.node("Cast", starts, to=TensorProto.INT32), ones)
    # without the product a row's trailing zeros would point past the last value
    index = graph.node("Mul", graph.node("Add", within, starts), counted)
    kept = _gathered(graph, form, index)
    mask = graph.node("Cast", bits, to=TensorProto.BOOL)
    return graph.node("Where", mask, kept, graph.constant(0, np.float32))


def _gathered(graph: _Body, form: Form, index: str) -> str:
    """Add the stored values at ``index`` (N, K) int32 as float32, before scales."""
    if form.encoding != "nf4":
        return _unit(graph, form, graph.node("Gather", "values", index, axis=0))
    two = graph.constant(2, np.int32)
    half = graph.node("Div", index, two)
    low, high = _nibbles(graph, graph.node("Gather", "values", half, axis=0))
    is_low = graph.node("Equal", index, graph.node("Mul", half, two))
    return _unit(graph, form, graph.node("Where", is_low, low, high))


def _full(graph: _Body, form: Form) -> str:
    """Add all values in order, (N, K) float32."""
    begin, minus = graph.constant([0], np.int64), graph.constant([-1], np.int64)
    stored = "values"
    if form.encoding == "nf4":
        one = graph.constant([1], np.int64)
        pair = [graph.node("Unsqueeze", nibble, one) for nibble in _nibbles(graph, stored)]
        stored = graph.node("Reshape", graph.node("Concat", *pair, axis=1), minus)
    stored = graph.node("Slice", stored, begin, graph.attribute("nnz"))
    return graph.node("Reshape", _unit(graph, form, stored), graph.shape())


def _nibbles(graph: _Body, stored: str) -> tuple[str, str]:
    """Add the low and the high four bits."""
    low = graph.node("BitwiseAnd", stored, graph.constant(15, np.uint8))
    return low, graph.node("BitShift", stored, graph.constant(4, np.uint8), direction="RIGHT")


def _unit(graph: _Body, form: Form, stored: str) -> str:
    """Add stored values of any shape as float32, before scales."""
    if form.encoding == "int8":
        # two's complement: flipping the sign bit shifts the range to 0 ... 255
        shifted = graph.node("BitwiseXor", stored, graph.constant(128, np.uint8))
        return graph.node("Sub", graph.node("Cast", shifted, to=TensorProto.FLOAT), graph.constant(128, np.float32))
    if form.encoding == "nf4":
        codes = graph.node("Cast", stored, to=TensorProto.INT32)
        return graph.node("Gather", graph.constant(NF4_CODE_BOOK, np.float32), codes, axis=0)
    return graph.node("Cast", stored, to=TensorProto.FLOAT)
