"""Is a packed layer faster than the dense one on this CPU? One layer, 50 % kept, rank 64, against torch.

    python benchmarks/cpu_linear.py [--shapes 4096x4096,...] [--rows 1,2,...] [--threads 1,2] [--values bf16,int8]
        [--repeats 30] [--json FILE]

Dense is torch.nn.functional.linear in float32 and in bfloat16; the faster of the two is what ours is divided by. Ours
takes bfloat16 x. All kernels of a row are timed in turn, each call on the next of several copies of its weights, so
that no cache holds them; a figure is the fastest call and, in brackets, the median. With one thread its processor time
is taken, which other jobs cannot stretch; with more, the time that passes. The column "ort int8" is ONNX Runtime's
MatMulNBits with 8 bits (dense, no adapters, its own accuracy class) where onnxruntime and onnx are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from layer_times import Row, processor
from salr.formats.bitmap import pack_bitmap, row_offsets
from salr.formats.values import encode_quantized, pad_values

from salr.runtime import cpu
from salr.runtime.packed import Adapters, PackedWeight

RANK, GROUP_SIZE = 64, 128
DENSE = ("fp32", "bf16")
COPIES_BYTES = 128 << 20  # weights of one kind together: four times a 32 MiB cache
Call = Callable[[int], object]


def packed_weight(n_rows: int, n_columns: int, values: str) -> PackedWeight:
    """Return a random matrix with half of its weights kept."""
    random = np.random.default_rng(0)
    mask = random.random((n_rows, n_columns)) < 0.5
    bitmap, nnz = pack_bitmap(mask), int(mask.sum())
    kept = torch.randn(nnz) * 0.02
    scales = None
    if values == "bf16":
        bits = kept.bfloat16().view(torch.int16).numpy().view(np.uint16)
        stored = torch.from_numpy(pad_values(bits, values, nnz).view(np.int16)).view(torch.bfloat16)
    else:
        scales = np.full((n_rows, -(-n_columns // GROUP_SIZE)), 0.08 / (127 if values == "int8" else 1), np.float32)
        each = np.full(nnz, scales[0, 0], np.float32)
        stored = torch.from_numpy(pad_values(encode_quantized(kept.numpy(), each, values), values, nnz))
    return PackedWeight(
        n_rows,
        n_columns,
        nnz,
        values,
        "unstructured",
        stored,
        torch.from_numpy(bitmap),
        torch.from_numpy(row_offsets(bitmap).view(np.int64)),
        None if scales is None else torch.from_numpy(scales),
        None if scales is None else GROUP_SIZE,
    )


def packed_layers(n_rows: int, n_columns: int, values: str) -> list[cpu.Prepared]:
    """Return equal layers in memory of their own."""
    weight = packed_weight(n_rows, n_columns, values)
    assert weight.bitmap is not None
    n_bytes = weight.values.numel() * weight.values.element_size() + weight.bitmap.numel()
    layers = []
    for _ in range(1 + COPIES_BYTES // n_bytes):
        adapters = Adapters(
            torch.randn(RANK, n_columns).bfloat16(), torch.randn(n_rows, RANK).bfloat16(), torch.full((RANK,), 0.01)
        )
        copy = replace(weight, values=weight.values.clone(), bitmap=weight.bitmap.clone())
        layers.append(cpu.prepare(copy, adapters))
    return layers


def dense_weights(n_rows: int, n_columns: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return dense matrices in memory of their own."""
    n_copies = 1 + COPIES_BYTES // (n_rows * n_columns * dtype.itemsize)
    return [torch.randn(n_rows, n_columns).to(dtype) for _ in range(n_copies)]


def rotate(function: Callable[[Any], object], over: list[Any]) -> Call:
    """Return a call that takes the next copy each time."""
    return lambda turn: function(over[turn % len(over)])


