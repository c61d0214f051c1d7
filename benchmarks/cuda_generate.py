"""How much faster does a packed Llama-3-8B write text on a GPU? Random weights, 50 % kept, rank 64, against dense.

    python benchmarks/cuda_generate.py [--layers 32] [--batches 1,8,32] [--contexts 128,4096] [--values bf16]
        [--steps 32] [--repeats 5] [--load-layers 0] [--json FILE]

Both sides run the same decoder: the same attention, cache, norms and rotary kernels, one CUDA graph a step, and q/k/v
and gate/up merged. They differ in the products only: torch.nn.functional.linear, or packed weights with rank-64
adapters. A figure is the median of the repeats, each of so many steps after each other. The ceiling is the bytes that
a step has to read (weights, adapters, output layer, keys and values) at the bandwidth of a copy measured here.
--load-layers N also writes a dense and a converted checkpoint of N layers and times loading them, from a warm disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from random_model import RANK, Sizes, peak, random_packed, random_residual, random_weight, reset_peak, synchronize

import salr
from salr.runtime import backends, reference
from salr.runtime.decoder import Decoder, DecoderLayer, StaticCache, read_prompt
from salr.runtime.graph_decoding import Session
from salr.runtime.llama import operations_for
from salr.runtime.packed import Adapters, PackedWeight

EPSILON, THETA = 1e-5, 500000.0
Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One side at one batch and context: milliseconds a step (median, fastest, slowest), memory, bytes read a step."""

    side: str
    batch: int
    context: int
    step_ms: float | None
    fastest_ms: float | None = None
    slowest_ms: float | None = None
    peak_bytes: int | None = None
    read_bytes: int | None = None


@dataclass(frozen=True)
class Side:
    """A model of one kind and what its weights take; ``weight_bytes`` without the embedding, of which a row is read."""

    name: str
    decoder: Decoder
    weight_bytes: int
    build_seconds: float


def dense_product(rows: list[int], n_columns: int, device: torch.device) -> tuple[Product, int]:
    """Return the merged product of dense layers and its bytes."""
    weight = random_weight(sum(rows), n_columns, device)
    return lambda x: torch.nn.functional.linear(x, weight), weight.numel() * 2


def packed_product(rows: list[int], n_columns: int, device: torch.device, values: str) -> tuple[Product, int]:
    """Return the stacked product of packed layers with adapters and its bytes on the device."""
    weights, adapters = [], []
    for n in rows:
        weights.append(random_packed(n, n_columns, device, values))
        adapters.append(random_residual(n, n_columns, device))
    backend = backends.backend_for(device.type)
    if backend.stack is None:  # a machine without a GPU tries the script out
        each = [backend.product(w, a, None, device, torch.bfloat16).run for w, a in zip(weights, adapters, strict=True)]
        return lambda x: torch.cat([product(x) for product in each], -1), sum(
            canonical_bytes(w, a) for w, a in zip(weights, adapters, strict=True)
        )
    product = backend.stack(weights, adapters, [None] * len(rows), torch.bfloat16, device)
    if product is None:
        raise SystemExit(
            f"layers of {rows} rows cannot be stacked: {[backend.takes(w, torch.bfloat16) for w in weights]}"
        )
    ranks = sum(RANK * (n + n_columns) * 2 for n in rows)
    check(product, weights, adapters, n_columns, device)
    return product, product.weight.n_bytes + ranks


def canonical_bytes(weight: PackedWeight, adapters: Adapters) -> int:
    """Return what a layer's tensors take as a file holds them."""
    tensors = weight.values, weight.bitmap, weight.row_offsets, weight.scales, adapters.lora_A, adapters.lora_B
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def check(product: Product, weights: list[Any], adapters: list[Any], n_columns: int, device: torch.device) -> None:
    """Refuse to time a product that is wrong."""
    x = torch.randn(2, n_columns, device=device).to(torch.bfloat16)
    got, first = product(x).float(), 0
    for weight, own in zip(weights, adapters, strict=True):
        expected = reference.linear(x.float(), weight, own)
        error = float((got[:, first : first + weight.n_rows] - expected).norm() / expected.norm())
        if not error < 1e-2:
            raise SystemExit(f"wrong product: relative error {error:.3g} for {weight.n_rows} x {n_columns}")
        first += weight.n_rows


