"""Backends are found by name, chosen by device, and say why they cannot be used."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from salr.runtime import backends, reference
from salr.runtime.errors import BackendError


@pytest.fixture(autouse=True)
def forgotten():
    """Forget what was found, before and after."""
    for _ in (0, 1):
        backends._found.cache_clear()
        backends.backend_for.cache_clear()
        if not _:
            yield


def fake(monkeypatch, name, **members):
    module = ModuleType(f"fake_{name}")
    module.__dict__.update(members)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(backends.MODULES, name, module.__name__)
    return module


def test_the_reference_runs_everywhere():
    assert backends.reason_unusable("reference") is None
    assert backends.usable("reference").linear is reference.linear
    assert backends.choose("xpu") == "reference"


def test_a_usable_backend_of_the_device_is_chosen(monkeypatch):
    module = fake(monkeypatch, "cpu", linear=lambda x, *rest: x, reason_unusable=lambda: None)
    assert backends.choose("cpu") == "cpu" and backends.backend_for("cpu").linear is module.linear
    assert backends.choose("meta") == "reference"


def test_an_unusable_backend_is_passed_over_with_its_reason(monkeypatch):
    fake(monkeypatch, "cpu", linear=None, reason_unusable=lambda: "this processor has no AVX2")
    assert backends.choose("cpu") == "reference"
    with pytest.raises(BackendError, match="backend 'cpu' cannot be used here: this processor has no AVX2; see"):
        backends.usable("cpu")


def test_a_module_that_is_absent_is_not_installed(monkeypatch):
    monkeypatch.setitem(backends.MODULES, "cuda", "salr.nowhere.linear")
    assert backends.reason_unusable("cuda") == "not installed"
    assert backends.choose("cuda") == "reference"


def test_a_package_that_is_missing_is_named(monkeypatch, tmp_path):
    (tmp_path / "needs_cupy.py").write_text("import no_such_package_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(backends.MODULES, "cuda", "needs_cupy")
    assert backends.reason_unusable("cuda") == "package 'no_such_package_at_all' is not installed"


@pytest.mark.parametrize("error", ["RuntimeError('no driver\\nfound')", "OSError()"])
def test_an_import_that_fails_is_a_reason_and_no_exception(monkeypatch, tmp_path, error):
    (tmp_path / "breaks.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(backends.MODULES, "cuda", "breaks")
    monkeypatch.delitem(sys.modules, "breaks", raising=False)
    expected = "no driver found" if "driver" in error else "OSError"
    assert backends.reason_unusable("cuda") == f"cannot be imported ({expected})"


def test_the_environment_overrides_the_choice(monkeypatch):
    fake(monkeypatch, "cpu", linear=lambda x, *rest: x)
    monkeypatch.setenv("SALR_BACKEND", "reference")
    assert backends.choose("cpu") == "reference"
    monkeypatch.setenv("SALR_BACKEND", "fastest")
    with pytest.raises(BackendError, match="backend 'fastest', needed one of cuda, cpu, reference"):
        backends.choose("cpu")


def test_a_layer_computes_with_the_backend_it_is_told(monkeypatch, golden):
    from salr.formats.reader import SalrFile

    from salr.runtime.layout import module_layout
    from salr.runtime.linear import SalrLinear

    fake(monkeypatch, "cpu", linear=lambda x, weight, adapters, bias: x.new_full((len(x), weight.n_rows), 7))
    file, name = SalrFile(golden), "layers.0.attn.k"
    layer = SalrLinear(module_layout(name, file.modules[name], file.tensors), device="cpu")
    assert layer(torch.ones(2, 8)).tolist() == [[7.0] * 3] * 2
    layer.backend = "reference"
    layer.row_offsets.zero_(), layer.bitmap.zero_(), layer.values.zero_()
    assert layer(torch.ones(2, 8)).tolist() == [[0.0] * 3] * 2


def test_a_matrix_is_made_ready_once_and_again_where_the_bias_changes(monkeypatch, golden):
    from salr.formats.reader import SalrFile

    from salr.runtime.layout import module_layout
    from salr.runtime.linear import SalrLinear

    prepared = []

    def prepare(weight, adapters, bias):
        prepared.append(bias.tolist())
        return weight, adapters, bias.clone()

    fake(
        monkeypatch, "cpu", linear=reference.linear, prepare=prepare, apply=lambda ready, x: reference.linear(x, *ready)
    )
    file, name = SalrFile(golden), "layers.0.attn.k"
    bias = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
    layer = SalrLinear(module_layout(name, file.modules[name], file.tensors), bias, device="cpu")
    for tensor in layer.buffers():
        tensor.zero_()
    for _ in range(3):
        assert layer(torch.ones(2, 8)).count_nonzero() == 0
    bias += 1
    assert layer(torch.ones(2, 8)).tolist() == [[1.0] * 3] * 2
    layer.bias = torch.nn.Parameter(torch.full((3,), 5.0), requires_grad=False)
    assert layer(torch.ones(2, 8)).tolist() == [[5.0] * 3] * 2
    assert prepared == [[0.0] * 3, [1.0] * 3, [5.0] * 3]
