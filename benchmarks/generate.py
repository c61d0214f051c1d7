"""How fast does a whole packed model write, and what memory does it take, against dense bf16 and fp32?

    python benchmarks/generate.py                          # the shape of Llama-3.2-1B, random weights, batch 1
    python benchmarks/generate.py --file FILE.salr --dense DIR     # a real model and where its time goes

Each variant runs in a process of its own (same machine, same tokens, same steps), in turn, ``--rounds`` times; the best
median counts, because other load only ever slows down. Memory is counted twice: what loading and running added to a
process that had imported salr, torch and the model class (anonymous memory and mapped pages of the file apart), and all
resident memory beyond a process that had only imported salr, with what importing torch and transformers took of it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    import numpy as np

SHAPE = {
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 4096,
    "tie_word_embeddings": True, "rope_theta": 500000.0, "architectures": ["LlamaForCausalLM"], "model_type": "llama",
    "dtype": "bfloat16",
}  # fmt: skip
RANK = 64


def write_random(path: Path, shape: dict[str, Any]) -> None:
    """Write a .salr file of random kept weights at 50 %, rank 64: speed depends on the shape only."""
    import numpy as np
    from salr.formats.container import TensorSpec
    from salr.formats.dtypes import from_float32
    from salr.formats.manifest import AdapterEntry, Manifest, ModuleEntry
    from salr.formats.writer import SalrWriter

    rng = np.random.default_rng(0)
    specs, pieces, modules = [], {}, {}
    noise = from_float32((rng.standard_normal(1 << 22) * 0.02).astype(np.float32), "BF16")

    def dense(name: str, *extents: int) -> None:
        specs.append(TensorSpec(name, "BF16", extents))
        pieces[name] = lambda: np.resize(noise, extents)

    adapter = AdapterEntry("residual", RANK, 1.0, "random")
    for name, (n_rows, n_columns) in matrices(shape).items():
        nnz = n_rows * n_columns // 2
        entry = ModuleEntry(
            f"{name}.weight", (n_rows, n_columns), False, (n_rows, n_columns), "BF16", nnz, "unstructured", "bf16",
            "refit", adapters=(adapter,),
        )  # fmt: skip
        modules[name] = entry
        specs += [
            TensorSpec(f"{name}.values", "BF16", (nnz + 32,)),
            TensorSpec(f"{name}.bitmap", "U8", (n_rows, n_columns // 8)),
            TensorSpec(f"{name}.row_offsets", "U64", (n_rows + 1,)),
        ]
        dense(f"{name}.lora_A.residual", RANK, n_columns)
        dense(f"{name}.lora_B.residual", n_rows, RANK)
    for name, extents in kept(shape).items():
        dense(name, *extents)
    specs.append(TensorSpec("assets/config.json", "U8", (len(json.dumps(shape)),)))
    with SalrWriter(path, specs, force=True, fresh=True) as writer:
        writer.write_pieces("assets/config.json", [json.dumps(shape).encode()])
        for name, make in pieces.items():
            writer.write(name, make())
        for name, entry in modules.items():
            write_mask(writer, name, entry, noise, rng)
        writer.finish(Manifest("benchmarks/generate.py", modules, {}))


def write_mask(writer: Any, name: str, entry: Any, noise: np.ndarray, rng: np.random.Generator) -> None:
    """Write half of each row, at random places, and values for them."""
    import numpy as np
    from salr.formats.bitmap import pack_bitmap, row_offsets
    from salr.formats.values import pad_values

    n_rows, n_columns = entry.shape
    keep = rng.permuted(np.resize([True, False], (64, n_columns)), axis=1)[rng.integers(0, 64, n_rows)]
    bitmap = pack_bitmap(keep)
    writer.write(f"{name}.bitmap", bitmap)
    writer.write(f"{name}.row_offsets", row_offsets(bitmap))
    writer.write(f"{name}.values", pad_values(np.resize(noise, entry.nnz), "bf16", entry.nnz))


def matrices(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the linear layers of the blocks with (N, K)."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = shape["num_key_value_heads"] * shape["head_dim"]
    block = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    return {f"model.layers.{i}.{n}": s for i in range(shape["num_hidden_layers"]) for n, s in block.items()}


def kept(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that stay dense."""
    hidden = shape["hidden_size"]
    norms = ("input_layernorm", "post_attention_layernorm")
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape["vocab_size"], hidden)}
    found |= {f"model.layers.{i}.{n}.weight": (hidden,) for i in range(shape["num_hidden_layers"]) for n in norms}
    return found | {"model.norm.weight": (hidden,)}


# --- one variant, in a process of its own -----------------------------------------------------------------------------


