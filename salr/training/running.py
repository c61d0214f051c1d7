"""The loop itself: transformers' Trainer with checkpoints, stopped at a step's end by Ctrl-C.

Importing this module imports transformers' Trainer.
"""

from __future__ import annotations

import functools
import math
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..formats.errors import OptionError, OutputError
from ..runtime.quiet import quiet_transformers
from .data import TrainingData, collate
from .options import FinetuneOptions

WARMUP_SHARE = 0.03
_WRITTEN_LAST = "trainer_state.json"


@dataclass(frozen=True)
class Events:
    """What is called: ``began`` and ``progress`` with steps, ``kept`` when there is a checkpoint.

    ``began``: steps in all, and those done before. ``progress``: steps done, and in all.
    """

    began: Callable[[int, int], None]
    progress: Callable[[int, int], None]
    kept: Callable[[], None]


@dataclass(frozen=True)
class Run:
    """What a run came to: (step, loss) of every step, steps in all, and those done before it."""

    losses: tuple[tuple[int, float], ...]
    n_steps: int
    n_done: int


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Tells events, and stops after a step when Ctrl-C was pressed or the loss is not finite."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self.is_interrupted, self.is_finite, self.n_done = False, True, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self.n_done = state.global_step
        self._events.began(state.max_steps, state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **options: Any) -> None:
        self.is_finite = self.is_finite and math.isfinite(float((logs or {}).get("loss", 0.0)))
        control.should_training_stop = control.should_training_stop or not self.is_finite

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self._events.progress(state.global_step, state.max_steps)
        if self.is_interrupted and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        self._events.kept()


class _Trainer(Trainer):  # type: ignore[misc]
    """A Trainer whose checkpoints are there whole or not at all."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:  # torch and safetensors have errors of their own for a full disk
            free = shutil.disk_usage(folder).free if folder.is_dir() else 0
            shutil.rmtree(folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", ignore_errors=True)
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise OutputError(
                f"a checkpoint cannot be written ({reason}; {free / 1e6:.1f} MB free)",
                path=folder,
                fix="free some space and give the same command again",
            ) from error


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that was written to its end; a killed run may leave half of one."""
    found = [path.parent for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_WRITTEN_LAST}") if _is_state(path)]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_state(path: Path) -> bool:
    try:
        TrainerState.load_from_json(str(path))
    except (OSError, ValueError, TypeError):
        return False
    return True


@contextmanager
def _memory_named() -> Iterator[None]:
    """Turn torch's report of a full GPU into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OptionError(
            "the GPU has too little memory for a step",
            fix="give --checkpointing, a smaller --batch with --accumulate, or a smaller --max-length",
        ) from error


def run(
    model: Any, groups: list[dict[str, Any]], data: TrainingData, options: FinetuneOptions, folder: Path, events: Events
) -> Run:
    """Train, from the last checkpoint in ``folder`` where there is one.

    Raises:
        OptionError: the loss is not finite, or a step does not fit the GPU's memory.
        OutputError: a checkpoint cannot be written.
        KeyboardInterrupt: Ctrl-C, after the step and a checkpoint; at once where it is pressed again.
    """
    watcher = _Watcher(events)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers and peft about each other
        warnings.filterwarnings("ignore", "Could not find a config file")  # peft looks for one beside the .salr file
        trainer = _trainer(model, groups, data, options, folder)
        trainer.add_callback(watcher)
        last = _last_checkpoint(folder)
        with _interruptible(watcher), _memory_named():
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    state = trainer.state
    if not watcher.is_finite:
        raise OptionError(
            f"the loss of step {state.global_step} is not finite", fix="give a lower --lr or --residual-lr, and --fresh"
        )
    if watcher.is_interrupted and state.global_step < state.max_steps:
        raise KeyboardInterrupt
    losses = tuple((int(line["step"]), float(line["loss"])) for line in state.log_history if "loss" in line)
    return Run(losses, state.max_steps, watcher.n_done)


def _trainer(
    model: Any, groups: list[dict[str, Any]], data: TrainingData, options: FinetuneOptions, folder: Path
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=WARMUP_SHARE,
        bf16=options.device != "cpu",
        use_cpu=options.device == "cpu",
        seed=options.seed,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
        dataloader_pin_memory=options.device != "cpu",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process, one GPU: not DataParallel
    examples = [example._asdict() for example in data.examples]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)
    padding = getattr(model.config, "pad_token_id", None) or 0
    trainer = _Trainer(
        model,
        arguments,
        data_collator=functools.partial(collate, padding=padding),
        train_dataset=examples,
        optimizers=(optimizer, None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def _interruptible(watcher: _Watcher) -> Iterator[None]:
    """Let the first Ctrl-C wait for the step's end; the second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        watcher.is_interrupted = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
