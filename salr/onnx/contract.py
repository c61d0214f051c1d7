"""The operator ``salr.SparseLinear``, version 1: its inputs, attributes and the forms that a node can take.

Invariant: this is the public contract of docs/onnx.md. Inputs are only ever appended, attributes only ever added, and a
change of meaning is a new version of the operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..formats.dtypes import FLOAT_ENCODINGS
from ..formats.values import ENCODINGS

DOMAIN = "salr"
OPERATOR = "SparseLinear"
VERSION = 1
#: the first opset with all operators of the function bodies, and the default of an export
FIRST_OPSET, DEFAULT_OPSET = 18, 23
#: the last one whose graphs, as torch makes them, ONNX Runtime takes
LAST_OPSET = 25
#: what ONNX Runtime reads; the newest is newer than what its releases accept
IR_VERSION = 10

INPUTS = ("x", "bitmap", "values", "row_offsets", "scales", "lora_A", "lora_B", "rank_scaling")
REQUIRED_INPUTS = ("x", "values")
ATTRIBUTES = ("out_features", "in_features", "nnz", "encoding", "group_size")

_ACTIVATIONS = ["tensor(float)", "tensor(float16)"]
_FLOATS = [*_ACTIVATIONS, "tensor(bfloat16)"]


@dataclass(frozen=True)
class Form:
    """What decides which inputs a node has, and so which function body stands for it.

    ``encoding`` is one of ``formats.values.ENCODINGS``; ``is_sparse``: there are bitmap and row_offsets;
    ``is_low_rank``: there are lora_A, lora_B and rank_scaling.
    """

    encoding: str
    is_sparse: bool
    is_low_rank: bool

    def __post_init__(self) -> None:
        if self.encoding not in ENCODINGS:
            raise ValueError(f"encoding {self.encoding!r}, needed one of {', '.join(ENCODINGS)}")

    @property
    def is_quantized(self) -> bool:
        """Tell whether there are scales."""
        return self.encoding not in FLOAT_ENCODINGS

    @property
    def overload(self) -> str:
        """The name of the function body: float encodings share one, because the values' dtype tells them apart."""
        kind = self.encoding if self.is_quantized else "float"
        return "_".join([kind, "sparse" if self.is_sparse else "full", *(["lora"] if self.is_low_rank else [])])


def register_schema() -> None:
    """Make the operator known to onnx in this process; the checker and onnxscript then know it. Done once."""
    from onnx import defs

    if defs.has(OPERATOR, VERSION, DOMAIN):
        return
    parameter, optional = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption.Optional
    types = {"x": "T", "values": "TV", "lora_A": "TA", "lora_B": "TB", "scales": "TS", "rank_scaling": "tensor(float)"}
    types |= {"bitmap": "tensor(uint8)", "row_offsets": "tensor(uint64)"}
    required = defs.OpSchema.FormalParameterOption.Single
    defs.register_schema(
        defs.OpSchema(
            OPERATOR,
            DOMAIN,
            VERSION,
            inputs=[
                parameter(name, types[name], param_option=required if name in REQUIRED_INPUTS else optional)
                for name in INPUTS
            ],
            outputs=[parameter("y", "T")],
            type_constraints=[
                ("T", _ACTIVATIONS, "activations"),
                ("TV", [*_FLOATS, "tensor(uint8)"], "kept weights"),
                ("TA", [*_FLOATS, "tensor(int8)"], "factors A"),
                ("TB", [*_FLOATS, "tensor(int8)"], "factors B"),
                ("TS", _ACTIVATIONS, "scales"),
            ],
            attributes=[_attribute(defs, name) for name in ATTRIBUTES],
        )
    )


def _attribute(defs: Any, name: str) -> Any:
    kind = defs.OpSchema.AttrType.STRING if name == "encoding" else defs.OpSchema.AttrType.INT
    return defs.OpSchema.Attribute(name, kind, required=True)