def time_in_turn(calls: dict[str, Call], repeats: int, n_threads: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the fastest and the median time of each call in milliseconds; two rounds first do not count."""
    clock = time.thread_time if n_threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            begin = clock()
            call(turn)
            times[name].append(1e3 * (clock() - begin))
    counted = {name: each[2:] for name, each in times.items()}
    return {n: min(t) for n, t in counted.items()}, {n: statistics.median(t) for n, t in counted.items()}


def eight_bit_sessions(n_rows: int, n_columns: int, n_threads: int) -> list[Any]:
    """Return onnxruntime sessions of one MatMulNBits node each, 8 bits, blocks of 128, int8 accuracy level."""
    import onnx
    import onnxruntime

    random = np.random.default_rng(0)
    blocks = -(-n_columns // GROUP_SIZE)
    tensors = {
        "B": random.integers(0, 255, (n_rows, blocks, GROUP_SIZE), np.uint8),
        "scales": np.full(n_rows * blocks, 0.001, np.float32),
    }
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "B", "scales"], ["y"], domain="com.microsoft", K=n_columns, N=n_rows, bits=8,
        block_size=GROUP_SIZE, accuracy_level=4,
    )  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "layer",
        [value("x", onnx.TensorProto.FLOAT, ["M", n_columns])],
        [value("y", onnx.TensorProto.FLOAT, ["M", n_rows])],
        [onnx.numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = n_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # its threads would slow the others
    n_copies = 1 + COPIES_BYTES // (n_rows * n_columns)
    return [onnxruntime.InferenceSession(model, options, ["CPUExecutionProvider"]) for _ in range(n_copies)]


def measure(n_rows: int, n_columns: int, options: argparse.Namespace) -> list[Row]:
    """Time one shape with all numbers of inputs and threads."""
    linear = torch.nn.functional.linear
    dense = {"fp32": torch.float32, "bf16": torch.bfloat16}
    weights = {name: dense_weights(n_rows, n_columns, dtype) for name, dtype in dense.items()}
    layers = {f"salr {values}": packed_layers(n_rows, n_columns, values) for values in options.values}
    rows = []
    for n_threads in options.threads:
        torch.set_num_threads(n_threads)
        sessions = eight_bit_sessions(n_rows, n_columns, n_threads) if options.onnxruntime else []
        for n_inputs in options.rows:
            x = torch.randn(n_inputs, n_columns)
            inputs = {name: x.to(dtype) for name, dtype in dense.items()}
            calls = {name: rotate(lambda w, x=inputs[name]: linear(x, w), weights[name]) for name in dense}
            calls |= {n: rotate(lambda y, x=inputs["bf16"]: cpu.apply(y, x), each) for n, each in layers.items()}
            if sessions:
                feed = {"x": x.numpy()}
                calls["ort int8"] = rotate(lambda s, feed=feed: s.run(None, feed), sessions)
            repeats = max(5, options.repeats // (4 if n_inputs >= 256 else 1))
            row = Row(f"{n_rows}x{n_columns}", n_inputs, n_threads, *time_in_turn(calls, repeats, n_threads))
            print(row.line(DENSE), flush=True)
            rows.append(row)
    return rows


def first_call_costs() -> dict[str, float]:
    """Return seconds of a new process's first call, with an empty compile cache and with a full one."""
    code = (
        "import sys, time; sys.path[:0] = sys.argv[1:]\nimport torch, cpu_linear as b, salr.runtime.cpu as cpu\n"
        "layer = b.cpu.prepare(b.packed_weight(64, 128, 'bf16'))\nx = torch.randn(1, 128).bfloat16()\n"
        "begin = time.perf_counter(); cpu.apply(layer, x); print(time.perf_counter() - begin)\n"
    )
    folder = Path(__file__).parent
    costs = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in ("compiled", "from the cache"):
            command = [sys.executable, "-c", code, str(folder.parent), str(folder)]
            environment = os.environ | {"SALR_CACHE": cache}
            costs[name] = float(subprocess.run(command, check=True, env=environment, capture_output=True).stdout)
    return costs


def machine() -> dict[str, str]:
    """Return what the figures depend on."""
    return {
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "path": cpu.description(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="4096x4096,4096x11008,14336x4096", help="N x K, separated by commas")
    parser.add_argument("--rows", type=numbers, default=[1, 2, 4, 8, 16, 64, 512])
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--values", type=lambda text: text.split(","), default=["bf16", "int8"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.onnxruntime = find_spec("onnxruntime") is not None and find_spec("onnx") is not None
    return options


def main() -> None:
    """Print the table and write the JSON."""
    options = parsed()
    facts, costs = machine(), first_call_costs()
    print(", ".join(f"{name}: {value}" for name, value in facts.items()))
    print("first call of a process:", ", ".join(f"{name} {1e3 * cost:.0f} ms" for name, cost in costs.items()))
    if not options.onnxruntime:
        print("ONNX Runtime's MatMulNBits: not installed")
    others = ["torch fp32", "torch bf16"] + ["ort int8"] * options.onnxruntime
    head = ["N x K", "threads", "M", *others, *(f"salr {values}" for values in options.values)]
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    rows: list[Row] = []
    for shape in options.shapes.split(","):
        rows += measure(*(int(size) for size in shape.split("x")), options)
    if options.json:
        report = {"machine": facts, "first_call_seconds": costs, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
