"""The loop itself: transformers' Trainer with checkpoints, stopped at a step's end by Ctrl-C.

Importing this module imports transformers' Trainer.
"""

from __future__ import annotations

import functools
import math
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
from transformers.trainer_utils import get_last_checkpoint

from ..formats.errors import OptionError
from ..runtime.quiet import quiet_transformers
from .data import TrainingData, collate
from .options import FinetuneOptions

WARMUP_SHARE = 0.03


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


def run(
    model: Any, groups: list[dict[str, Any]], data: TrainingData, options: FinetuneOptions, folder: Path, events: Events
) -> Run:
    """Train, from the last checkpoint in ``folder`` where there is one.

    Raises:
        OptionError: the loss is not finite.
        KeyboardInterrupt: Ctrl-C, after the step and a checkpoint; at once where it is pressed again.
    """
    watcher = _Watcher(events)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers and peft about each other
        warnings.filterwarnings("ignore", "Could not find a config file")  # peft looks for one beside the .salr file
        trainer = _trainer(model, groups, data, options, folder)
        trainer.add_callback(watcher)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        with _interruptible(watcher):
            trainer.train(resume_from_checkpoint=last)
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
    trainer = Trainer(
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