def build(name: str, sizes: Sizes, device: torch.device, values: str) -> Side:
    """Make a model of random weights on the device."""
    start, n_bytes = time.perf_counter(), 0

    def product(rows: list[int], n_columns: int) -> Product:
        nonlocal n_bytes
        made = dense_product(rows, n_columns, device) if name == "dense" else packed_product(
            rows, n_columns, device, values
        )  # fmt: skip
        n_bytes += made[1]
        return made[0]

    ones = torch.ones(sizes.hidden, dtype=torch.bfloat16, device=device)
    layers = [
        DecoderLayer(
            input_norm=ones,
            qkv=product(sizes.qkv, sizes.hidden),
            output=product([sizes.hidden], sizes.qkv[0]),
            post_norm=ones,
            gate_up=product([sizes.intermediate] * 2, sizes.hidden),
            down=product([sizes.hidden], sizes.intermediate),
        )
        for _ in range(sizes.layers)
    ]
    head, head_bytes = dense_product([sizes.words], sizes.hidden, device)
    shape = sizes.hidden, sizes.intermediate, sizes.head_columns, sizes.heads // sizes.kv_heads
    decoder = Decoder(
        random_weight(sizes.words, sizes.hidden, device), layers, ones, head, EPSILON, sizes.heads, sizes.kv_heads,
        sizes.head_columns, lambda n: tables(n, sizes.head_columns, device),
        operations_for(device, *shape, torch.bfloat16),
    )  # fmt: skip
    synchronize(device)
    return Side(name, decoder, n_bytes + head_bytes, time.perf_counter() - start)


