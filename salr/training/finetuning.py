"""Fine-tuning a .salr file on a file of examples, with transformers' Trainer.

Invariant: nothing stands under the output's name until all of it does. Until then checkpoints are in ``OUT.partial/``,
and the same command goes on from the last one, to the result that an uninterrupted run gives.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..converter.sources.checkpoint import sha256
from ..formats.errors import OptionError, OutputError
from ..formats.partial_output import PartialOutput
from ..formats.reader import SalrFile
from ..runtime import loading
from ..runtime.generation import positions_of
from .data import TrainingData, read_training_data
from .loss_curve import draw_loss_curve
from .options import FinetuneOptions
from .packed_model import import_peft
from .parameter_groups import param_groups
from .preparing import prepare_for_training
from .saving import SaveReport, save

Progress = Callable[[int, int], None]
_SETTINGS = "training.json"
_CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainingPlan:
    """What is about to be trained: the groups' (name, parameters, rate), steps in all and done before."""

    data: TrainingData
    groups: tuple[tuple[str, int, float], ...]
    n_steps: int
    n_done: int


@dataclass(frozen=True)
class FinetuneReport:
    """What was made: ``saved``, the loss of each step (step, nats a token), and the image of them.

    ``curve`` is None where there is no image, and ``no_curve_because`` says why.
    """

    saved: SaveReport
    plan: TrainingPlan
    losses: tuple[tuple[int, float], ...]
    curve: Path | None
    no_curve_because: str | None = None


def finetune(
    path: str | Path,
    data: str | Path,
    out: str | Path,
    options: FinetuneOptions | None = None,
    *,
    force: bool = False,
    fresh: bool = False,
    started: Callable[[TrainingPlan], None] = lambda plan: None,
    progress: Progress = lambda done, total: None,
) -> FinetuneReport:
    """Train an adapter (and the residual) of a .salr file on ``data`` and write ``out``, and its loss curve beside it.

    Args:
        path: the file; it stays as it is.
        data: JSONL, see ``read_training_data``.
        options: see ``FinetuneOptions``.
        force: replace an existing output.
        fresh: discard what an interrupted run left.
        started: called once everything is checked and loaded.
        progress: called with steps done and in all.

    Raises:
        DataError: the data cannot be used.
        OptionError: an interrupted run had other settings, peft or accelerate are not installed, an example is longer
            than the model's positions, the loss is not finite, or a step does not fit the GPU's memory.
        AdapterError: the adapter's name is taken, or there is nothing to train.
        SalrError: the file is damaged, the output exists or cannot be written.
        KeyboardInterrupt: it was interrupted, after the step and a checkpoint.
    """
    path, data, out, options = Path(path), Path(data), Path(out), options or FinetuneOptions()
    import_peft()
    run, events = _import_loop()
    file = SalrFile(path)
    file.require_one_file("fine-tuning")
    with PartialOutput(out, force=force, fresh=fresh) as partial:
        base = hashlib.sha256(file.manifest.to_json()).hexdigest()
        settings = {"file": base, "data": _digest(data), "name": options.name, **options.recorded()}
        if partial.keep:
            _check_same(partial, settings)
        found = read_training_data(data, loading.load_tokenizer(path), options.max_length)
        model = _prepared(path.resolve(), options)
        _check_positions(model.config, found)
        groups = param_groups(model, options.lr, options.residual_lr or "auto")
        _record(partial, settings)
        plan = functools.partial(_plan, found, groups)
        told = events(lambda *steps: started(plan(*steps)), progress, lambda: setattr(partial, "keep", True))
        done = run(model, groups, found, options, partial.folder / _CHECKPOINTS, told)
        with PartialOutput(partial.data, force=True, fresh=True):
            pass  # what a run that was killed while it wrote has left is gone
        saved = save(model, partial.data, force=True, settings={"data": settings["data"], **options.recorded()})
        partial.commit()
    curve = out.with_name(out.name.removesuffix(".salr") + ".loss.png")
    reason = draw_loss_curve(curve, done.losses, f"{path.name} on {data.name}")
    saved = replace(saved, path=out)
    told_at_last = plan(done.n_steps, done.n_done)
    return FinetuneReport(saved, told_at_last, done.losses, None if reason else curve, reason)


def _import_loop() -> Any:
    """Return what runs the loop and what it tells; they need transformers' Trainer."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise OptionError("fine-tuning without accelerate", needed="it", fix="pip install 'salr[peft]'") from error
    from .running import Events, run

    return run, Events


def _prepared(path: Path, options: FinetuneOptions) -> Any:
    import torch

    torch.manual_seed(options.seed)
    model = loading.load(path, device=options.device, dtype="fp32" if options.device == "cpu" else "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers and peft about each other
        tuned = prepare_for_training(
            model,
            rank=options.rank,
            alpha=options.alpha,
            target=options.target_modules,
            train_residual=not options.freeze_residual,
            dropout=options.dropout,
            name=options.name,
        )
        model.config.use_cache = False
        if options.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return tuned


def _check_positions(config: Any, data: TrainingData) -> None:
    longest = max(len(example.input_ids) for example in data.examples)
    most = positions_of(config)
    if longest > most:
        found = f"an example of {longest} tokens"
        raise OptionError(found, needed=f"the model's {most} positions at most", fix=f"give --max-length {most}")


def _plan(data: TrainingData, groups: list[dict[str, Any]], n_steps: int, n_done: int) -> TrainingPlan:
    sizes = tuple((g["name"], sum(p.numel() for p in g["params"]), float(g["lr"])) for g in groups)
    return TrainingPlan(data, sizes, n_steps, n_done)


def _record(partial: PartialOutput, settings: dict[str, Any]) -> None:
    """Write what a run that goes on has to have in common with this one.

    Raises:
        OutputError: there is no room.
    """
    try:
        partial.folder.joinpath(_SETTINGS).write_text(json.dumps(settings), encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write here ({error.strerror})",
            path=partial.folder,
            fix="free some space, or choose another output",
        ) from error


def _check_same(partial: PartialOutput, settings: dict[str, Any]) -> None:
    """Refuse to go on with something else.

    Raises:
        OutputError: what is there was left by another command.
        OptionError: it was begun with other settings.
    """
    try:
        before = json.loads(partial.folder.joinpath(_SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            "an interrupted run of another command left this", path=partial.folder, fix="give --fresh to discard it"
        ) from error
    for key, value in settings.items():
        if before.get(key) != value:
            told = "" if key in ("file", "data") else f" ({before.get(key)!r}, now {value!r})"
            raise OptionError(
                f"the interrupted run had another {key.replace('_', '-')}{told}",
                path=partial.folder,
                fix="give the same again, or --fresh to start over",
            )


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError:
        return ""  # reading the examples tells it
