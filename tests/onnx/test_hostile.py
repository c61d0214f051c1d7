"""Models with something wrong in them: an error that names the tensor, never a crash, never a read past a tensor."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from salr.onnx import sparse_linear_node
from salr.onnx.library import find_compiler
from tests.sanitizer import preloaded


def without_body(made: Any) -> onnx.ModelProto:
    """Return a model of one node that only the library can run."""
    model = made.model()
    del model.functions[:]
    return model


def replace(model: onnx.ModelProto, name: str, array: np.ndarray) -> None:
    """Give a model another initializer under the name of an old one."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


@pytest.fixture
def model(make_packed: Callable[..., Any]) -> onnx.ModelProto:
    """Return a sound model: (17, 45) int8, rank 3."""
    return without_body(sparse_linear_node(*make_packed(17, 45, "int8", rank=3), name="layer"))


@pytest.fixture
def refused(run_model: Callable[..., Any], library: Path) -> Callable[[onnx.ModelProto], str]:
    """Return a function that expects ONNX Runtime to refuse a model, and returns its words."""

    def run(model: onnx.ModelProto) -> str:
        with pytest.raises(Exception, match=r"ONNXRuntime") as caught:
            run_model(model, {"x": np.ones((2, 45), np.float32)}, library)
        return str(caught.value)

    return run


def array(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name)).copy()


def test_the_sound_model_runs(model, run_model, library):
    assert run_model(model, {"x": np.ones((2, 45), np.float32)}, library)[0].shape == (2, 17)


def test_a_wrong_size_bitmap_is_named(model, refused):
    replace(model, "layer.bitmap", array(model, "layer.bitmap")[:, :5])
    assert "tensor 'layer.bitmap': shape [17, 5], needed [17, 6]" in refused(model)


def test_values_that_are_too_short_are_named(model, refused):
    replace(model, "layer.values", array(model, "layer.values")[:-64])
    message = refused(model)
    assert "tensor 'layer.values'" in message and "64 of padding" in message


def test_a_bit_too_many_is_found(model, refused):
    bitmap = array(model, "layer.bitmap")
    bitmap[3, 0] ^= 1
    replace(model, "layer.bitmap", bitmap)
    assert "tensor 'layer.row_offsets'" in refused(model) and "at row 4" in refused(model)


def test_a_bit_past_the_last_column_is_found(model, refused):
    bitmap = array(model, "layer.bitmap")
    bitmap[2, -1] |= 128
    replace(model, "layer.bitmap", bitmap)
    assert "tensor 'layer.bitmap': a bit past column 45 in row 2" in refused(model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("out_features", 18, "tensor 'layer.bitmap'"),
        ("in_features", 2**62, "out_features 17, in_features 4611686018427387904"),
        ("nnz", 1, "tensor 'layer.row_offsets'"),
        ("nnz", -1, "nnz -1"),
        ("group_size", 16, "tensor 'layer.scales': shape [17, 2], needed [17, 3]"),
        ("group_size", 0, "group_size 0"),
        ("encoding", "int3", "encoding 'int3'"),
        ("encoding", "bf16", "group_size 32"),
        ("encoding", "fp16", "group_size 32"),
    ],
)
def test_an_attribute_that_lies_is_found(name, value, message, model, refused):
    attribute = next(a for a in model.graph.node[0].attribute if a.name == name)
    attribute.CopyFrom(helper.make_attribute(name, value))
    assert message in refused(model)


def test_a_missing_attribute_is_named(model, refused):
    kept = [a for a in model.graph.node[0].attribute if a.name != "nnz"]
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.extend(kept)
    assert "attribute 'nnz' is missing" in refused(model)


def test_only_one_of_bitmap_and_row_offsets_is_refused(model, refused):
    model.graph.node[0].input[3] = ""
    assert "tensor 'layer.bitmap': only one of bitmap and row_offsets" in refused(model)


def test_factors_of_the_wrong_shape_are_named(model, refused):
    replace(model, "layer.lora_B", array(model, "layer.lora_B")[:, :2])
    assert "tensor 'layer.lora_B': shape [17, 2], needed [17, 3]" in refused(model)


def test_a_weight_that_may_change_is_refused(model, refused):
    model.graph.input.append(helper.make_tensor_value_info("layer.bitmap", TensorProto.UINT8, [17, 6]))
    assert "tensor 'layer.bitmap': an input that may change" in refused(model)


def test_an_operator_from_the_future_is_refused_by_the_library_and_runs_by_its_own_body(
    make_packed, run_model, library
):
    packed = make_packed(17, 45, "bf16")
    model, x = sparse_linear_node(*packed, name="layer").model(), np.ones((1, 45), np.float32)
    model.graph.node[0].attribute.append(helper.make_attribute("version", 2))
    next(opset for opset in model.opset_import if opset.domain == "salr").version = 2
    with pytest.raises(Exception, match=r"tensor 'layer.values': version 2 of the operator, needed 1"):
        run_model(model, {"x": x}, library)
    np.testing.assert_allclose(run_model(model, {"x": x})[0], x @ packed[0].dense().T, rtol=1e-5, atol=1e-5)


def attempt(run_in_process: Callable[..., str], library: Path, count: int, seed: int) -> None:
    outcomes = json.loads(run_in_process("hostile.py", library, count, seed, environment=preloaded()))
    assert sum(outcomes.values()) == count
    assert outcomes["refused by the library"] > count / 2 and outcomes["ran"] > count / 50


def test_mutated_models_read_nothing_outside_their_tensors(run_in_process, sanitized_library):
    attempt(run_in_process, sanitized_library, 500, 0)


@pytest.mark.fuzz
def test_many_mutated_models_read_nothing_outside_their_tensors(run_in_process, sanitized_library):
    for seed in range(1, 11):
        attempt(run_in_process, sanitized_library, 1000, seed)


def test_the_sanitizer_sees_a_read_past_a_tensor(run_in_process, tmp_path):
    """A library whose check of the padding is taken out is caught: so the tests above can fail."""
    from salr.onnx import library as module

    sources = shutil.copytree(module.SOURCES, tmp_path / "native")
    for path in [*sources.glob("product_avx*"), *sources.glob("few_inputs_*.cpp")]:
        path.unlink()
    text = (sources / "validate.cpp").read_text()
    assert "if (found < used + kPaddingBytes)" in text
    (sources / "validate.cpp").write_text(text.replace("if (found < used + kPaddingBytes)", "if (found < 0)"))
    broken = tmp_path / "libsalr_onnx.so"
    files = [str(path) for path in sources.glob("*.cpp")]
    command = [find_compiler(), "-std=c++17", "-g", "-fPIC", "-w", "-fsanitize=address", "-shared", "-o", broken]
    subprocess.run([*command, *files], check=True)
    with pytest.raises(AssertionError, match="AddressSanitizer: heap-buffer-overflow"):
        run_in_process("hostile.py", broken, 500, 0, environment=preloaded())
