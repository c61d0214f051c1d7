"""Is the SparseLinear kernel faster than what ONNX Runtime has? One layer, 50 % kept, rank 64, on the CPU.

    python benchmarks/onnx_linear.py [--shape 4096x11008] [--rows 1,2,...] [--threads 1,2] [--values bf16,fp16,int8]
        [--repeats 20] [--json FILE] [--models DIR,DIR,...]

Dense is ONNX Runtime's MatMul in float32 and in float16; the faster of the two is what ours is divided by. MatMulNBits
with 8 and 4 bits (blocks of 128, its int8 accuracy level, no adapters) stands beside them. Ours takes float32 x. Every
kind is a session with as many equal layers as fill 256 MB, so that no cache holds the weights; a figure is the time of
one layer, the fastest of all runs and, in brackets, the median; the kinds of a row run in turn. ``--models`` loads
exported directories instead, each in a process of its own: seconds until the session is ready and memory it added,
with the library and without.

(The file is not called onnx.py, because a script's folder comes first where Python looks for ``import onnx``.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import onnx
import onnxruntime
from layer_times import Row, processor
from onnx import TensorProto, helper, numpy_helper
from salr.formats.bitmap import pack_bitmap, row_offsets
from salr.formats.dtypes import FLOAT_ENCODINGS, from_float32
from salr.formats.manifest import ModuleEntry
from salr.formats.module import AdapterStack, ModuleTensors
from salr.formats.values import encode_quantized, pad_values

from salr.onnx import get_library_path, sparse_linear_node

RANK, GROUP_SIZE, COPIES_BYTES = 64, 128, 256 << 20
OPSET = 21
DENSE = ("dense fp32", "dense fp16")


@dataclass(frozen=True)
class Layer:
    """A node without its name, its weights, and the element type of its x."""

    node: onnx.NodeProto
    weights: list[onnx.TensorProto]
    functions: list[onnx.FunctionProto]
    elem_type: int = TensorProto.FLOAT

    @property
    def n_bytes(self) -> int:
        """Size of the weights."""
        return sum(len(tensor.raw_data) for tensor in self.weights)


def dense(n_rows: int, n_columns: int, dtype: type) -> Layer:
    """Return a MatMul."""
    weight = (np.random.default_rng(0).standard_normal((n_columns, n_rows), np.float32) * 0.02).astype(dtype)
    tensor = numpy_helper.from_array(weight, "w")
    return Layer(helper.make_node("MatMul", ["x", "w"], ["y"]), [tensor], [], tensor.data_type)


def few_bits(n_rows: int, n_columns: int, n_bits: int) -> Layer:
    """Return a MatMulNBits."""
    random = np.random.default_rng(0)
    n_blocks = -(-n_columns // GROUP_SIZE)
    stored = random.integers(0, 255, (n_rows, n_blocks, GROUP_SIZE * n_bits // 8), np.uint8)
    scales = np.full(n_rows * n_blocks, 0.001, np.float32)
    node = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=n_columns, N=n_rows, bits=n_bits,
        block_size=GROUP_SIZE, accuracy_level=4,
    )  # fmt: skip
    return Layer(node, [numpy_helper.from_array(stored, "w"), numpy_helper.from_array(scales, "s")], [])


def sparse(n_rows: int, n_columns: int, encoding: str) -> Layer:
    """Return a SparseLinear of a random matrix with half of its weights kept and a low-rank part."""
    random = np.random.default_rng(0)
    mask = random.random((n_rows, n_columns), np.float32) < 0.5
    bitmap, nnz, scales = pack_bitmap(mask), int(mask.sum()), None
    kept = random.standard_normal(nnz, np.float32) * np.float32(0.02)
    if encoding in FLOAT_ENCODINGS:
        stored = from_float32(kept, FLOAT_ENCODINGS[encoding])
    else:
        scales = np.full((n_rows, -(-n_columns // GROUP_SIZE)), 0.08 / (127 if encoding == "int8" else 1), np.float32)
        stored = encode_quantized(kept, np.full(nnz, scales[0, 0]), encoding)
    shape, group_size = (n_rows, n_columns), None if scales is None else GROUP_SIZE
    entry = ModuleEntry(
        "w", shape, False, shape, "BF16", nnz, "unstructured", encoding, "source", group_size=group_size
    )
    tensors = ModuleTensors(entry, pad_values(stored, encoding, nnz), bitmap, row_offsets(bitmap), scales)
    adapters = AdapterStack(
        random.standard_normal((RANK, n_columns), np.float32), random.standard_normal((n_rows, RANK), np.float32),
        np.full(RANK, 0.01, np.float32), {},
    )  # fmt: skip
    made = sparse_linear_node(tensors, adapters, factors="bf16", opset=OPSET)
    return Layer(made.node, list(made.initializers), [made.function])


def session(layer: Layer, n_columns: int, n_threads: int) -> tuple[Any, int]:
    """Return a session of equal layers in memory of their own, and how many there are."""
    n_copies = max(1, COPIES_BYTES // layer.n_bytes)
    nodes, weights = [], []
    for copy in range(n_copies):
        node = onnx.NodeProto.FromString(layer.node.SerializeToString())
        node.name, node.output[0] = f"layer{copy}", f"y{copy}"
        for i, name in enumerate(node.input):
            if name and name != "x":
                node.input[i] = f"{name}.{copy}"
        nodes.append(node)
        for tensor in layer.weights:
            renamed = onnx.TensorProto.FromString(tensor.SerializeToString())
            renamed.name = f"{tensor.name}.{copy}"
            weights.append(renamed)
    value = helper.make_tensor_value_info
    outputs = [value(f"y{copy}", layer.elem_type, None) for copy in range(n_copies)]
    graph = helper.make_graph(nodes, "layers", [value("x", layer.elem_type, ["M", n_columns])], outputs, weights)
    opsets = [
        helper.make_opsetid(domain, version) for domain, version in (("", OPSET), ("com.microsoft", 1), ("salr", 1))
    ]
    model = helper.make_model(graph, opset_imports=opsets, functions=layer.functions, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would slow the others
    options.register_custom_ops_library(str(get_library_path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]), n_copies


def layers(n_rows: int, n_columns: int, values: list[str]) -> dict[str, Layer]:
    """Return every kind of layer."""
    return {
        "dense fp32": dense(n_rows, n_columns, np.float32),
        "dense fp16": dense(n_rows, n_columns, np.float16),
        "MatMulNBits 8": few_bits(n_rows, n_columns, 8),
        "MatMulNBits 4": few_bits(n_rows, n_columns, 4),
        **{f"salr {encoding}": sparse(n_rows, n_columns, encoding) for encoding in values},
    }


def measure(shape: str, options: argparse.Namespace) -> list[Row]:
    """Time one shape with all numbers of threads and inputs."""
    n_rows, n_columns = (int(size) for size in shape.split("x"))
    made, rows = layers(n_rows, n_columns, options.values), []
    for n_threads in options.threads:
        sessions = {kind: session(layer, n_columns, n_threads) for kind, layer in made.items()}
        for n_inputs in options.rows:
            x = np.random.default_rng(1).standard_normal((n_inputs, n_columns), np.float32)
            feeds = {kind: x.astype(np.float16 if kind == "dense fp16" else np.float32) for kind in made}
            times: dict[str, list[float]] = {kind: [] for kind in made}
            for turn in range(options.repeats + 1):
                for kind, (runner, n_copies) in sessions.items():
                    begin = time.perf_counter()
                    runner.run(None, {"x": feeds[kind]})
                    if turn:
                        times[kind].append(1e3 * (time.perf_counter() - begin) / n_copies)
            fastest = {kind: min(each) for kind, each in times.items()}
            median = {kind: statistics.median(each) for kind, each in times.items()}
            rows.append(Row(shape, n_inputs, n_threads, fastest, median))
            print(rows[-1].line(DENSE), flush=True)
    return rows


_LOAD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import onnxruntime
from pathlib import Path
def memory():
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return [int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "VmHWM")]
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
if sys.argv[3]:
    options.register_custom_ops_library(sys.argv[3])
before, begin = memory(), time.perf_counter()
session = onnxruntime.InferenceSession(sys.argv[2], options, ["CPUExecutionProvider"])
seconds, after = time.perf_counter() - begin, memory()
print(seconds, *(b - a for a, b in zip(before, after)))
"""


