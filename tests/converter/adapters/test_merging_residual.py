"""Adapters merged into the residual: one pair a module, the same product, and errors that are told to be older."""

from __future__ import annotations

import numpy as np
import pytest
from salr.converter.verification import compare_with_source
from salr.formats.reader import SalrFile

import salr

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture(params=["source", "int8"])
def adapted(request, llama32, lora, tmp_path):
    """Return a file with a residual, stored in floats or int8, and an adapter on q_proj and down_proj."""
    options = salr.ConvertOptions(
        salr.ModuleOptions(0.5, 6, adapter_values=request.param), method="magnitude", adapters=(("a", lora),)
    )
    salr.convert(llama32, tmp_path / "m.salr", options)
    return tmp_path / "m.salr"


def dense(path, module):
    return SalrFile(path).dense(module, adapters=True).astype(np.float64)


def test_without_a_rank_nothing_is_lost_and_modules_without_the_adapter_keep_their_bytes(adapted, tmp_path):
    out = tmp_path / "out.salr"
    report = salr.merge_adapters(adapted, ["residual", "a"], "residual", destination=salr.Destination(out))
    assert (report.n_exact, report.n_folded, report.n_fitted) == (0, 4, 0)  # scalings differ: 1 and 1.5
    before, after = SalrFile(adapted), SalrFile(out)
    assert [problem for _, problem in after.check_all() if problem is not None] == []
    for module in before.modules:
        np.testing.assert_allclose(dense(out, module), dense(adapted, module), atol=1e-6)
    assert before.modules[UP] == after.modules[UP] and before.raw(f"{UP}.values") == after.raw(f"{UP}.values")
    assert before.raw(f"{UP}.lora_A.residual") == after.raw(f"{UP}.lora_A.residual")
    (entry,) = after.modules[Q].adapters
    assert (entry.name, entry.rank, entry.alpha, entry.origin) == ("residual", 10, None, "merged from residual, a")
    assert after.modules[Q].error == before.modules[Q].error


def test_with_the_residuals_rank_the_sum_is_fitted_again_and_its_error_measured(adapted, tmp_path):
    out = tmp_path / "out.salr"
    report = salr.merge_adapters(adapted, ["a", "residual"], "residual", rank=6, destination=salr.Destination(out))
    assert report.n_fitted == 4 and report.adapter.ranks == (6,)
    base = SalrFile(adapted).dense(Q, residual=False)
    wanted, found = dense(adapted, Q) - base, dense(out, Q) - base
    best = np.linalg.svd(wanted, compute_uv=False)[6:]
    assert np.linalg.norm(wanted - found) == pytest.approx(np.linalg.norm(best), rel=1e-3)
    assert 0 < report.error < report.worst_error < 1


def test_the_file_still_agrees_with_its_source(adapted, llama32, lora):
    salr.merge_adapters(adapted, ["residual", "a"], "residual", rank=5)
    found = dict(compare_with_source(SalrFile(adapted), llama32, (("a", lora),)))
    assert len(found) > 14 and [problem for problem in found.values() if problem is not None] == []


def test_scaling_a_merged_residual_leaves_the_old_errors_and_removing_it_makes_them_true(adapted):
    before = SalrFile(adapted).modules[Q].error
    salr.merge_adapters(adapted, ["residual", "a"], "residual")
    salr.scale_adapter(adapted, "residual", factor=0.5)
    assert SalrFile(adapted).modules[Q].error == before
    salr.remove_adapter(adapted, "residual")
    error = SalrFile(adapted).modules[Q].error
    assert error.residual == error.mask == before.mask
