"""How fast a model runs here: prefill, decoding at several batch sizes, memory, and where dense is faster.

Invariant: packed and dense are measured in one process by the same steps on the same random tokens; a figure is the
median of its repeats; what the first call costs (compilation, page faults) is told apart from it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..formats.errors import OptionError
from . import backends, memory
from .devices import usable_device
from .errors import LoadError
from .experts import packed_modules
from .generation import positions_of
from .loading import DTYPES, load
from .quiet import quiet_transformers

_MOST_SEQUENCES = 2**31 - 1


@dataclass(frozen=True)
class BenchOptions:
    """What is measured.

    Args:
        batches: sequences decoded at once, ascending.
        prompt_tokens: read before decoding, and timed as prefill.
        new_tokens: decoding steps timed for each figure.
        repeats: of each figure.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 3

    def __post_init__(self) -> None:
        counts = {"--prompt-tokens": self.prompt_tokens, "--new-tokens": self.new_tokens, "--repeats": self.repeats}
        for name, count in counts.items():
            if count < 1:
                raise OptionError(f"{name} {count}", needed="1 or more")
        if not self.batches or min(self.batches) < 1 or list(self.batches) != sorted(set(self.batches)):
            raise OptionError(f"--batch {self.batches}", needed="positive numbers, ascending")
        if max(self.batches) > _MOST_SEQUENCES:
            raise OptionError(f"--batch {max(self.batches)}", needed=f"at most {_MOST_SEQUENCES}")


@dataclass(frozen=True)
class Speed:
    """At one batch size: tokens a second over all sequences, reading the prompt and writing new ones."""

    batch: int
    prefill_tokens_per_second: float
    tokens_per_second: float


@dataclass(frozen=True)
class BenchResult:
    """One model; ``memory_bytes`` is what loading it and one run took, None where that cannot be told.

    ``backend`` computes its packed layers, "torch" where it has none.
    """

    name: str
    backend: str
    load_seconds: float
    first_call_seconds: float
    memory_bytes: int | None
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class Comparison:
    """The results, packed first, and the smallest batch at which dense writes faster (None: at none measured)."""

    results: tuple[BenchResult, ...]
    crossover: int | None = None


def bench(
    path: str | Path,
    against: str | Path | None = None,
    options: BenchOptions | None = None,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    backend: str | None = None,
) -> Comparison:
    """Measure a .salr file, and the dense model it was made from where ``against`` names its directory.

    Raises:
        SalrError: a model cannot be loaded, or is no language model.
    """
    import transformers.modeling_utils  # noqa: F401  # once, and no part of the first model's time

    options, target = options or BenchOptions(), usable_device(device)
    loaders: list[tuple[str, Callable[[], Any]]] = [
        (str(path), lambda: load(path, device=device, dtype=dtype, backend=backend))
    ]
    if against is not None:
        loaders.append((str(against), lambda: _load_dense(Path(against), device, dtype)))
    loaded = [_measure_model(name, loader, options, target) for name, loader in loaders]
    results = tuple(result for _, result in loaded)
    if len(loaded) == 1:
        return Comparison(results)
    return Comparison(results, _crossover([model for model, _ in loaded], results, options))


def measure(model: Any, batch: int, options: BenchOptions) -> Speed:
    """Return a model's speed at one batch size, the median of the repeats.

    Raises:
        OptionError: the device has too little memory for it.
    """
    runs = [_run(model, batch, options) for _ in range(options.repeats)]
    prefill = statistics.median(run[0] for run in runs)
    step = statistics.median(seconds for run in runs for seconds in run[1])
    return Speed(batch, batch * options.prompt_tokens / prefill, batch / step)


def _run(model: Any, batch: int, options: BenchOptions) -> tuple[float, list[float]]:
    """Return seconds for the prompt, and for each decoding step."""
    try:
        return _decode(model, batch, options)
    except RuntimeError as error:
        if not memory.is_exhausted(error):
            raise
        found = f"{batch} sequences do not fit in the memory of {model.device}"
        raise OptionError(found, fix="give a smaller --batch, --prompt-tokens or --new-tokens") from error


def _decode(model: Any, batch: int, options: BenchOptions) -> tuple[float, list[float]]:
    generator = torch.Generator().manual_seed(batch)
    n_words = model.config.get_text_config().vocab_size
    ids = torch.randint(n_words, (batch, options.prompt_tokens), generator=generator).to(model.device)
    seconds: list[float] = []
    cache = None
    with torch.inference_mode():
        for _ in range(options.new_tokens + 1):
            with _timed(model.device, seconds):
                output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
    return seconds[0], seconds[1:]


@contextmanager
def _timed(device: torch.device, seconds: list[float]) -> Iterator[None]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    yield
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds.append(time.perf_counter() - start)


def _measure_model(
    name: str, loader: Callable[[], Any], options: BenchOptions, device: torch.device
) -> tuple[Any, BenchResult]:
    before, start = memory.used_bytes(device), time.perf_counter()
    model = loader()
    load_seconds = time.perf_counter() - start
    _check_length(model, name, options)
    start = time.perf_counter()
    _run(model, options.batches[0], BenchOptions(options.batches[:1], options.prompt_tokens, 1, 1))
    first_call_seconds = time.perf_counter() - start
    after = memory.used_bytes(device)
    used = None if before is None or after is None else after - before
    speeds = tuple(measure(model, batch, options) for batch in options.batches)
    return model, BenchResult(name, backend_of(model), load_seconds, first_call_seconds, used, speeds)


def backend_of(model: torch.nn.Module) -> str:
    """Return the backend that computes a model's packed layers, "torch" where it has none."""
    for _, module in packed_modules(model):
        return module.backend or backends.choose(module.compute_device.type)
    return "torch"


def _check_length(model: Any, name: str, options: BenchOptions) -> None:
    if not model.can_generate():
        raise OptionError(f"{type(model).__name__} writes no text", path=name, needed="a language model")
    most = positions_of(model.config)
    needed = options.prompt_tokens + options.new_tokens
    if needed > most:
        raise OptionError(f"{needed} tokens a sequence", path=name, needed=f"at most {most}", fix="--prompt-tokens N")


def _crossover(models: list[Any], results: tuple[BenchResult, ...], options: BenchOptions) -> int | None:
    """Return the smallest batch at which dense is faster, by halving between the measured sizes that enclose it."""
    dense_wins = [
        dense.tokens_per_second > packed.tokens_per_second
        for packed, dense in zip(results[0].speeds, results[1].speeds, strict=True)
    ]
    if True not in dense_wins:
        return None
    first = dense_wins.index(True)
    low, high = (options.batches[first - 1] if first else 0), options.batches[first]
    while high - low > 1:
        middle = (low + high) // 2
        packed, dense = (measure(model, middle, options).tokens_per_second for model in models)
        low, high = (low, middle) if dense > packed else (middle, high)
    return high


def _load_dense(path: Path, device: str, dtype: str) -> Any:
    import transformers

    if not (path / "config.json").is_file():
        raise LoadError("no model directory", path=path, needed="the dense model with its config.json")
    with quiet_transformers():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                path, dtype=DTYPES.get(dtype, dtype), local_files_only=True
            )
        except Exception as error:  # transformers raises many types; all mean the same here
            reason = next(iter(str(error).splitlines()), type(error).__name__)[:160]
            raise LoadError(f"transformers cannot load it ({reason})", path=path) from error
    return model.to(device)
