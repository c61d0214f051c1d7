"""Peak memory and time of training steps at a large shape, each side in a process of its own.

Invariant: all sides run transformers' own model and loss in bf16 with gradient checkpointing, LoRA of rank 16 in bf16
on all linear layers, and AdamW; they differ in the base, and in whether the residual trains too.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from random_model import Sizes, peak, reset_peak, synchronize

import salr

from .random_llama import random_llama
from .report import table

SHAPES = {"llama-3-8b": Sizes(), "small": Sizes(256, 2, 4, 2, 64, 512, 1000)}
LENGTH = 1024
_turn: Any = contextlib.nullcontext()
WARM_UP = 3
#: side -> (kind of base, whether its residual trains)
SIDES = {
    "dense bf16 + LoRA": ("dense", False),
    "SALR, residual frozen": ("salr", False),
    "SALR, residual trained": ("salr", True),
    "nf4 + LoRA (QLoRA, our kernels)": ("nf4", False),
}
HEAD = (
    "side",
    "tokens a step",
    "trained",
    "between steps GB",
    "peak GB",
    "x dense",
    "step ms",
    "fastest",
    "slowest",
    "x dense",
    "captured ms",
    "x dense",
)


def prepared(kind: str, train_residual: bool, sizes: Sizes, device: torch.device) -> Any:
    """Return the model with adapters, ready to be trained with checkpointing."""
    torch.manual_seed(0)
    model = random_llama(kind, sizes, device)
    if kind == "dense":
        import peft

        config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        tuned = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    else:
        tuned = salr.prepare_for_training(
            model, rank=16, alpha=32, train_residual=train_residual, autocast_adapter_dtype=False
        )
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
    )
    model.config.use_cache = False
    return tuned.train()


def measure(side: str, sizes: Sizes, tokens: list[int], steps: int, device_name: str) -> list[dict[str, Any]]:
    """Build one side and return a row for each number of tokens a step."""
    device = torch.empty(0, device=device_name).device
    start = time.perf_counter()
    model = prepared(*SIDES[side], sizes, device)
    synchronize(device)
    build_s = time.perf_counter() - start
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.0, fused=on_gpu, capturable=on_gpu)
    # a graph is captured on another stream than the default one, and gradients stay on the stream of their first step
    with _turn, torch.cuda.stream(torch.cuda.Stream()) if on_gpu else contextlib.nullcontext():
        rows = measured_steps(side, model, optimizer, sizes, tokens, steps, device)
        del model, optimizer, trained
        reset_peak(device)
    return [{**row, "build_s": round(build_s, 1)} for row in rows]


def measured_steps(
    side: str, model: Any, optimizer: Any, sizes: Sizes, tokens: list[int], steps: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return a row for each number of tokens a step; steps as CUDA graphs come last, lest a failure disturbs others."""
    trained, rows = optimizer.param_groups[0]["params"], []
    batches = [torch.randint(sizes.words, (max(1, n // LENGTH), min(n, LENGTH)), device=device) for n in tokens]
    for count, ids in zip(tokens, batches, strict=True):
        facts: dict[str, Any] = {"side": side, "tokens": count, "trained": sum(p.numel() for p in trained),
                                 "dtype": str(trained[0].dtype)}  # fmt: skip
        try:
            facts |= timed_steps(model, optimizer, ids, steps)
        except torch.OutOfMemoryError:
            optimizer.zero_grad()
            facts |= {"peak_bytes": None, "step_ms": None, "reason": "out of memory"}
        rows.append(facts)
    for row, ids in zip(rows, batches, strict=True):
        if device.type == "cuda" and row["step_ms"] is not None:
            row |= captured_ms(model, optimizer, ids, steps)
            if row["captured_ms"] is None:
                break
    return rows


def timed_steps(model: Any, optimizer: Any, ids: torch.Tensor, steps: int) -> dict[str, Any]:
    """Return the peak of 3 steps and the times of those that follow."""
    device = ids.device
    reset_peak(device)
    losses, times = [], []
    highest = resident = None
    for number in range(WARM_UP + steps):
        synchronize(device)
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
        losses.append(float(loss.detach()))
        if number == WARM_UP - 1:
            highest = peak(device)
            resident = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
    kept = times[WARM_UP:]
    return {
        "first_loss": losses[0], "last_loss": losses[-1],
        "peak_bytes": highest, "resident_bytes": resident,
        "step_ms": statistics.median(kept), "fastest_ms": min(kept), "slowest_ms": max(kept),
    }  # fmt: skip


def captured_ms(model: Any, optimizer: Any, ids: torch.Tensor, steps: int) -> dict[str, Any]:
    """Return the median time of a step that is replayed as one CUDA graph, so that the host does not bound it."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    except Exception as error:
        torch.cuda.synchronize()
        return {"captured_ms": None, "not_captured": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    times = []
    for _ in range(1 + steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return {"captured_ms": statistics.median(times[1:])}


def run(shape: str, layers: int | None, tokens: list[int], steps: int, device: str, out: Path | None) -> None:
    """Measure the sides that ``out`` does not hold yet, each in a new process, and print the table."""
    sizes = SHAPES[shape]
    if layers is not None:
        sizes = Sizes(**{**sizes.__dict__, "layers": layers})
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out and out.is_file() else []
    environment = {"shape": shape, "layers": sizes.layers, "device": name_of(device), "torch": torch.__version__}
    missing = {}
    for side in SIDES:
        known = {row["tokens"] for row in rows if row["side"] == side and row["shape"] == shape}
        missing[side] = [count for count in tokens if count not in known]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(SIDES), spawn, take_turns, (spawn.Lock(),)) as pool:
        running = [pool.submit(measure, side, sizes, left, steps, device) for side, left in missing.items() if left]
        for future in as_completed(running):
            new = [{**environment, **row} for row in future.result()]
            rows += new
            lines = "".join(json.dumps(row) + "\n" for row in new)
            print(lines, end="", flush=True)
            if out:
                with out.open("a") as file:
                    file.write(lines)
    print_cost(rows)


def take_turns(lock: Any) -> None:
    """Let this process know who may take steps: models are built side by side, steps are timed one side at a time."""
    global _turn
    _turn = lock


def name_of(device: str) -> str:
    """Return the device's name for the results."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"


def print_cost(rows: list[dict[str, Any]]) -> None:
    """Print the table in Markdown, with ratios to dense at the same number of tokens."""
    dense = {row["tokens"]: row for row in rows if row["side"] == next(iter(SIDES))}
    lines = []
    for row in sorted(rows, key=lambda row: (row["tokens"], list(SIDES).index(row["side"]))):
        base = dense.get(row["tokens"], {})
        if row["step_ms"] is None:
            lines.append([row["side"], str(row["tokens"]), f"{row['trained'] / 1e6:.0f}M", row["reason"]] + ["-"] * 8)
            continue
        lines.append([
            row["side"], str(row["tokens"]), f"{row['trained'] / 1e6:.1f}M", gigabytes(row["resident_bytes"]),
            gigabytes(row["peak_bytes"]), ratio(row, base, "peak_bytes"), f"{row['step_ms']:.1f}",
            f"{row['fastest_ms']:.1f}", f"{row['slowest_ms']:.1f}", ratio(row, base, "step_ms"),
            f"{row['captured_ms']:.1f}" if row.get("captured_ms") else "-", ratio(row, base, "captured_ms"),
        ])  # fmt: skip
    print("\n" + table(HEAD, lines))


def gigabytes(count: int | None) -> str:
    """Return bytes in GB."""
    return "no GPU" if count is None else f"{count / 1e9:.2f}"


def ratio(row: dict[str, Any], base: dict[str, Any], key: str) -> str:
    """Return a figure over dense's."""
    return f"{row[key] / base[key]:.3f}" if row.get(key) and base.get(key) else "-"
