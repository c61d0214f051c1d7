"""The last hand on a traced graph: real tensors, function bodies, names and what it says about itself.

Invariant: tensors are stored in their own dtype and widened by the graph; nothing in it tells where it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from ..formats.version import VERSION as SOFTWARE_VERSION
from .body import function_body
from .contract import DOMAIN, IR_VERSION, VERSION, Form
from .signature import MODEL
from .sources import Source
from .storage import IR_TYPES, Storage

_ADAPTER_ROLES = ("adapter_A", "adapter_B")


def finish(model: Any, sources: Mapping[str, Source], storage: Storage, opset: int) -> None:
    """Make a traced graph (``onnx_ir.Model``) a complete model.

    Raises:
        OutputError: a tensor cannot be written.
    """
    _strip(model)
    _fill(model.graph, sources, storage)
    _add_bodies(model, opset)
    _free_adapters(model.graph)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "salr", SOFTWARE_VERSION


def overridable_adapters(graph: Any) -> dict[str, tuple[int, ...]]:
    """Return the initializers that a caller may replace, with their shapes."""
    return {
        name: tuple(value.const_value.shape.numpy())
        for name, value in graph.initializers.items()
        if name.rpartition(".")[2] in _ADAPTER_ROLES
    }


def _strip(model: Any) -> None:
    """Drop what the exporter noted for itself: stack traces, with the paths of this machine in them."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.doc_string = model.graph.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()


def _fill(graph: Any, sources: Mapping[str, Source], storage: Storage) -> None:
    """Give every initializer its tensor, under the model's own name; cast where it is stored in another dtype."""
    for traced_name in list(graph.initializers):
        value = graph.initializers[traced_name]
        name = traced_name.removeprefix(f"{MODEL}.")
        if not value.uses():
            del graph.initializers[traced_name]
            continue
        source = sources.get(traced_name)
        if source is None:
            import torch

            source = Source.of(torch.from_numpy(value.const_value.numpy().copy()))
        stored = IR_TYPES[source.dtype]
        if value.dtype != stored:
            _cast_uses(graph, value, stored)
        value.name = name
        value.const_value = storage.place(name, source)


def _cast_uses(graph: Any, value: Any, stored: ir.DataType) -> None:
    """Turn ``value`` to its stored dtype and cast it back where it is used; rows that are gathered are cast alone."""
    wanted, cast = value.dtype, None
    for node, index in list(value.uses()):
        if node.op_type == "Gather" and index == 0:
            gathered = node.outputs[0]
            gathered.dtype = stored
            users = list(gathered.uses())
            wide = _cast(gathered, wanted)
            graph.insert_after(node, wide.producer())
            for user, place in users:
                user.replace_input_with(place, wide)
            continue
        if cast is None:
            cast = _cast(value, wanted)
            graph.insert_before(graph[0], cast.producer())
        node.replace_input_with(index, cast)
    value.dtype = stored


def _cast(value: Any, wanted: ir.DataType) -> Any:
    """Return the output of a new Cast of ``value``, not yet in a graph."""
    attribute = ir.AttrInt64("to", int(wanted))
    output = ir.Value(
        name=f"{value.name.removeprefix(MODEL + '.')}.cast", shape=value.shape, type=ir.TensorType(wanted)
    )
    ir.Node("", "Cast", [value], [attribute], outputs=[output])
    return output


def _add_bodies(model: Any, opset: int) -> None:
    """Add the function body of every form that a node has."""
    for node in model.graph.all_nodes():
        if node.domain != DOMAIN:
            continue
        is_sparse, is_low_rank = node.inputs[1] is not None, len(node.inputs) > 5 and node.inputs[5] is not None
        form = Form(node.attributes["encoding"].as_string(), is_sparse, is_low_rank)
        node.overload = form.overload
        function = ir.serde.deserialize_function(function_body(form, opset))
        model.functions.setdefault(function.identifier(), function)
        model.opset_imports[DOMAIN] = VERSION


def _free_adapters(graph: Any) -> None:
    """Make the adapters inputs with defaults, of any rank."""
    for name in overridable_adapters(graph):
        value = graph.initializers[name]
        rank_axis = 1 if name.endswith("_A") else 0
        extents: list[Any] = list(value.shape)
        extents[rank_axis] = None
        for node, _ in value.uses():
            for output in node.outputs:
                output.shape = None if rank_axis else output.shape
        value.shape = ir.Shape(extents)
        graph.inputs.append(value)
