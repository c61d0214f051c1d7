"""One SparseLinear node: its function body and its native kernel compute what the format says."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from salr.formats.errors import OptionError
from salr.formats.values import ENCODINGS

from salr.onnx import sparse_linear_node
from salr.onnx.contract import ATTRIBUTES, INPUTS, Form, register_schema

FORMS = [Form(*form) for form in itertools.product(ENCODINGS, (True, False), (True, False))]
SHAPES = [(1, 1), (17, 45), (9, 64), (50, 200), (130, 520)]
HALF, FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT


def reference(tensors, adapters, x):
    weight = tensors.dense() + (0 if adapters is None else adapters.product())
    return x.astype(np.float64) @ weight.T.astype(np.float64)


def inputs(n_inputs, n_columns, dtype=np.float32):
    return np.random.default_rng(n_inputs).standard_normal((n_inputs, n_columns), np.float32).astype(dtype)


def close(found, expected, tolerance):
    scale = max(np.abs(expected).max(), 1e-30)
    return np.abs(found.astype(np.float64) - expected).max() <= tolerance * scale


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.encoding}-{form.overload}")
@pytest.mark.parametrize("opset", [18, 23])
def test_the_function_body_is_the_product(form, opset, make_packed, run_model):
    packed = make_packed(17, 45, form.encoding, sparse=form.is_sparse, rank=5 * form.is_low_rank)
    made = sparse_linear_node(*packed, opset=opset)
    model = made.model()
    register_schema()
    onnx.checker.check_model(model, full_check=True)
    x = inputs(3, 45)
    assert made.node.overload == form.overload
    assert close(run_model(model, {"x": x})[0], reference(*packed, x), 2e-6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_onnx_itself_computes_the_same(encoding, make_packed):
    from onnx.reference import ReferenceEvaluator

    packed = make_packed(17, 45, encoding, rank=3)
    x = inputs(2, 45)
    found = ReferenceEvaluator(sparse_linear_node(*packed).model()).run(None, {"x": x})[0]
    assert close(found, reference(*packed, x), 2e-6)


@pytest.mark.parametrize("kernels", ["avx512vnni", "avx512", "avx2", "scalar"])
def test_the_native_kernels_are_the_product(kernels, library, run_in_process):
    """Each in a process of its own: the kernels are chosen once. Sizes of every path: 1, few, a panel, many inputs."""
    run_in_process("kernels.py", library, environment={"SALR_ONNX_KERNELS": kernels})


def test_the_native_kernel_takes_the_place_of_the_function_body(make_packed, library, run_model, tmp_path):
    import onnxruntime

    packed = make_packed(64, 64, "bf16")
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    model = sparse_linear_node(*packed).model().SerializeToString()
    session = onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"])
    session.run(None, {"x": inputs(1, 64)})
    events = json.loads(Path(session.end_profiling()).read_text())
    operators = {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}
    assert operators == {"SparseLinear"}


def test_values_that_are_not_finite_stay_in_their_own_row(make_packed, library, run_model):
    tensors, _ = make_packed(9, 64, "fp32")
    tensors.values[0] = np.inf
    x = np.abs(inputs(2, 64)) + 1
    for chosen in (None, library):
        y = run_model(sparse_linear_node(tensors).model(), {"x": x}, chosen)[0]
        assert np.isfinite(y[:, np.arange(9) != 1]).all() and np.isinf(y[:, 1]).all()


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1.0, 1e30])
def test_int8_products_keep_the_accuracy_of_float32_whatever_the_inputs_are_like(size, make_packed, library, run_model):
    """In every block of 128 columns one input is a thousand times the others; blocks differ by powers of ten."""
    tensors, _ = make_packed(70, 700, "int8", group_size=128)
    x = inputs(2, 700).astype(np.float64)
    x[:, 5::128] *= 1000
    x *= np.repeat(10.0 ** np.arange(-3, 3), 128)[:700] * size
    x = x.astype(np.float32)
    y = run_model(sparse_linear_node(tensors).model(), {"x": x}, library)[0]
    weight = tensors.dense().astype(np.float64)
    rounding = 2.0**-22 * np.abs(x).astype(np.float64) @ np.abs(weight).T + 2.0**-120
    assert (np.abs(y - x.astype(np.float64) @ weight.T) <= rounding).all()


@pytest.mark.parametrize("n_inputs", [1, 4, 20])
def test_long_sums_lose_little(n_inputs, make_packed, library, run_model):
    """Nothing cancels here: one chain of 8192 products would be off by several millionths."""
    tensors, _ = make_packed(9, 8192, "fp32")
    tensors.values[:] = np.abs(tensors.values)
    x = np.abs(inputs(n_inputs, 8192))
    y = run_model(sparse_linear_node(tensors).model(), {"x": x}, library)[0][:, 1:]
    expected = reference(tensors, None, x)[:, 1:]
    assert np.abs(y / expected - 1).max() < 5e-7


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_inputs_that_are_not_finite_give_int8_products_that_are_not(odd, make_packed, library, run_model):
    tensors, _ = make_packed(9, 300, "int8", group_size=128)
    x = inputs(2, 300)
    x[1, 200] = odd
    y = run_model(sparse_linear_node(tensors).model(), {"x": x}, library)[0]
    assert close(y[0], reference(tensors, None, x[:1])[0], 2e-6) and not np.isfinite(y[1]).any()


def test_float16_activations_are_rounded_once(make_packed, library, run_model):
    packed = make_packed(50, 200, "fp16", rank=4)
    x = inputs(5, 200, np.float16)
    y = run_model(sparse_linear_node(*packed).model(elem_type=HALF), {"x": x}, library)[0]
    assert y.dtype == np.float16 and close(y, reference(*packed, x), 6e-4)
    body = run_model(sparse_linear_node(*packed).model(elem_type=HALF), {"x": x})[0]
    assert body.dtype == np.float16 and close(body, reference(*packed, x), 2e-2)


def test_leading_dimensions_and_no_input_at_all(make_packed, library, run_model):
    packed = make_packed(17, 45, "int8", rank=2)
    model = sparse_linear_node(*packed).model()
    for value in (model.graph.input[0], model.graph.output[0]):
        extent = value.type.tensor_type.shape.dim[-1].dim_value
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, FLOAT, ["a", "b", extent]))
    for shape in ((2, 3, 45), (0, 4, 45)):
        x = inputs(1, int(np.prod(shape)))[0].reshape(shape)
        y = run_model(model, {"x": x}, library)[0]
        assert y.shape == (*shape[:2], 17)
        assert x.size == 0 or close(y.reshape(-1, 17), reference(*packed, x.reshape(-1, 45)), 2e-6)


def test_a_node_names_every_input_and_attribute_of_the_contract(make_packed):
    made = sparse_linear_node(*make_packed(17, 45, "nf4", rank=2), name="m", x="a", y="b")
    assert list(made.node.input) == ["a", *(f"m.{role}" for role in INPUTS[1:])]
    assert {attribute.name for attribute in made.node.attribute} == set(ATTRIBUTES)
    bare = sparse_linear_node(*make_packed(17, 45, "fp32", sparse=False), name="m").node
    assert list(bare.input) == ["x", "", "m.values", "", "", "", "", ""]


def test_the_page_of_the_contract_names_every_input_and_attribute():
    page = (Path(__file__).parents[2] / "docs" / "onnx.md").read_text()
    assert [name for name in (*INPUTS, *ATTRIBUTES, *ENCODINGS) if f"`{name}`" not in page] == []
    assert [name for i, name in enumerate(INPUTS) if f"| {i} `{name}` |" not in page] == []


@pytest.mark.parametrize(("options", "message"), [({"opset": 17}, "opset 17"), ({"factors": "int4"}, "factors 'int4'")])
def test_what_cannot_be_made_is_refused(options, message, make_packed):
    with pytest.raises(OptionError, match=message):
        sparse_linear_node(*make_packed(17, 45, "fp32"), **options)
