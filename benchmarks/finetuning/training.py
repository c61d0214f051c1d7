"""One run: a variant trained for an epoch at one rate and seed, and scored.

Invariant: frozen weights are bf16 on a GPU, adapters float32, products in bf16 under autocast; on a CPU all is float32.
A run depends on variant, rate, seed and protocol only: the model is brought back to its start before each.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import salr
from salr.evaluation.models import load_model, open_model

from .data import Example, batches, by_length, padded, read_data
from .generating import exact_match, merge_into
from .scoring import answer_nll, arithmetic, perplexity, summed_nll
from .variants import OWN, SHARED, Variant

WARM_UP = 20
LAST_RATE = 0.05
_MOST_TOKENS = 8192
ADAPTER = "default"


@dataclass(frozen=True)
class Protocol:
    """What all runs have in common; results of another protocol are not mixed with these."""

    prompt: str = "chat"
    batch: int = 32
    held_out: int = 256
    steps: int | None = None
    test_examples: int | None = None
    windows: int | None = None
    new_tokens: int = 320
    rounds: int | None = None
    samples: int = 64


class Bench:
    """A model in memory with what it started from, and the data; one a process.

    Args:
        source: the dense model's directory. work: where converted bases lie.
    """

    def __init__(self, source: Path, data: Path, work: Path, device: torch.device, protocol: Protocol) -> None:
        self.source, self.work, self.device, self.protocol = source, work, device, protocol
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with open_model(source) as opened:
            self.tokenizer = opened.tokenizer()
        self.data = read_data(
            data, self.tokenizer, protocol.prompt, protocol.held_out, protocol.test_examples, protocol.windows
        )
        self._key: tuple[str, int, bool] | None = None
        self._model: Any = None
        self._start: dict[str, torch.Tensor] = {}
        self._plain: Any = None

    def model(self, variant: Variant, seed: int) -> Any:
        """Return the variant's model as it starts: adapters drawn by the seed, the residual as converted."""
        if self._key != variant.model_key:
            self._key, self._model, self._start = None, None, {}
            self._model = self._prepared(variant)
            cast_inputs(self._model, self.device.type == "cpu")
            assert all(parameter.dtype == torch.float32 for parameter in trained(self._model).values())
            self._start = {name: p.detach().clone() for name, p in trained(self._model).items()}
            self._key = variant.model_key
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in trained(self._model).items():
                start = self._start[name]
                if f"lora_A.{ADAPTER}" in name:
                    start = (2 * torch.rand(start.shape, generator=generator) - 1) * start.shape[1] ** -0.5
                parameter.copy_(start)
        return self._model

    def _prepared(self, variant: Variant) -> Any:
        alpha = 2 * variant.rank
        if variant.base != "dense":
            model = salr.load(self.work / f"{variant.base}.salr", device=self.device, dtype=self.dtype)
            train_residual = variant.residual in (SHARED, OWN)
            return salr.prepare_for_training(model, rank=variant.rank, alpha=alpha, train_residual=train_residual)
        import peft

        model, _ = load_model(self.source, self.device, self.dtype)
        return peft.get_peft_model(
            model, peft.LoraConfig(r=variant.rank, lora_alpha=alpha, target_modules="all-linear")
        )

    def run(
        self, variant: Variant, rate: float, seed: int, wants_before: bool, wants_exact: bool
    ) -> list[dict[str, Any]]:
        """Train and score, where wanted before training too, and by exact match."""
        model, found = self.model(variant, seed), []
        if wants_before:
            found.append({"kind": "before", "base": variant.base, **self.scores(model)})
        facts = {"kind": "run", "variant": variant.name, "rate": rate, "seed": seed, "base": variant.base}
        facts |= train(model, variant, rate, self.epoch(seed), self.data.end)
        facts["held_out_nll"] = answer_nll(model, self.data.held_out, self.data.end)
        facts |= self.scores(model)
        if wants_exact and math.isfinite(facts["held_out_nll"]):
            facts |= self.exact(model)
        return [*found, facts]

    def scores(self, model: Any) -> dict[str, float]:
        """Return answer NLL on the test set and WikiText-2 perplexity."""
        model.eval()
        nll = answer_nll(model, self.data.test, self.data.end)
        return {"test_nll": nll, "perplexity": perplexity(model, self.data.windows)}

    def epoch(self, seed: int) -> list[list[Example]]:
        """Return the batches of an epoch, or the first of them."""
        return batches(self.data.train, self.protocol.batch, seed)[: self.protocol.steps]

    def exact(self, model: Any) -> dict[str, float]:
        """Return exact match with its binomial standard error, and the seconds it took."""
        start = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self._plain is None:
            self._plain, _ = load_model(self.source, self.device, self.dtype)
        merge_into(self._plain, model)
        size = 660 if self.device.type == "cuda" else 32
        share = exact_match(self._plain, self.tokenizer, self.data.test, size, self.protocol.new_tokens)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        error = math.sqrt(share * (1 - share) / len(self.data.test))
        return {"exact": share, "exact_se": error, "exact_s": round(time.perf_counter() - start, 1)}


