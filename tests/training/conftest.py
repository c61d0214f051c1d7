"""Packed models to train: one with every encoding, and how one is trained for a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import salr

#: module -> how it is stored; down_proj has an int8 residual, k_proj of the second layer keeps all weights
ENCODINGS = (
    ("*.q_proj", {"values": "bf16"}),
    ("*.k_proj", {"values": "fp16"}),
    ("*.v_proj", {"values": "fp32"}),
    ("*.gate_proj", {"values": "int8", "group_size": 16}),
    ("*.up_proj", {"values": "nf4", "group_size": 16}),
    ("*.down_proj", {"adapter_values": "int8"}),
    ("*.1.self_attn.k_proj", {"sparsity": 0.0, "values": "nf4", "rank": 3}),
)


@pytest.fixture(scope="session")
def mixed(llama32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a float32 Llama whose layers are stored in every encoding."""
    out = tmp_path_factory.mktemp("mixed") / "mixed.salr"
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude", overrides=ENCODINGS)
    salr.convert(llama32, out, options)
    return out


@pytest.fixture(scope="session")
def two_of_four(llama32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a float32 Llama with the 2:4 pattern."""
    out = tmp_path_factory.mktemp("24") / "m24.salr"
    salr.convert(llama32, out, salr.ConvertOptions(salr.ModuleOptions(0.5, 4), method="magnitude", pattern="2:4"))
    return out


@pytest.fixture(scope="session")
def train() -> Callable[..., list[float]]:
    """Return a function: (model, steps, lr) -> the losses of AdamW steps towards fixed labels."""
    import torch

    ids = torch.tensor([[3, 14, 15, 9, 26, 5], [5, 3, 5, 8, 9, 7]])

    def run(model: Any, n_steps: int = 3, lr: float = 0.02) -> list[float]:
        optimizer = torch.optim.AdamW(salr.param_groups(model, lr))
        losses = []
        for _ in range(n_steps):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    return run
