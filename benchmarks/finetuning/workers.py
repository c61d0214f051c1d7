"""Worker processes that share the machine's GPUs and take tasks one by one.

A small model's step is bound by launching kernels, so several processes at once keep a GPU busier than one. A
worker stays on one GPU, loads libraries and data once, and keeps the model of its last run for the next of its kind.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

from .schedule import Results, Task, tasks
from .training import Bench, Protocol
from .variants import Variant, conversion, convert

_ATTEMPTS = 2
HIDDEN = ("kind", "variant", "rate", "seed", "base", "rates", "seconds")
#: a task is not begun where less than this times the longest run so far is left
_MARGIN = 1.1


@dataclass(frozen=True)
class Place:
    """Where everything lies, and on which device it runs."""

    source: Path
    data: Path
    work: Path
    device: str
    protocol: Protocol


def serve(place: Place, threads: int, inbox: Any, outbox: Any) -> None:
    """Run tasks from ``inbox`` until it gives None; answers are (process id, rows, reason), one of the two empty."""
    import torch

    torch.set_num_threads(threads)
    bench: Bench | None = None
    for task in iter(inbox.get, None):
        try:
            if task.variant is not None and bench is None:
                bench = Bench(place.source, place.data, place.work, torch.device(place.device), place.protocol)
            start = time.perf_counter()
            rows = done(task, place, bench)
            seconds = round(time.perf_counter() - start, 1)
            outbox.put((os.getpid(), [{**row, "seconds": seconds} for row in rows], None))
        except Exception as error:
            traceback.print_exc()
            if isinstance(error, torch.OutOfMemoryError):
                bench = None
                torch.cuda.empty_cache()
            outbox.put((os.getpid(), [], f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))


def done(task: Task, place: Place, bench: Bench | None) -> list[dict[str, Any]]:
    """Do a task and return its rows."""
    if task.variant is not None and bench is not None:
        return bench.run(task.variant, task.rate, task.seed, task.wants_before, task.wants_exact)
    options = conversion(task.base, place.data, place.device, place.protocol.rounds, place.protocol.samples)
    return [convert(task.base, place.source, place.work / f"{task.base}.salr", options)]


@dataclass
class Worker:
    """One process, the task it has, and what kind of model it holds."""

    process: Any
    inbox: Any
    gpu: str | None
    task: Task | None = None
    holds: Any = None


@dataclass
class Crew:
    """All workers of one call, and what they were given."""

    place: Place
    results: Results
    variants: Sequence[Variant]
    jobs: int
    gpus: Sequence[str]
    deadline: float
    workers: dict[int, Worker] = field(default_factory=dict)
    attempts: dict[tuple[Any, ...], int] = field(default_factory=dict)
    longest: float = 0.0

    def work(self) -> bool:
        """Run until nothing is left or time is up; return whether everything is done."""
        context = multiprocessing.get_context("spawn")
        self.longest = max((row["seconds"] for row in self.results.of("run")), default=0.0)
        outbox = context.Queue()
        try:
            while time.monotonic() < self.deadline:
                left = self.assign(context, outbox)
                if not any(worker.task for worker in self.workers.values()):
                    return not left
                try:
                    self.receive(*outbox.get(timeout=1))
                except queue.Empty:
                    self.bury()
            return False
        finally:
            self.dismiss()

    def open_tasks(self) -> list[Task]:
        """Return the tasks to begin, but for those under way and those that failed too often."""
        running = {worker.task.key for worker in self.workers.values() if worker.task}
        given_up = {key for key, count in self.attempts.items() if count >= _ATTEMPTS}
        return tasks(self.variants, self.results, self.place.work, running | given_up)

    def assign(self, context: Any, outbox: Any) -> list[Task]:
        """Give tasks to idle workers, starting them as they are needed; return the tasks that are left."""
        left = self.open_tasks()
        while left and time.monotonic() + _MARGIN * self.longest < self.deadline:
            idle = [worker for worker in self.workers.values() if worker.task is None]
            if not idle and len(self.workers) >= self.jobs:
                break
            worker = idle[0] if idle else self.hire(context, outbox)
            near = left[: 2 * self.jobs]
            task = next((t for t in near if t.variant and t.variant.model_key == worker.holds), left[0])
            before = {w.task.base for w in self.workers.values() if w.task and w.task.wants_before}
            worker.task = replace(task, wants_before=task.wants_before and task.base not in before)
            worker.holds = task.variant.model_key if task.variant else worker.holds
            worker.inbox.put(worker.task)
            left = self.open_tasks()
        return left

    def hire(self, context: Any, outbox: Any) -> Worker:
        """Start one more worker, on the GPU that has fewest."""
        inbox = context.Queue()
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        gpu = min(self.gpus, key=[worker.gpu for worker in self.workers.values()].count, default=None)
        process = context.Process(target=serve, args=(self.place, threads, inbox, outbox), daemon=True)
        visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        with mock.patch.dict(os.environ, visible):  # read by the process when it begins
            process.start()
        worker = self.workers[process.pid] = Worker(process, inbox, gpu)
        return worker

    def receive(self, pid: int, rows: list[dict[str, Any]], reason: str | None) -> None:
        """Keep what a worker has found."""
        worker = self.workers[pid]
        task, worker.task = worker.task, None
        assert task is not None
        what = f"{task.variant.name}, rate {task.rate:g}, seed {task.seed}" if task.variant else f"convert {task.base}"
        if reason is not None:
            self.attempts[task.key] = self.attempts.get(task.key, 0) + 1
            worker.holds = None
            print(f"FAILED {what}: {reason}", flush=True)
            return
        self.results.add(rows)
        seconds = rows[-1]["seconds"]
        if task.variant:
            self.longest = max(self.longest, seconds)
        told = {k: v for k, v in rows[-1].items() if k not in HIDDEN}
        print(f"{what} ({seconds:.0f} s): {told}", flush=True)

    def bury(self) -> None:
        """Count a worker that died as a failed task."""
        for pid, worker in list(self.workers.items()):
            if not worker.process.is_alive():
                if worker.task is not None:
                    self.receive(pid, [], f"the worker ended with code {worker.process.exitcode}")
                del self.workers[pid]

    def dismiss(self) -> None:
        """End the workers; what they have under way is lost and begun again by the next call."""
        for worker in self.workers.values():
            if worker.task is None:
                worker.inbox.put(None)
            else:
                worker.process.terminate()
        for worker in self.workers.values():
            worker.process.join(10)
            if worker.process.is_alive():
                worker.process.kill()
