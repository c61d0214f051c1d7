"""What does each method cost in quality?

    python benchmarks/quality.py MODEL --data DIR [--device cuda] [--parts methods,bytes,lora,time]
                                 [--json FILE] [--plot FILE]

Everything is made by `salr.convert` and judged from the finished .salr file: values and factors as stored.
DIR holds wt2_test.txt, wt2_valid.txt (WikiText-2), gsm8k_train.jsonl and gsm8k_test.jsonl.

methods  perplexity of every method at 50 % sparsity and rank 64, and of 2:4, 60 % and 70 %; on WikiText-2 test (all
         windows of 1024), on GSM8K text and on Python source (60 windows each)
bytes    perplexity over bits per packed weight, adapters counted: rank 0, 16 and 64, pruning alone, the budget solver
lora     a LoRA trained on the dense model (GSM8K), then converted without further training: answer NLL and perplexity
time     seconds for a checkpoint of Llama-3-8B's shape with random weights (--blocks of 32)
A row that is in FILE already is not measured again.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from large_shape import measure_time
from salr.converter.module_options import ModuleOptions
from salr.converter.options import CalibrationOptions, ConvertOptions

import salr
from salr.evaluation.models import load_model
from salr.evaluation.protocol import EvalOptions, plan_windows
from salr.evaluation.scoring import score

WINDOWS_OF_OTHER_TEXTS = 60
HIGHEST_PLOTTED = 50
STDLIB = ("argparse", "ast", "asyncio.base_events", "calendar", "codecs", "collections", "configparser", "csv",
          "datetime", "decimal", "difflib", "doctest", "email.message", "enum", "fractions", "ftplib", "functools",
          "http.client", "http.server", "inspect", "ipaddress", "json.decoder", "locale", "mailbox", "optparse", "os",
          "pathlib", "pdb", "pickle", "pickletools", "plistlib", "pydoc", "random", "shutil", "smtplib", "socket",
          "statistics", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "tokenize", "traceback", "turtle",
          "typing", "unittest.mock", "urllib.parse", "urllib.request", "uuid", "zipfile")  # fmt: skip


class Bench:
    """Measures rows, prints them, and keeps them in a JSON file so that a run can be continued."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.rows: list[dict[str, Any]] = []
        if args.json and args.json.is_file():
            self.rows = json.loads(args.json.read_text())["rows"]
        self.folder = Path(tempfile.mkdtemp())
        self._texts: dict[str, tuple[torch.Tensor, list[Any]]] = {}

    def row(self, part: str, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure a row unless it is known, print it, and save all rows."""
        known = [row for row in self.rows if (row["part"], row["name"]) == (part, name)]
        if known or not re.search(self.args.only, name):
            return known[0] if known else {}
        started = time.perf_counter()
        row = {"part": part, "name": name, **measure(), "row_s": round(time.perf_counter() - started, 1)}
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.args.json:
            environment = {
                "device": device_name(self.device),
                "torch": torch.__version__,
                "python": sys.version.split()[0],
            }
            self.args.json.write_text(json.dumps({"environment": environment, "rows": self.rows}, indent=1))
        return row

    def texts(self, tokenizer: Any) -> dict[str, tuple[torch.Tensor, list[Any]]]:
        """Return token ids and windows of the three texts."""
        if not self._texts:
            data = self.args.data
            questions = [json.loads(line) for line in (data / "gsm8k_test.jsonl").read_text().splitlines()]
            contents = {
                "wikitext2": (data / "wt2_test.txt").read_text(),
                "gsm8k": "\n\n".join(f"{q['question']}\n{q['answer']}" for q in questions),
                "python": "\n\n".join(stdlib_sources()),
            }
            for name, content in contents.items():
                ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"])
                most = self.args.windows or (None if name == "wikitext2" else WINDOWS_OF_OTHER_TEXTS)
                self._texts[name] = ids, plan_windows(len(ids), EvalOptions(max_windows=most))
        return self._texts

    def perplexities(self, path: Path) -> dict[str, float]:
        """Return the perplexity of a model on each text."""
        model, tokenizer = load_model(path, self.device, torch.float32)
        found = {}
        for name, (ids, windows) in self.texts(tokenizer).items():
            scores = score(model, ids, windows, self.device, None, lambda: None)
            found[name] = float(torch.tensor(scores.nll / scores.n_scored, dtype=torch.float64).exp())
        del model
        gc.collect()
        return found

    def convert(self, source: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
        """Convert, and return the file with its time, size and peak GPU memory."""
        out = self.folder / "model.salr"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        report = salr.convert(source, out, ConvertOptions(device=self.args.device, force=True, **options))
        bits = 8 * report.sizes.packed_bytes / report.sizes.packed_weights
        facts = {"convert_s": round(report.seconds, 1), "s_per_layer": round(report.seconds / report.n_modules, 3),
                 "bits": round(bits, 3), "file_mb": round(report.sizes.file_bytes / 1e6, 1)}  # fmt: skip
        if self.device.type == "cuda":
            facts["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return out, facts

    def variant(self, part: str, name: str, **options: Any) -> dict[str, Any]:
        """Convert the model one way and judge it."""

        def measure() -> dict[str, Any]:
            out, facts = self.convert(self.args.model, **options)
            return {**facts, **self.perplexities(out)}

        return self.row(part, name, measure)

    def test_examples(self, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
        """Return GSM8K's test answers; a few only for a quick look."""
        return answer_examples(self.args.data / "gsm8k_test.jsonl", tokenizer)[: self.args.windows]

    def text(self, name: str = "wt2_valid.txt") -> CalibrationOptions:
        """Return calibration on one of the texts: 64 windows of 1024 tokens, seed 0."""
        return CalibrationOptions(str(self.args.data / name), samples=self.args.samples)


def stdlib_sources() -> Iterator[str]:
    """Yield source files of Python's standard library: a third domain that every machine has."""
    for name in STDLIB:
        path = Path(sysconfig.get_path("stdlib"), *name.split("."))
        yield (path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")


def device_name(device: torch.device) -> str:
    """Return the device's name for the results."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu {torch.backends.cpu.get_cpu_capability()}"
    )


def measure_methods(bench: Bench) -> None:
    """Every method at 50 % and rank 64, then the calibrated default at other patterns and sparsities."""
    bench.row("methods", "dense", lambda: {"bits": 16.0, **bench.perplexities(bench.args.model)})
    bench.variant("methods", "magnitude + SVD (the paper)", method="magnitude")
    bench.variant("methods", "joint, 64 windows (calibrated default)", calibration=bench.text())
    bench.variant("methods", "alternating, random tokens (data-free default)")
    bench.variant("methods", "alternating, weights alone", calibration=CalibrationOptions("none"))
    bench.variant("methods", "joint 2:4", calibration=bench.text(), pattern="2:4")
    for sparsity in (0.6, 0.7):
        bench.variant("methods", f"joint {sparsity:.0%}", calibration=bench.text(), module=ModuleOptions(sparsity))
    bench.variant("methods", "wanda + weighted SVD", calibration=bench.text(), method="wanda")
    bench.variant("methods", "sparsegpt + weighted SVD", calibration=bench.text(), method="sparsegpt")
    bench.variant("methods", "joint, calibrated on GSM8K", calibration=bench.text("gsm8k_train.jsonl"))
    bench.variant("methods", "alternating, text", calibration=bench.text(), method="alternating")


def measure_bytes(bench: Bench) -> None:
    """Perplexity over bits: joint at three ranks, pruning alone, and the budget solver at the same sizes."""
    bench.row("bytes", "dense", lambda: {"bits": 16.0, **bench.perplexities(bench.args.model)})
    for rank, sparsities in ((0, (0.3, 0.4, 0.5, 0.6)), (16, (0.4, 0.5, 0.6)), (64, (0.5, 0.6, 0.7))):
        for sparsity in sparsities:
            options = ModuleOptions(sparsity, rank)
            bench.variant("bytes", f"joint rank {rank} {sparsity:.0%}", calibration=bench.text(), module=options)
    for target in (12.0, 10.5, 9.7, 8.5):
        fixed = ModuleOptions(values="bf16")  # as on every other curve; benchmarks/pareto.py lets it choose
        bench.variant("bytes", f"solver {target:g} bits", calibration=bench.text(), target_bits=target, module=fixed)
    for method in ("magnitude", "wanda", "sparsegpt"):
        for sparsity in (0.3, 0.5):
            data = None if method == "magnitude" else bench.text()
            options = ModuleOptions(sparsity, 0)
            bench.variant("bytes", f"{method} rank 0 {sparsity:.0%}", method=method, calibration=data, module=options)


def answer_examples(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Return (question ids, answer ids) of GSM8K, as QUALITY's fine-tuning protocol has them."""
    found = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        question = tokenizer(f"Question: {record['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
        answer = tokenizer(" " + record["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(question) + len(answer) <= 320:
            found.append((question, answer))
    return found


def answer_loss(model: Any, batch: list[tuple[list[int], list[int]]], device: torch.device) -> tuple[torch.Tensor, int]:
    """Return the summed negative log-likelihood of the answers' tokens, and their number."""
    width = max(len(q) + len(a) for q, a in batch)
    ids, labels = torch.full((len(batch), width), 2), torch.full((len(batch), width), -100)
    for row, (question, answer) in enumerate(batch):
        ids[row, : len(question) + len(answer)] = torch.tensor(question + answer)
        labels[row, len(question) : len(question) + len(answer)] = torch.tensor(answer)
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(input_ids=ids.to(device), use_cache=False).logits[:, :-1]
    targets = labels[:, 1:].to(device)
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
    return loss, int((targets != -100).sum())


@torch.no_grad()
def answer_nll(model: Any, examples: list[tuple[list[int], list[int]]], device: torch.device) -> float:
    """Return the mean negative log-likelihood of an answer token in nats."""
    parts = [answer_loss(model, examples[i : i + 32], device) for i in range(0, len(examples), 32)]
    return sum(loss.item() for loss, _ in parts) / sum(count for _, count in parts)


def train_lora(bench: Bench, out: Path, rate: float = 2e-3) -> dict[str, Any]:
    """Train a rank-16 LoRA on the dense model (one epoch of GSM8K, answer tokens only, one seed) and save it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, tokenizer = load_model(bench.args.model, bench.device, torch.float32)
    model.name_or_path = str(bench.args.model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    examples = answer_examples(bench.args.data / "gsm8k_train.jsonl", tokenizer)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1)).tolist()
    batch = bench.args.batch
    steps = bench.args.steps or len(order) // batch
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20) * max(0.05, 1 - step / steps)
        loss, count = answer_loss(model, [examples[i] for i in order[step * batch : (step + 1) * batch]], bench.device)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    nll = answer_nll(model, bench.test_examples(tokenizer), bench.device)
    merged = bench.folder / "merged"
    model.merge_and_unload().save_pretrained(merged)
    tokenizer.save_pretrained(merged)
    del model, optimizer
    return {"answer_nll": nll, **bench.perplexities(merged)}


def measure_lora(bench: Bench) -> None:
    """The main case: a LoRA trained on the dense model, converted without further training."""
    adapter = bench.folder / "gsm8k_lora"
    bench.rows = [row for row in bench.rows if row["part"] != "lora"]  # its adapter is not kept between runs
    bench.row("lora", "dense + LoRA", lambda: train_lora(bench, adapter))
    variants: dict[str, dict[str, Any]] = {
        "paper": {"method": "magnitude"},
        "data-free default": {},
        "calibrated on GSM8K": {"calibration": bench.text("gsm8k_train.jsonl")},
        "calibrated on WikiText-2": {"calibration": bench.text()},
    }
    for name, options in variants.items():

        def measure(options: dict[str, Any] = options) -> dict[str, Any]:
            out, facts = bench.convert(bench.args.model, adapters=(("gsm8k", adapter),), **options)
            model, tokenizer = load_model(out, bench.device, torch.float32)
            nll = answer_nll(model, bench.test_examples(tokenizer), bench.device)
            del model
            return {**facts, "answer_nll": nll, **bench.perplexities(out)}

        bench.row("lora", name, measure)


def plot_bytes(bench: Bench, path: Path) -> None:
    """Draw perplexity over bits, one line a family."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in bench.rows if row["part"] == "bytes" and row["name"] != "dense"]
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        family = "budget solver" if row["name"].startswith("solver") else row["name"].rsplit(" ", 1)[0]
        families.setdefault(family, []).append(row)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for family, points in sorted(families.items()):
        points.sort(key=lambda row: row["bits"])
        for point in points:
            if point["wikitext2"] > HIGHEST_PLOTTED:
                note = f"{point['name']}: {point['wikitext2']:.0f}"
                axes.annotate(note, (point["bits"], HIGHEST_PLOTTED), (0, -12), textcoords="offset points", fontsize=8)
        style = {"linewidth": 2.5, "color": "black"} if family == "budget solver" else {}
        axes.plot([p["bits"] for p in points], [p["wikitext2"] for p in points], marker="o", label=family, **style)
    dense = next((row["wikitext2"] for row in bench.rows if row["name"] == "dense"), None)
    if dense:
        axes.axhline(dense, color="grey", linestyle=":", label="dense, 16 bits")
    axes.set(xlabel="bits per packed weight, adapters counted", ylabel="WikiText-2 perplexity", yscale="log")
    axes.set_ylim(20, HIGHEST_PLOTTED)
    axes.set_yticks([20, 21, 22, 24, 26, 28, 30, 35, 40, 50], [20, 21, 22, 24, 26, 28, 30, 35, 40, 50])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def bench_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the arguments that every `Bench` reads, except for its texts."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows")
    parser.add_argument("--windows", type=int, help="only so many windows of each text, for a quick look")
    parser.add_argument("--only", default="", help="measure rows whose name matches this regular expression")
    return parser


def main() -> None:
    """Run from the command line."""
    parser = bench_parser(__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--parts", default="methods,bytes,lora")
    parser.add_argument("--batch", type=int, default=32, help="examples a step of LoRA training")
    parser.add_argument("--steps", type=int, help="only so many steps of LoRA training, for a quick look")
    parser.add_argument("--blocks", type=int, default=32, help="blocks of the 8B-shaped checkpoint")
    parser.add_argument("--large", type=Path, help="where that checkpoint lies, or is written to and kept")
    bench = Bench(parser.parse_args())
    measures = {"methods": measure_methods, "bytes": measure_bytes, "lora": measure_lora, "time": measure_time}
    for part in filter(None, bench.args.parts.split(",")):
        measures[part](bench)
    if bench.args.plot:
        plot_bytes(bench, bench.args.plot)


if __name__ == "__main__":
    main()