def load_costs(folder: Path) -> list[dict[str, Any]]:
    """Return what it costs to load an exported directory, with the library and without."""
    costs = []
    for library in (str(get_library_path()), ""):
        command = [sys.executable, "-c", _LOAD, str(Path(__file__).parents[1]), str(folder / "model.onnx"), library]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        seconds, anonymous, mapped, peak = (float(word) for word in output.split())
        names = {"directory": folder.name, "library": bool(library), "seconds": seconds}
        costs.append(names | {"anonymous_mib": anonymous, "mapped_mib": mapped, "peak_mib": peak})
        print("| " + " | ".join([folder.name, "library" if library else "body"]), end=" | ")
        print(f"{seconds:.2f} | {anonymous:.0f} | {mapped:.0f} | {peak:.0f} |", flush=True)
    return costs


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "onnxruntime": onnxruntime.__version__,
        "python": platform.python_version(),
    }


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    words = lambda text: text.split(",")  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4096x11008", help="N x K")
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--values", type=words, default=["bf16", "fp16", "int8"])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--models", type=words, default=[], help="exported directories to load instead")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the table and write the JSON."""
    options, facts = parsed(), machine()
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    if options.models:
        head = ["directory", "kernels", "seconds", "anonymous MiB", "mapped MiB", "peak MiB"]
    else:
        kinds = ["dense fp32", "dense fp16", "MatMulNBits 8", "MatMulNBits 4"]
        head = ["N x K", "threads", "M", *kinds, *(f"salr {values}" for values in options.values)]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    found: list[Any] = []
    if options.models:
        found = [cost for folder in options.models for cost in load_costs(Path(folder))]
    else:
        found = [asdict(row) for row in measure(options.shape, options)]
    if options.json:
        options.json.write_text(json.dumps({"machine": facts, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
