"""Is a packed layer faster than the dense one on this GPU? 50 % kept, rank 64 and bias included, against cuBLAS.

    python benchmarks/cuda_linear.py [--shapes 6144x4096,...] [--rows 1,2,...] [--values bf16,int8,nf4,2:4]
        [--autotune 4096x4096,...] [--peers] [--json FILE]

Dense is torch.nn.functional.linear in bfloat16, and for the shapes of --autotune also torch.compile's max-autotune; the
fastest of them is what ours is divided by. Both run in replays of CUDA graphs that walk through copies of the weights,
more than the L2 cache holds, after a fifth of a second of the same, so that each side has the clocks that its own power
leaves it; a figure is the median of the replays, in brackets the fastest and the slowest. "norms between" is the same
chain with a residual add and RMSNorm after each layer, as in a model, by the same kernel on both sides: of as many
columns as the smaller side of the layer has, which is a model's hidden size.
Quantized values are timed up to 64 rows. "2:4" is bf16 with two of four kept, timed from 1024
rows on, where sparse tensor cores multiply it. --peers adds torch's own dense kernels for 4-bit (groups of 128) and fp8
weights, without bias and adapters: other bytes, other errors.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from salr.cuda.device_layout import lay_out
from salr.cuda.linear import PreparedProduct
from salr.cuda.operations import add_norm
from salr.cuda.semi_structured import ENVIRONMENT_VARIABLE
from salr.cuda.skinny import items_of

from salr.runtime.packed import Adapters, PackedWeight
from salr.runtime.packing import pack

SHAPES = "6144x4096,4096x4096,28672x4096,4096x14336,11008x4096,4096x11008,28672x8192"
ROWS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096"
RANK = 64
ROTATED_BYTES = 120 << 20  # more than twice the L2 cache
MOST_FEW = 64  # rows up to which quantized values and peers are timed
TWO_OF_FOUR, QUANTIZED = "2:4", ("int8", "nf4")
FEWEST_SPARSE = 1024  # rows from which 2:4 is timed
WARM_UP = 0.2  # seconds
Call = Callable[[], Any]


def timed(calls: list[Call], replays: int = 9) -> tuple[float, float, float]:
    """Return the median, fastest and slowest time of a call in microseconds, of replays of a graph of all calls."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    rounds = max(1, 24 // len(calls))
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls * rounds:
            call()
    times, until = [], time.monotonic() + WARM_UP
    while time.monotonic() < until:
        graph.replay()
        torch.cuda.synchronize()
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / (rounds * len(calls)))
    return statistics.median(times), min(times), max(times)


class Layer:
    """One shape: its dense weights, and packed products by encoding of values, in as many copies as are rotated."""

    def __init__(self, shape: str, encodings: list[str]) -> None:
        self.n_rows, self.n_columns = map(int, shape.split("x"))
        torch.manual_seed(0)
        dense = torch.randn(self.n_rows, self.n_columns, device="cuda") * 0.02
        kept = dense.abs() > dense.abs()[:64].median()
        a, b = torch.randn(RANK, self.n_columns, device="cuda"), torch.randn(self.n_rows, RANK, device="cuda")
        self.adapters = Adapters((a * 0.02).bfloat16(), (b * 0.02).bfloat16(), torch.full((RANK,), 0.5, device="cuda"))
        self.bias = torch.randn(self.n_rows, device="cuda").bfloat16()
        self.dense = [dense.bfloat16() for _ in range(self._copies(2 * dense.numel()))]
        self.products, self.bytes_a_weight = {}, {}
        for encoding in encodings:
            slabs = lay_out(self._packed(dense, kept, encoding), torch.bfloat16)
            self.bytes_a_weight[encoding] = (slabs.n_bytes + items_of(slabs)[0].nbytes) / dense.numel()
            copies = [dataclasses.replace(slabs, slabs=slabs.slabs.clone()) for _ in range(self._copies(slabs.n_bytes))]
            self.products[encoding] = [PreparedProduct(c, self.adapters, self.bias, torch.bfloat16) for c in copies]

    @staticmethod
    def _packed(dense: torch.Tensor, kept: torch.Tensor, encoding: str) -> PackedWeight:
        if encoding != TWO_OF_FOUR:
            return pack(dense, kept, encoding)
        order = dense.abs().view(len(dense), -1, 4).argsort(2, descending=True)
        return dataclasses.replace(pack(dense, (order.argsort(2) < 2).flatten(1)), pattern=TWO_OF_FOUR)

    @staticmethod
    def _copies(n_bytes: int) -> int:
        return ROTATED_BYTES // n_bytes + 2


