"""Where does the time go in a large model? A checkpoint of Llama-3-8B's shape with random weights, for quality.py.

The clock waits for the GPU at both ends of a phase, so a run under it is a little slower than the row beside it;
phases of several threads add up, so their sum may exceed the run.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from salr.converter import pipeline
from salr.converter.calibration import sequential
from salr.converter.execution import packing
from salr.converter.options import CalibrationOptions
from salr.converter.sources import checkpoint as sources
from salr.formats import output_file

PHASES = {
    "forward passes and Gram matrices": (sequential._BlockPacker, "_statistics"),
    "method": (packing, "solve"),
    "errors as stored": (packing, "_measured"),
    "layout": (packing.ModulePieces, "of"),
    "write": (output_file.DataFile, "write"),
    "unchanged tensors": (pipeline, "_copy_unchanged"),
    "read": (sources.Checkpoint, "read"),
    "hash the source": (pipeline, "sha256"),
    "make durable": (output_file.DataFile, "finish"),
}


def write_llama8b(folder: Path, n_blocks: int) -> Path:
    """Write a checkpoint of Llama-3-8B's shape with random bf16 weights, a shard a block."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=n_blocks, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
        architectures=["LlamaForCausalLM"], tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
              "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
              "mlp.down_proj": (4096, 14336)}  # fmt: skip
    weight_map = {}
    for number in range(-1, n_blocks):
        prefix = f"model.layers.{number}"
        if number < 0:
            named = {"model.embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096)}
            tensors = {"model.norm.weight": torch.ones(4096, dtype=torch.bfloat16)}
        else:
            named = {f"{prefix}.{name}.weight": shape for name, shape in shapes.items()}
            norms = ("input_layernorm", "post_attention_layernorm")
            tensors = {f"{prefix}.{name}.weight": torch.ones(4096, dtype=torch.bfloat16) for name in norms}
        for name, shape in named.items():
            tensors[name] = (torch.randn(shape, device=device) * 0.02).bfloat16().cpu()
        file = f"model-{number + 2:05}-of-{n_blocks + 1:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def measure_time(bench: Any) -> None:
    """Seconds for Llama-3-8B's shape; random tokens stand for text, which takes the same time."""
    n_blocks = bench.args.blocks
    with tempfile.TemporaryDirectory() as folder:
        source = bench.args.large or Path(folder)
        if not (source / "model.safetensors.index.json").is_file():
            source.mkdir(exist_ok=True)
            write_llama8b(source, n_blocks)
            print(f"# wrote {n_blocks} blocks of Llama-3-8B's shape", flush=True)
        for name, options in (
            ("data-free default", {}),
            ("weights alone", {"calibration": CalibrationOptions("none")}),
            ("joint, 64 windows", {"method": "joint", "calibration": CalibrationOptions("synthetic", 64)}),
        ):

            def measure(options: dict[str, Any] = options) -> dict[str, Any]:
                return bench.convert(source, **options)[1]

            def measure_phases(options: dict[str, Any] = options) -> dict[str, Any]:
                with clock(PHASES) as seconds:
                    facts = bench.convert(source, **options)[1]
                return {**facts, "phases_s": {phase: round(spent, 1) for phase, spent in seconds.items()}}

            bench.row("time", f"8B shape, {n_blocks} blocks: {name}", measure)
            bench.row("phases", f"8B shape, {n_blocks} blocks: {name}, under a clock", measure_phases)


@contextmanager
def clock(phases: dict[str, tuple[Any, str]]) -> Iterator[dict[str, float]]:
    """Yield seconds by phase, filled while functions named by ``phases`` run."""
    seconds: dict[str, float] = defaultdict(float)
    lock = threading.Lock()

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait_for_gpu()
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                wait_for_gpu()
                with lock:
                    seconds[phase] += time.perf_counter() - started

        return call

    patches = [
        mock.patch.object(owner, name, timed(phase, getattr(owner, name))) for phase, (owner, name) in phases.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield seconds
    finally:
        for patch in patches:
            patch.stop()


def wait_for_gpu() -> None:
    """Wait for everything queued on the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
