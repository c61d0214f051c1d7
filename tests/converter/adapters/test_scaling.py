"""Rescaled adapters: a number in the manifest, traceless forth and back, and errors that follow exactly."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from salr.converter.adapters.editing import scale_adapter
from salr.converter.adapters.records import rescaled
from salr.formats.errors import OptionError
from salr.formats.manifest import AdapterEntry
from salr.formats.reader import SalrFile
from salr.formats.rewriting import Destination

Q = "model.layers.0.self_attn.q_proj"


def test_scaling_forth_and_back_leaves_no_trace(mine, adapted):
    assert scale_adapter(mine, "a", factor=2).scalings == (3.0,)
    entry = next(a for a in SalrFile(mine).modules[Q].adapters if a.name == "a")
    assert (entry.scaling, entry.alpha, entry.origin) == (3.0, 6.0, "PEFT LoRA, made with scaling 1.5")
    assert scale_adapter(mine, "a", scaling=7).scalings == (7.0,)
    scale_adapter(mine, "a", scaling=1.5)
    assert mine.read_bytes() == adapted.read_bytes()


finite = st.floats(-1e30, 1e30, allow_nan=False)


@given(finite, st.lists(finite, max_size=4))
def test_an_origin_keeps_the_first_scaling_through_any_changes(first, changes):
    entry = made = AdapterEntry("a", 4, first, "PEFT LoRA", 6.0)
    for scaling in changes:
        entry = rescaled(entry, scaling)
        assert entry.scaling == scaling and entry.origin.count("made with scaling") <= 1
        assert replace(entry, scaling=first, origin=made.origin) == made
    assert rescaled(entry, first) == made


@pytest.mark.parametrize("factor", [0.5, -1.0, 2.0])
def test_a_rescaled_residual_has_the_error_that_is_measured_against_the_source(factor, adapted, llama32, tmp_path):
    scale_adapter(adapted, "residual", factor=factor, destination=Destination(tmp_path / "m.salr"))
    file, weights = SalrFile(tmp_path / "m.salr"), load_file(llama32 / "model.safetensors")
    for module, entry in file.modules.items():
        weight = weights[f"{module}.weight"]
        measured = (
            weight - torch.from_numpy(file.dense(module))
        ).double().square().sum() / weight.double().square().sum()
        assert math.isclose(entry.error.residual, measured, rel_tol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "no factor and no scaling, needed one of both"),
        ({"factor": 1, "scaling": 1}, "a factor and a scaling, needed one of both"),
        ({"factor": math.inf}, "needed a finite float32"),
        ({"scaling": math.nan}, "needed a finite float32"),
        ({"scaling": 1e39}, "needed a finite float32"),
    ],
)
def test_a_senseless_scaling_is_refused(refuses, mine, options, words):
    refuses(mine, OptionError, words, scale_adapter, "a", **options)


def test_a_residual_is_not_muted_but_removed(refuses, mine):
    refuses(mine, OptionError, "use remove", scale_adapter, "residual", scaling=0)