def measure(layer: Layer, shape: str, batch: int, autotune: bool, peers: bool = False) -> list[dict[str, Any]]:
    """Return the rows of one shape and number of rows of x."""
    x = torch.randn(batch, layer.n_columns, device="cuda").bfloat16()
    few = batch <= MOST_FEW
    linear = torch.nn.functional.linear
    times = {"dense": timed([lambda w=w: linear(x, w, layer.bias) for w in layer.dense])}
    if autotune:
        torch._dynamo.reset()
        tuned = torch.compile(linear, mode="max-autotune-no-cudagraphs")
        times["dense, autotuned"] = timed([lambda w=w: tuned(x, w, layer.bias) for w in layer.dense])
    for encoding, products in layer.products.items():
        if (encoding == TWO_OF_FOUR and batch < FEWEST_SPARSE) or (encoding in QUANTIZED and not few):
            continue
        times[encoding] = timed([lambda p=p: p(x) for p in products])
    if peers and few:
        times |= {name: timed(calls) for name, calls in peers_of(layer, x).items()}
    base = min(times["dense"][0], times.get("dense, autotuned", times["dense"])[0])
    rows = [row(shape, batch, name, time, base) for name, time in times.items()]
    return rows + (between(layer, shape, batch, x) if batch <= 16 else [])


def peers_of(layer: Layer, x: torch.Tensor) -> dict[str, list[Call]]:
    """Return calls of torch's own kernels on random weights of other types, in copies as ours."""
    shape, device = (layer.n_rows, layer.n_columns), x.device
    copies = ROTATED_BYTES // (layer.n_rows * layer.n_columns // 2) + 2
    codes = torch.randint(0, 255, (shape[0], shape[1] // 2), dtype=torch.uint8, device=device)
    int4 = [torch._convert_weight_to_int4pack(codes, 8) for _ in range(copies)]
    scales = torch.rand(shape[1] // 128, shape[0], 2, device=device).bfloat16()
    fp8 = [torch.randn(shape, device=device).to(torch.float8_e4m3fn) for _ in range(copies // 2 + 1)]
    x8, one = x.to(torch.float8_e4m3fn), torch.ones((), device=device)
    return {
        "torch int4": [lambda w=w: torch._weight_int4pack_mm(x, w, 128, scales) for w in int4],
        "torch fp8": [lambda w=w: torch._scaled_mm(x8, w.T, one, one, out_dtype=torch.bfloat16) for w in fp8],
    }


def between(layer: Layer, shape: str, batch: int, x: torch.Tensor) -> list[dict[str, Any]]:
    """Return the rows of the chain with a residual add and norm after each layer, by one kernel on both sides."""
    hidden = min(layer.n_rows, layer.n_columns)
    before, residual, scale = (
        torch.randn(*rows, hidden, device="cuda").bfloat16() for rows in ((batch,), (batch,), ())
    )

    def then_norm(linear: Call) -> Call:
        return lambda: (linear(), add_norm(before, residual, scale, 1e-5))

    dense = [then_norm(lambda w=w: torch.nn.functional.linear(x, w, layer.bias)) for w in layer.dense]
    base = timed(dense)
    rows = [row(shape, batch, "dense, norms between", base, base[0])]
    for encoding, products in layer.products.items():
        if encoding == TWO_OF_FOUR:
            continue
        time = timed([then_norm(lambda p=p: p(x)) for p in products])
        rows.append(row(shape, batch, f"{encoding}, norms between", time, base[0]))
    return rows


def row(shape: str, batch: int, name: str, time: tuple[float, float, float], base: float) -> dict[str, Any]:
    """Return and print one row."""
    found = {"shape": shape, "rows": batch, "kernel": name, "us": round(time[0], 2), "fastest_us": round(time[1], 2),
             "slowest_us": round(time[2], 2), "speed_up": round(base / time[0], 3)}  # fmt: skip
    spread = f"[{time[1]:.1f}, {time[2]:.1f}]"
    print(f"{shape:12} M={batch:<5} {name:24} {time[0]:9.2f} us {spread:18} {found['speed_up']:.2f}x", flush=True)
    return found


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--rows", default=ROWS)
    parser.add_argument("--values", default="bf16,int8,nf4,2:4")
    parser.add_argument("--autotune", default="", help="shapes for which torch.compile's max-autotune is tried too")
    parser.add_argument("--peers", action="store_true", help="torch's own int4 and fp8 kernels too, up to 64 rows")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ[ENVIRONMENT_VARIABLE] = "1"
    rows: list[dict[str, Any]] = []
    sizes: dict[str, Any] = {}
    for shape in args.shapes.split(","):
        layer = Layer(shape, args.values.split(","))
        sizes[shape] = layer.bytes_a_weight
        for batch in map(int, args.rows.split(",")):
            rows += measure(layer, shape, batch, shape in args.autotune.split(","), args.peers)
        if args.json:
            environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
            args.json.write_text(json.dumps({"environment": environment, "bytes_a_weight": sizes, "rows": rows}))
        del layer
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