def tables(n: int, columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines (n, D / 2) of Llama-3's rotary embedding."""
    frequencies = THETA ** (-torch.arange(0, columns, 2, device=device) / columns)
    angles = torch.arange(n, device=device)[:, None] * frequencies
    return angles.cos().to(torch.bfloat16), angles.sin().to(torch.bfloat16)


def decode(side: Side, sizes: Sizes, batch: int, context: int, options: argparse.Namespace) -> Row:
    """Time steps that begin with ``context`` slots in use."""
    device = side.decoder.embedding.device
    try:
        reset_peak(device)
        session = Session(side.decoder, batch, context + options.steps + 1)
        for cache in (session.cache.k, session.cache.v):
            for layer in cache:
                layer.normal_()
        times = []
        for repeat in range(options.repeats + 1):
            session.tokens.random_(sizes.words)
            session.slots.fill_(context)
            milliseconds = timed(lambda: [session.step() for _ in range(options.steps)], device) / options.steps
            times += [milliseconds] if repeat else []
        if not torch.isfinite(session.step()).all():
            raise SystemExit(f"{side.name}: logits are not finite at batch {batch}, context {context}")
    except torch.OutOfMemoryError:
        return Row(side.name, batch, context, None)
    read = side.weight_bytes + sizes.cache_bytes(batch, context + options.steps // 2)
    return Row(side.name, batch, context, statistics.median(times), min(times), max(times), peak(device), read)


def first_token_ms(side: Side, sizes: Sizes, length: int, repeats: int) -> float | None:
    """Return the median milliseconds from a prompt of one sequence to its first logits."""
    device = side.decoder.embedding.device
    try:
        cache = StaticCache.empty(side.decoder, 1, length)
        ids = torch.randint(sizes.words, (1, length), device=device)
        times = [timed(lambda: read_prompt(side.decoder, cache, ids), device) for _ in range(repeats + 1)]
    except torch.OutOfMemoryError:
        return None
    return statistics.median(times[1:])


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return milliseconds, the device's own where it is a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def bandwidth(device: torch.device) -> float:
    """Return bytes a second of a copy, read and written, the best of ten."""
    n_bytes = 2**31 if device.type == "cuda" else 2**26
    source, target = (torch.zeros(n_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    return max(2e3 * n_bytes / timed(lambda: target.copy_(source), device) for _ in range(10))


def measure(name: str, sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """Build one side, measure everything, and let go of it."""
    device = options.device
    reset_peak(device)
    try:
        side = build(name, sizes, device, options.values)
    except torch.OutOfMemoryError:
        return {"rows": [Row(name, b, c, None) for b in options.batches for c in options.contexts]}
    resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    rows = [decode(side, sizes, b, c, options) for c in options.contexts for b in options.batches]
    first = first_token_ms(side, sizes, options.prompt, options.repeats)
    kernels = side.decoder.operations.__name__
    return {
        "rows": rows, "first_token_ms": first, "weight_bytes": side.weight_bytes, "resident_bytes": resident,
        "build_seconds": side.build_seconds, "operations": kernels,
    }  # fmt: skip


def load_seconds(n_layers: int, device: torch.device) -> dict[str, float]:
    """Return how long a dense and a packed checkpoint of so many layers take to load, the better of two."""
    import transformers
    from large_shape import write_llama8b

    options = salr.ConvertOptions(salr.ModuleOptions(0.5, RANK), method="magnitude", device=str(device))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        dense.mkdir()
        write_llama8b(dense, n_layers)
        salr.convert(dense, Path(folder) / "m.salr", options)
        loaders: dict[str, Callable[[], Any]] = {
            "dense": lambda: transformers.AutoModelForCausalLM.from_pretrained(dense, dtype="auto").to(device),
            "salr": lambda: salr.load(Path(folder) / "m.salr", device=device),
        }
        for name, loader in loaders.items():
            times = []
            for _ in range(2):
                start = time.perf_counter()
                model = loader()
                synchronize(device)
                times.append(time.perf_counter() - start)
                del model
                reset_peak(device)
            found[name] = min(times)
    return found


def show(found: dict[str, dict[str, Any]], bytes_per_second: float) -> None:
    """Print the table."""
    head = ["batch", "context", "dense ms", "salr ms", "dense tok/s", "salr tok/s", "ratio", "dense of ceiling",
            "salr of ceiling", "dense GB", "salr GB", "memory"]  # fmt: skip
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for dense, packed in zip(found["dense"]["rows"], found["salr"]["rows"], strict=True):
        pair = (dense, packed)
        times = [f"{row.step_ms:.3f}" if row.step_ms else "out of memory" for row in pair]
        rates = [f"{1e3 * row.batch / row.step_ms:.0f}" if row.step_ms else "-" for row in pair]
        ratio = f"{dense.step_ms / packed.step_ms:.3f}x" if dense.step_ms and packed.step_ms else "-"
        shares = [
            f"{1e3 * row.read_bytes / bytes_per_second / row.step_ms:.0%}" if row.step_ms else "-" for row in pair
        ]
        sizes = [f"{row.peak_bytes / 1e9:.2f}" if row.peak_bytes else "-" for row in pair]
        memory = f"{packed.peak_bytes / dense.peak_bytes:.3f}x" if packed.peak_bytes and dense.peak_bytes else "-"
        cells = [str(dense.batch), str(dense.context), *times, *rates, ratio, *shares, *sizes, memory]
        print("| " + " | ".join(cells) + " |")
    firsts = [found[name].get("first_token_ms") for name in ("dense", "salr")]
    if all(firsts):
        print(f"first token: dense {firsts[0]:.1f} ms, salr {firsts[1]:.1f} ms, {firsts[0] / firsts[1]:.2f}x")
    dense_bytes, packed_bytes = (found[name].get("weight_bytes", 0) for name in ("dense", "salr"))
    if dense_bytes and packed_bytes:
        print(f"bytes a step reads without the cache: {dense_bytes / packed_bytes:.2f}x fewer")
    print(f"copy bandwidth {bytes_per_second / 1e12:.2f} TB/s; operations: {found['dense'].get('operations')}")


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=numbers, default=[1, 8, 32])
    parser.add_argument("--contexts", type=numbers, default=[128, 4096])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens, for the time to the first one")
    parser.add_argument("--values", default="bf16", help="bf16, int8 or nf4")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--load-layers", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small shape, to try the script out")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    """Print the table and write the JSON."""
    options = parsed()
    device = options.device = torch.empty(0, device=options.device).device
    sizes = Sizes(layers=options.layers)
    if options.tiny:
        sizes = Sizes(512, options.layers, 8, 4, 64, 768, 1000)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {sizes.layers} layers, values {options.values}, rank {RANK}")
    speed = bandwidth(device)
    with torch.no_grad():
        found = {side: measure(side, sizes, options) for side in ("dense", "salr")}
    show(found, speed)
    report: dict[str, Any] = {
        "device": name,
        "torch": torch.__version__,
        "sizes": asdict(sizes),
        "copy_bandwidth": speed,
    }
    report["sides"] = {side: {**facts, "rows": [asdict(r) for r in facts["rows"]]} for side, facts in found.items()}
    if options.load_layers:
        report["load_seconds"] = load_seconds(options.load_layers, options.device)
        print("load:", ", ".join(f"{side} {seconds:.2f} s" for side, seconds in report["load_seconds"].items()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