def run_variant(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load one variant, measure it, and return the figures."""
    import salr

    resident_bytes = {"salr": all_resident()}
    import torch

    resident_bytes["torch"] = all_resident()
    import transformers

    from salr.runtime.benchmark import BenchOptions, measure

    torch.set_num_threads(arguments.threads)
    assert transformers.LlamaForCausalLM and salr.load  # what every variant needs is imported before memory is noted
    resident_bytes["transformers"] = all_resident()
    before = resident(arguments.file)
    start = time.perf_counter()
    model = load_variant(variant, arguments)
    options = BenchOptions((1,), arguments.prompt_tokens, arguments.new_tokens, 1)
    load_seconds, start = time.perf_counter() - start, time.perf_counter()
    measure(model, 1, replace(options, new_tokens=1))
    first_seconds, after = time.perf_counter() - start, resident(arguments.file)
    resident_bytes["run"] = all_resident()
    speed = measure(model, 1, options)
    found = {"variant": variant, "load_seconds": load_seconds, "first_call_seconds": first_seconds} | asdict(speed)
    found |= {f"{kind}_bytes": after[kind] - before[kind] for kind in after} | {"resident_bytes": resident_bytes}
    return found | (breakdown(model, arguments.new_tokens) if variant == "packed" or arguments.dense else {})


def load_variant(variant: str, arguments: argparse.Namespace) -> Any:
    """Return the model; the dense ones take the file's shape, their weights from a directory or at random."""
    import torch
    import transformers

    import salr

    if variant == "packed":
        return salr.load(arguments.file)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[variant]
    if arguments.dense:
        return transformers.AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=dtype)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).to(dtype)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
        rotary = model.model.rotary_emb
        rotary.inv_freq = 1 / SHAPE["rope_theta"] ** (torch.arange(0, SHAPE["head_dim"], 2) / SHAPE["head_dim"])
    return model


def all_resident() -> int:
    """Return all memory of this process that is in RAM, libraries' code and mapped files included, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def resident(path: Path) -> dict[str, int]:
    """Return this process's anonymous memory, and the resident pages of the file's map, in bytes."""
    status = Path("/proc/self/status").read_text()
    anonymous = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))
    mapped, inside = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if "-" in line.split(" ", 1)[0]:
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            mapped += int(line.split()[1]) * 1024
    return {"anonymous": anonymous, "mapped": mapped}


def breakdown(model: Any, n_steps: int) -> dict[str, float]:
    """Return milliseconds a token in all linear layers of the blocks, and in calling them without computing."""
    import torch

    from salr.runtime.backends import Backend
    from salr.runtime.packed_module import PackedModule

    layers = [m for n, m in model.named_modules() if ".layers." in n and isinstance(m, (torch.nn.Linear, PackedModule))]
    inputs = [torch.randn(1, 1, layer.in_features).to(model.dtype) for layer in layers]

    def call_all() -> None:
        for layer, x in zip(layers, inputs, strict=True):
            layer(x)

    with torch.inference_mode():
        found = {"linear_ms": 1e3 * median_time(call_all, n_steps), "n_linear": len(layers)}
        if isinstance(layers[0], PackedModule):
            outputs = {layer.out_features: torch.zeros(1, layer.out_features, dtype=model.dtype) for layer in layers}
            actual, Backend.product = Backend.product, lambda self, weight, *rest: lambda x: outputs[weight.n_rows]
            for layer in layers:
                layer._derived = None
            found["call_ms"] = 1e3 * median_time(call_all, n_steps)
            Backend.product = actual
    return found


def median_time(call: Callable[[], None], n_times: int) -> float:
    """Return the median seconds of a call."""
    seconds = []
    for _ in range(n_times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


# --- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run every variant in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a .salr file; made at random in a temporary directory without")
    parser.add_argument("--dense", type=Path, help="the dense model of --file")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--variants", default="packed,bf16,fp32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.variant:
        print(json.dumps(run_variant(arguments.variant, arguments)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.file is None:
            arguments.file = Path(folder) / "llama-1b-shape.salr"
            write_random(arguments.file, SHAPE)
        found = [run_child(v, arguments) for _ in range(arguments.rounds) for v in arguments.variants.split(",")]
        show(found, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def run_child(variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one variant in a new process."""
    command = [sys.executable, __file__, "--variant", variant, "--file", str(arguments.file)]
    for name in ("threads", "prompt_tokens", "new_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += ["--dense", str(arguments.dense)] if arguments.dense else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"load_average": os.getloadavg()[0]}


def show(found: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print each variant's best round."""
    import torch
    import transformers

    file_bytes = arguments.file.stat().st_size
    print(f"{arguments.file.name}: {file_bytes / 1e6:.0f} MB; batch 1, {arguments.threads} threads, torch "
          f"{torch.__version__}, transformers {transformers.__version__}, {arguments.rounds} rounds")  # fmt: skip
    print("variant   tokens/s  ms/token  in linears  calls only  anonymous  mapped file  first call  load average")
    variants = arguments.variants.split(",")
    bests = [max((f for f in found if f["variant"] == v), key=lambda f: f["tokens_per_second"]) for v in variants]
    for best in bests:
        linear, call = (f"{best[key]:.2f} ms" if key in best else "" for key in ("linear_ms", "call_ms"))
        print(
            f"{best['variant']:8}{best['tokens_per_second']:10.2f}{1e3 / best['tokens_per_second']:10.1f}"
            f"{linear:>12}{call:>12}"
            f"{best['anonymous_bytes'] / 1e6:8.0f} MB{best['mapped_bytes'] / 1e6:10.0f} MB"
            f"{best['first_call_seconds']:10.1f} s{best['load_average']:12.1f}"
        )
    print("MB resident beyond a process that only imported salr:")
    for best in bests:
        size = best["resident_bytes"]
        torch_mb, both_mb, run_mb = ((size[key] - size["salr"]) / 1e6 for key in ("torch", "transformers", "run"))
        print(f"{best['variant']:8}{run_mb:8.0f}, of which import torch {torch_mb:.0f}, transformers "
              f"{both_mb - torch_mb:.0f}, load and run {run_mb - both_mb:.0f}")  # fmt: skip


if __name__ == "__main__":
    main()
