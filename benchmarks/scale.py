"""Does memory stay flat and time per gigabyte constant however large the checkpoint is, and do two workers pay?

    python benchmarks/scale.py [--sizes 10,20,40] [--width 4096] [--folder DIR] [--json FILE]

Makes sharded checkpoints of random bf16 weights (blocks of seven linears in Llama's proportions, an embedding and a
head), converts each with `--method magnitude --rank 16` in a process of its own, and removes it. Prints seconds for
each GB of input (of the clock and of the processors) and the peak of RssAnon + RssShmem summed over the process and its
children, sampled every 20 ms; the smallest size is converted with one worker too. Needs about 1.7 times the largest
size on the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from layer_times import processor
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]

SHARD_BYTES = 10**9
VOCABULARY = 32_000
LIMIT_GB, SPREAD, SPEEDUP = 3.0, 0.15, 1.6


def make_checkpoint(folder: Path, n_bytes: int, width: int) -> int:
    """Write a sharded checkpoint of about ``n_bytes`` and return its size in bytes."""
    folder.mkdir()
    inner = width * 7 // 2
    shapes = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    generator = torch.Generator().manual_seed(0)
    random = {shape: torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for shape in set(shapes.values())}
    dense = torch.randn(VOCABULARY, width, generator=generator).mul_(0.02).bfloat16()
    block_bytes = 2 * sum(rows * columns for rows, columns in shapes.values())
    n_blocks = max(1, (n_bytes - 4 * dense.numel()) // block_bytes)
    writer = _ShardWriter(folder)
    writer.add("model.embed_tokens.weight", dense)
    for block in range(n_blocks):
        for name, shape in shapes.items():
            writer.add(f"model.layers.{block}.{name}.weight", random[shape].roll(block + 1, 0))
    writer.add("lm_head.weight", dense.roll(1, 0))
    writer.close()
    (folder / "config.json").write_text("{}")
    return writer.n_bytes


class _ShardWriter:
    """Collects tensors and writes them to files of about a gigabyte."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._held, self._map, self.n_bytes = folder, {}, {}, 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._held[name] = tensor
        self.n_bytes += 2 * tensor.numel()
        if sum(2 * held.numel() for held in self._held.values()) >= SHARD_BYTES:
            self._flush()

    def _flush(self) -> None:
        name = f"model-{len(set(self._map.values())) + 1:05d}.safetensors"
        save_file(self._held, self._folder / name, {"format": "pt"})
        self._map |= dict.fromkeys(self._held, name)
        self._held = {}

    def close(self) -> None:
        if self._held:
            self._flush()
        index = {"metadata": {"total_size": self.n_bytes}, "weight_map": self._map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index))


def convert(source: Path, out: Path, workers: int) -> tuple[float, float, int]:
    """Convert in a child process; return its own seconds, its processor seconds, and the peak of its unshared bytes."""
    options = ("--method", "magnitude", "--rank", "16", "--workers", str(workers), "--json")
    command = [sys.executable, str(ROOT / "cli.py"), "convert", str(source), str(out), *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT)
    peak = 0
    while child.poll() is None:
        peak = max(peak, sum(_own_memory(pid) for pid in _family(child.pid)))
        time.sleep(0.02)
    assert child.stdout is not None
    if child.returncode:
        raise SystemExit(f"the conversion of {source} failed")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return json.loads(child.stdout.read())["seconds"], used.ru_utime + used.ru_stime, peak


def _family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in task.read_text().split()]
            except OSError:
                continue
    return found


def _own_memory(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def measure(folder: Path, size_gb: float, width: int, workers: list[int]) -> list[dict[str, float]]:
    """Make one checkpoint, convert it with each number of workers, and remove both."""
    source, out, rows = folder / "source", folder / "out.salr", []
    n_bytes = make_checkpoint(source, int(size_gb * 1e9), width)
    for count in workers:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, used, peak = convert(source, out, count)
        rows.append(
            {
                "input_gb": n_bytes / 1e9,
                "output_gb": out.stat().st_size / 1e9,
                "workers": count,
                "seconds": seconds,
                "seconds_per_gb": seconds / (n_bytes / 1e9),
                "cpu_seconds_per_gb": (used - before.ru_utime - before.ru_stime) / (n_bytes / 1e9),
                "peak_gb": peak / 1e9,
            }
        )
        print("  ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()), flush=True)
        out.unlink()
    shutil.rmtree(source)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="10,20,40", help="GB, smallest first")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (a temporary directory)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes = [float(size) for size in args.sizes.split(",")]
    machine = f"{processor()}, {os.cpu_count()} cores, torch {version('torch')}, Python {platform.python_version()}"
    print(machine)
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for index, size in enumerate(sizes):
            rows += measure(Path(folder), size, args.width, [2] if index else [1, 2])
    one, two = rows[0], rows[1:]
    rates = [row["seconds_per_gb"] for row in two]
    spread, speedup = max(rates) / min(rates) - 1, one["seconds"] / two[0]["seconds"]
    peak = max(row["peak_gb"] for row in rows)
    print(f"peak memory {peak:.2f} GB (asked: under {LIMIT_GB})")
    print(f"seconds per GB differ by {100 * spread:.1f} % (asked: under {100 * SPREAD:.0f} %)")
    print(f"two workers {speedup:.2f} times as fast as one (asked: {SPEEDUP})")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "width": args.width, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