def cast_inputs(model: Any, wanted: bool) -> None:
    """Let PEFT cast what its layers are given to the adapters' float32, or leave the rounding to autocast alone."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = wanted


def trained(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def parameter_groups(model: Any, variant: Variant, rate: float, batch: list[Example], pad: int) -> list[dict[str, Any]]:
    """Return parameters with their rates; ``batch`` is one step's, for the rate that follows from activations."""
    if variant.residual not in (SHARED, OWN):
        return [{"params": list(trained(model).values()), "lr": rate}]
    own: Any = "auto" if variant.residual == OWN else rate
    cast_inputs(model, True)
    ids = padded(batch, pad, model.device).ids
    lengths = torch.tensor([example.length for example in batch], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    shown = [{"input_ids": ids, "attention_mask": mask, "logits_to_keep": 1}]
    groups: list[dict[str, Any]] = salr.param_groups(
        model, rate, own, optimizer=variant.optimizer, activations=shown if variant.optimizer == "sgd" else None
    )
    cast_inputs(model, model.device.type == "cpu")
    return groups


def train(model: Any, variant: Variant, rate: float, epoch: list[list[Example]], pad: int) -> dict[str, Any]:
    """Train for the batches of ``epoch``: warm-up over 20 steps, then a linear fall to a twentieth; gradients clipped.

    Seconds are those of the loop, beside whatever else runs on the device.
    """
    device, parameters = model.device, list(trained(model).values())
    groups = parameter_groups(model, variant, rate, epoch[0], pad)
    optimizer = made_optimizer(groups, variant.optimizer, device)
    rates = [group["lr"] for group in optimizer.param_groups]
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses, start = [], time.perf_counter()
    for step, batch in enumerate(epoch):
        for group, full in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = full * min(1, (step + 1) / WARM_UP) * max(LAST_RATE, 1 - step / len(epoch))
        losses.append(backward(model, batch, pad, device))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    last = losses[-WARM_UP:]
    loss = float(torch.stack(last).mean())
    return {
        "steps": len(epoch), "last_loss": loss, "train_s": round(time.perf_counter() - start, 1),
        "trained": sum(parameter.numel() for parameter in parameters), "rates": sorted(set(rates)),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
    }  # fmt: skip


def made_optimizer(groups: list[dict[str, Any]], name: str, device: torch.device) -> torch.optim.Optimizer:
    """Return AdamW without weight decay, or plain SGD."""
    if name == "sgd":
        return torch.optim.SGD(groups, lr=1.0)
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=device.type == "cuda")


def backward(model: Any, batch: list[Example], pad: int, device: torch.device) -> torch.Tensor:
    """Add the gradients of a batch's mean NLL of an answer token, and return it; long batches go in parts."""
    n_tokens = sum(len(example.answer) for example in batch)
    total = torch.zeros((), device=device)
    for part in by_length(batch, _MOST_TOKENS):
        with arithmetic(device):
            loss = summed_nll(model, padded(part, pad, device)) / n_tokens
        loss.backward()
        total += loss.detach()
    return total
