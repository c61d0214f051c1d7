"""Run in a process of its own: python hostile.py LIBRARY COUNT SEED. Single-node models with something wrong in them.

Every tensor has memory of its own and of its exact size, so that a sanitizer sees a read past it. A model is either
refused by ONNX Runtime or computes what its tensors say. Prints how many were refused, and by whom, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import conftest  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402
from salr.formats.manifest import ModuleEntry  # noqa: E402
from salr.formats.module import ModuleTensors  # noqa: E402

import salr.onnx  # noqa: E402

NUMBERS = (-(2**63), -1, 0, 1, 2, 7, 8, 9, 31, 32, 33, 2**31, 2**32 + 1, 2**46, 2**62, 2**63 - 1)
TYPES = {
    TensorProto.UINT8: np.uint8, TensorProto.INT8: np.int8, TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16, TensorProto.BFLOAT16: np.uint16, TensorProto.UINT64: np.uint64,
    TensorProto.INT64: np.int64, TensorProto.DOUBLE: np.float64,
}  # fmt: skip
Tensors = dict[str, tuple[int, np.ndarray]]


class Case:
    """A sound model, to be made unsound: attributes, tensors by role, and the number of columns of x."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        encoding = str(random.choice(["bf16", "fp16", "fp32", "int8", "nf4"]))
        n_rows, n_columns = int(random.integers(1, 20)), int(random.integers(1, random.choice([70, 300])))
        make = conftest.make_packed.__wrapped__()
        packed = make(
            n_rows, n_columns, encoding, sparse=random.random() < 0.8, rank=int(random.integers(0, 5)),
            group_size=int(random.choice([8, 16, 20, 32, 64, 128])),
        )  # fmt: skip
        made = salr.onnx.sparse_linear_node(*packed, factors=str(random.choice(["bf16", "fp16", "fp32"])))
        self.attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in made.node.attribute}
        self.tensors: Tensors = {
            tensor.name.rpartition(".")[2]: (
                tensor.data_type,
                np.frombuffer(tensor.raw_data, TYPES[tensor.data_type]).reshape(tuple(tensor.dims)).copy(),
            )
            for tensor in made.initializers
        }
        self.n_columns, self.changeable = n_columns, ""

    def mutate(self) -> None:
        """Change one thing."""
        change = [self._lie, self._resize, self._retype, self._flip, self._drop, self._free, self._offsets, self._x]
        change[int(self.random.choice(8, p=[0.25, 0.2, 0.1, 0.2, 0.05, 0.05, 0.1, 0.05]))]()

    def _role(self) -> str:
        return str(self.random.choice(sorted(self.tensors)))

    def _lie(self) -> None:
        name = str(self.random.choice(sorted(self.attributes)))
        if name == "encoding":
            self.attributes[name] = str(
                self.random.choice(["bf16", "fp16", "fp32", "int8", "nf4", "int3", "", "x" * 999])
            )
        elif self.random.random() < 0.5:
            self.attributes[name] = int(self.random.choice(np.array(NUMBERS, object)))
        else:
            self.attributes[name] = int(self.attributes[name]) + int(self.random.integers(-9, 10))

    def _resize(self) -> None:
        role = self._role()
        kind, array = self.tensors[role]
        axis = int(self.random.integers(array.ndim))
        extent = int(self.random.choice([0, 1, array.shape[axis] - 1, array.shape[axis] + 1, array.shape[axis] // 2]))
        extents = tuple(max(0, extent) if i == axis else n for i, n in enumerate(array.shape))
        if self.random.random() < 0.2:
            extents = (*extents, 1)
        self.tensors[role] = kind, np.resize(array, extents)

    def _retype(self) -> None:
        role = self._role()
        kind = int(self.random.choice(list(TYPES)))
        array = self.tensors[role][1]
        self.tensors[role] = (
            kind,
            np.resize(np.frombuffer(array.tobytes() + bytes(8), np.uint8), array.size * 8)[
                : array.size * np.dtype(TYPES[kind]).itemsize
            ]
            .view(TYPES[kind])
            .reshape(array.shape),
        )

    def _flip(self) -> None:
        role = self._role()
        _, array = self.tensors[role]
        raw = array.view(np.uint8).reshape(-1) if array.size else array
        for _ in range(int(self.random.integers(1, 4))):
            if raw.size:
                raw[int(self.random.integers(raw.size))] ^= np.uint8(1 << int(self.random.integers(8)))

    def _drop(self) -> None:
        del self.tensors[self._role()]

    def _free(self) -> None:
        self.changeable = self._role()

    def _offsets(self) -> None:
        if "row_offsets" in self.tensors:
            offsets = self.tensors["row_offsets"][1]
            if offsets.size and offsets.dtype == np.uint64:
                number = int(self.random.choice(np.array(NUMBERS, object))) % 2**64
                offsets.reshape(-1)[int(self.random.integers(offsets.size))] = np.uint64(number)

    def _x(self) -> None:
        self.n_columns = max(0, self.n_columns + int(self.random.integers(-8, 9)))

    def model(self) -> onnx.ModelProto:
        """Return the model; its initializers are given beside it."""
        roles = salr.onnx.contract.INPUTS[1:]
        node = helper.make_node(
            "SparseLinear", ["x", *(role if role in self.tensors else "" for role in roles)], ["y"], "node",
            domain="salr", **self.attributes,
        )  # fmt: skip
        value = helper.make_tensor_value_info
        inputs = [value("x", TensorProto.FLOAT, ["m", "k"])]
        if self.changeable in self.tensors:
            kind, array = self.tensors[self.changeable]
            inputs.append(value(self.changeable, kind, array.shape))
        initializers = [
            helper.make_tensor(role, kind, array.shape, array.tobytes(), raw=True)
            for role, (kind, array) in self.tensors.items()
        ]
        graph = helper.make_graph([node], "g", inputs, [value("y", TensorProto.FLOAT, ["m", "n"])], initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("salr", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def expected(self, x: np.ndarray) -> np.ndarray:
        """Return what a model that was not refused has to compute."""
        facts, arrays = self.attributes, {role: array for role, (_, array) in self.tensors.items()}
        encoding = facts["encoding"] if isinstance(facts["encoding"], str) else facts["encoding"].decode()
        shape = facts["out_features"], facts["in_features"]
        entry = ModuleEntry(
            "w",
            shape,
            False,
            shape,
            "F32",
            facts["nnz"],
            "any",
            encoding,
            "source",
            group_size=facts["group_size"] or None,
        )
        scales = arrays.get("scales")
        weight = ModuleTensors(
            entry, arrays["values"], arrays.get("bitmap"), arrays.get("row_offsets"),
            None if scales is None else scales.astype(np.float32),
        ).dense()  # fmt: skip
        y = x @ weight.T
        if "lora_A" in arrays:
            factors = [self._float(role) for role in ("lora_A", "lora_B")]
            y = y + ((x @ factors[0].T) * arrays["rank_scaling"]) @ factors[1].T
        return y

    def _float(self, role: str) -> np.ndarray:
        kind, array = self.tensors[role]
        if kind == TensorProto.BFLOAT16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)


def attempt(case: Case, library: str) -> str:
    """Return who refused a model, or that it ran and was right."""
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    case.tensors = {role: (kind, array.copy()) for role, (kind, array) in case.tensors.items()}  # of their exact size
    values = {
        role: onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind)
        for role, (kind, array) in case.tensors.items()
        if role != case.changeable
    }
    for role, value in values.items():
        options.add_initializer(role, value)
    x = case.random.standard_normal((int(case.random.choice([1, 2, 5, 8, 9, 40])), case.n_columns), np.float32)
    try:
        session = onnxruntime.InferenceSession(case.model().SerializeToString(), options, ["CPUExecutionProvider"])
        found = session.run(["y"], {"x": x})[0]
    except Exception as error:
        return "refused by the library" if "salr.SparseLinear:" in str(error) else "refused by onnxruntime"
    with np.errstate(all="ignore"):
        expected = case.expected(x)
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
        wrong = np.isfinite(expected) & ~(np.abs(found - expected) <= 1e-4 * scale)
    if found.shape != expected.shape or (wrong.any() and scale < 1e30):
        raise AssertionError(f"accepted and wrong: {case.attributes}")
    return "ran"


def main(library: str, count: str, seed: str) -> None:
    """Attempt COUNT models of one or two changes each."""
    outcomes: Counter[str] = Counter()
    for number in range(int(count)):
        random = np.random.default_rng([int(seed), number])
        case = Case(random)
        for _ in range(int(random.integers(1, 3))):
            if case.tensors:
                case.mutate()
        outcomes[attempt(case, library)] += 1
    print(json.dumps(outcomes))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
