"""How fast is the converter, how exact is its SVD, and how much memory does it take?

    python benchmarks/convert.py [--model DIR] [--json FILE] [--skip-svd]

Prints seconds for one 4096x14336 layer (mask, residual at rank 64, packing) against `torch.linalg.svd`, the share of
the exact rank-64 energy that was captured, the peak resident memory of a child process that converts such a layer, and
the whole-model time for a Hugging Face directory with the paper's method.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

N_ROWS, N_COLUMNS, RANK = 4096, 14336, 64
CHILD = "--convert-child"


def layer_weight(kind: str) -> torch.Tensor:
    """Return a (4096, 14336) float32 weight: 'gauss' has the flattest spectrum, 'decaying' one like trained layers."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N_ROWS, N_COLUMNS, generator=generator) * 0.02
    if kind == "decaying":
        scale = torch.arange(1, 257, dtype=torch.float32).pow(-0.5)
        left = torch.randn(N_ROWS, 256, generator=generator) * scale
        weight += 0.01 * left @ torch.randn(256, N_COLUMNS, generator=generator)
    return weight


def time_layer(kind: str, with_svd: bool) -> dict[str, float | str | None]:
    """Time mask + residual on one thread, and torch's full SVD of the same residual on all."""
    from salr.converter.methods.lowrank import truncated_svd
    from salr.converter.methods.prune import Groups, keep_in_groups

    weight = layer_weight(kind)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    mask = keep_in_groups(weight.abs(), weight.numel() // 2, Groups("layer"))
    masked = time.perf_counter()
    residual = weight.masked_fill(mask, 0)
    lora_b, lora_a = truncated_svd(residual, RANK)
    finished = time.perf_counter()
    torch.set_num_threads(n_threads)
    captured = float(residual.double().square().sum() - (residual - lora_b @ lora_a).double().square().sum())
    row: dict[str, float | str | None] = {
        "layer": kind,
        "mask_s": masked - started,
        "svd_s": finished - masked,
        "torch_svd_s": None,
        "speedup": None,
        "energy": None,
    }
    if with_svd:
        started = time.perf_counter()
        exact = torch.linalg.svd(residual, full_matrices=False).S
        row["torch_svd_s"] = time.perf_counter() - started
        row["speedup"] = row["torch_svd_s"] / (finished - masked)
        row["energy"] = captured / float(exact[:RANK].double().square().sum())
    return row


def convert_child(folder: str, workers: str, method: str) -> None:
    """Convert the checkpoint in ``folder`` and print the peak resident memory in bytes (run as a child process)."""
    import salr

    salr.convert(folder, Path(folder) / "out.salr", salr.ConvertOptions(method=method, rounds=2, workers=int(workers)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure_memory(method: str, workers: int) -> dict[str, float | str]:
    """Convert ``workers`` such layers in a child process and return its peak memory against the allowance."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        weights = {f"blocks.{i}.up.weight": layer_weight("gauss").bfloat16() for i in range(workers + 1)}
        save_file(weights, Path(folder) / "model.safetensors")
        del weights
        (Path(folder) / "config.json").write_text("{}")
        command = [sys.executable, __file__, CHILD, folder, str(workers), method]
        child = subprocess.run(command, check=True, capture_output=True, text=True)
    return {
        "method": method,
        "workers": workers,
        "peak_gb": int(child.stdout.split()[-1]) / 1e9,
        "allowed_gb": (1e9 + 6 * workers * N_ROWS * N_COLUMNS * 4) / 1e9,
    }


def time_model(model: Path, workers: int) -> dict[str, float]:
    """Convert a whole model with the paper's method; imports are warm, as in a long-lived process."""
    import salr

    with tempfile.TemporaryDirectory() as folder:
        report = salr.convert(
            model, Path(folder) / "out.salr", salr.ConvertOptions(method="magnitude", workers=workers)
        )
    return {"workers": workers, "seconds": report.seconds, "file_mb": report.sizes.file_bytes / 1e6}


def main() -> None:
    """Run from the command line."""
    if CHILD in sys.argv:
        return convert_child(*sys.argv[2:5])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-svd", action="store_true", help="leave torch.linalg.svd out (minutes)")
    args = parser.parse_args()
    result: dict[str, object] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
    }
    print(f"{result['machine']}, torch {result['torch']}")
    result["layers"] = layers = [time_layer(kind, not args.skip_svd) for kind in ("gauss", "decaying")]
    print("4096x14336 fp32, rank 64, ours on one thread      mask s  svd s  torch svd s  ratio  energy of exact")
    for row in layers:
        print("  ", *(f"{v:.4g}" if isinstance(v, float) else v for v in row.values()), sep="  ")
    result["memory"] = memory = [measure_memory(m, workers) for m in ("magnitude", "alternating") for workers in (1, 2)]
    print("peak resident memory, the layer in bf16           method  workers  GB  allowed GB")
    for row in memory:
        print("  ", *(f"{v:.3g}" if isinstance(v, float) else v for v in row.values()), sep="  ")
    if args.model:
        result["model"] = models = [time_model(args.model, workers) for workers in (1, 2)]
        print(f"{args.model.name}, magnitude, rank 64          workers  seconds  MB")
        for row in models:
            print("  ", *(f"{v:.4g}" for v in row.values()), sep="  ")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    return None


if __name__ == "__main__":
    main()
