"""What does fine-tuning on a packed base give, and what does it cost?

    python benchmarks/finetune.py quality --model DIR --data FOLDER --out results.jsonl [--work DIR] [--jobs 6]
                                          [--gpus 0 ...] [--time-limit SECONDS] [--only REGEX]
    python benchmarks/finetune.py cost [--shape llama-3-8b] [--tokens 1024 8192] [--out cost.jsonl]
    python benchmarks/finetune.py host [--steps 60]
    python benchmarks/finetune.py report --out results.jsonl

quality  LoRA on dense, nf4, pruned and SALR bases of one small model, trained for one epoch of GSM8K (answer tokens
         only) and judged on GSM8K's test answers and on WikiText-2. FOLDER holds gsm8k_train.jsonl, gsm8k_test.jsonl,
         wt2_valid.txt and wt2_test.txt. Rates: a bracket with seed 0, one step beyond its end where the best lies
         there, then seeds 1 and 2 at the best; the best is chosen on 256 training examples kept aside. Exact match is
         generated for seeds 1 and 2: it takes as long as training.
cost     peak memory and time of a training step at a large shape with random weights.
host     what launching a training step costs the host, on a CPU, with products that compute nothing.
report   prints the tables of quality again.
A run that is in the file already is not made again, so that a call which was cut by its time limit can be continued.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import fields
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from finetuning.cost import SHAPES, name_of
from finetuning.cost import run as run_cost
from finetuning.host import run as run_host
from finetuning.report import print_report
from finetuning.schedule import Results
from finetuning.training import Protocol
from finetuning.variants import VARIANTS
from finetuning.workers import Crew, Place


def quality(args: argparse.Namespace) -> None:
    """Make the runs that are missing, and print the tables."""
    started = time.monotonic()
    work = args.work or args.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    protocol = Protocol(**{field.name: getattr(args, field.name) for field in fields(Protocol)})
    results = Results(args.out, protocol)
    environment = {
        "kind": "environment",
        "device": name_of(args.device),
        "gpus": args.gpus,
        "jobs": args.jobs,
        **versions(),
    }
    if environment not in results.rows:
        results.add([environment])
    variants = [variant for variant in VARIANTS if re.search(args.only, variant.name)]
    place = Place(args.model, args.data, work, args.device, protocol)
    crew = Crew(place, results, variants, args.jobs, args.gpus, started + args.time_limit)
    done = crew.work()
    print(f"{'all runs are made' if done else 'runs are left'}, {time.monotonic() - started:.0f} s", flush=True)
    print_report(results)


def versions() -> dict[str, str]:
    """Return the versions that figures depend on."""
    found = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {**found, "python": sys.version.split()[0]}


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    runs = commands.add_parser("quality")
    runs.add_argument("--model", type=Path, required=True)
    runs.add_argument("--data", type=Path, required=True)
    runs.add_argument("--out", type=Path, required=True)
    runs.add_argument("--work", type=Path, help="where converted bases are kept; beside --out by default")
    runs.add_argument("--jobs", type=int, default=6, help="processes at once")
    runs.add_argument(
        "--gpus",
        nargs="+",
        default=[],
        help="numbers of GPUs that the processes share; by default the first visible one",
    )
    runs.add_argument("--time-limit", type=float, default=float("inf"), help="seconds")
    runs.add_argument("--only", default="", help="variants whose name matches this regular expression")
    runs.add_argument("--device", default=device)
    runs.add_argument("--prompt", choices=("chat", "plain"), default="chat")
    runs.add_argument("--batch", type=int, default=32)
    for name in ("--steps", "--test-examples", "--windows", "--rounds"):
        runs.add_argument(name, type=int, help="only so many, for a quick look")
    runs.add_argument("--held-out", type=int, default=256, help="training examples kept aside to choose a rate")
    runs.add_argument("--samples", type=int, default=64, help="calibration windows")
    runs.add_argument("--new-tokens", type=int, default=320, help="the most that an answer may have")
    cost = commands.add_parser("cost")
    cost.add_argument("--shape", choices=tuple(SHAPES), default="llama-3-8b")
    cost.add_argument("--layers", type=int, help="other than the shape's")
    cost.add_argument("--tokens", type=int, nargs="+", default=[1024, 8192], help="a step, in sequences of 1024")
    cost.add_argument("--steps", type=int, default=7, help="that are timed, after 3")
    cost.add_argument("--device", default=device)
    cost.add_argument("--out", type=Path, help="rows are kept here; a side that is there is not measured again")
    host = commands.add_parser("host")
    host.add_argument("--steps", type=int, default=60, help="of each side and kind of checkpointing")
    report = commands.add_parser("report")
    report.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Run from the command line."""
    args = parsed()
    if args.command == "quality":
        quality(args)
    elif args.command == "cost":
        run_cost(args.shape, args.layers, args.tokens, args.steps, args.device, args.out)
    elif args.command == "host":
        run_host(args.steps)
    else:
        print_report(Results(args.out, None))


if __name__ == "__main__":
    main()
