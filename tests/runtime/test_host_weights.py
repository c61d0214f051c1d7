"""Packed tensors stay in host memory where a backend lays them out itself; the meta device stands for a GPU."""

from __future__ import annotations

import copy
import sys
from types import ModuleType

import pytest
import torch
from salr.formats.reader import SalrFile

from salr.runtime import backends
from salr.runtime.layout import buffer_name, module_layout
from salr.runtime.linear import SalrLinear
from salr.runtime.mapped import mapped_tensor

Q = "layers.0.attn.q"


@pytest.fixture(autouse=True)
def forgotten():
    yield
    backends._found.cache_clear()
    backends.backend_for.cache_clear()
    backends._warn.cache_clear()


@pytest.fixture
def backend(monkeypatch):
    """Return a backend for the meta device that notes what it was given."""
    module = ModuleType("fake_layouts")
    module.prepared = []

    def prepare(weight, adapters, bias):
        module.prepared.append((weight, adapters, bias))
        return weight

    module.__dict__.update(
        prepare=prepare,
        apply=lambda weight, x: x.new_empty(x.shape[0], weight.n_rows),
        linear=lambda x, weight, *rest: x.new_empty(x.shape[0], weight.n_rows),
        takes=lambda weight, dtype: "doubles" if dtype == torch.float64 else None,
        KEEPS_PACKED_ON_HOST=True,
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(backends.MODULES, "fake", module.__name__)
    monkeypatch.setitem(backends.ORDER, "meta", ("fake", "reference"))
    backends._found.cache_clear()
    backends.backend_for.cache_clear()
    return module


@pytest.fixture
def layer(golden):
    file = SalrFile(golden)
    layout = module_layout(Q, file.modules[Q], file.tensors)
    module = SalrLinear(layout, torch.nn.Parameter(torch.zeros(layout.entry.n_rows)))
    state = {buffer_name(spec.name): mapped_tensor(file, f"{Q}.{spec.name}") for spec in layout.tensors}
    module.load_state_dict(state | {"bias": module.bias.data}, assign=True)
    return module.requires_grad_(False)


def test_moving_a_layer_moves_its_bias_and_keeps_packed_tensors_where_they_are(backend, layer):
    before = {name: tensor.data_ptr() for name, tensor in layer.named_buffers()}
    layer.to("meta")
    assert {name: tensor.data_ptr() for name, tensor in layer.named_buffers()} == before
    assert layer.bias.device.type == layer.compute_device.type == layer.weight.device.type == "meta"
    assert all(tensor.device.type == "cpu" for tensor in layer.buffers())
    x = torch.empty(3, layer.in_features, device="meta")
    assert layer(x).shape == (3, layer.out_features) and layer(x).device.type == "meta"
    ((weight, adapters, bias),) = backend.prepared
    assert weight.values is layer.values and adapters.lora_A.device.type == "cpu" and bias is layer.bias


def test_a_layer_stays_placed_through_dtypes_and_copies_and_comes_back(backend, layer):
    moved = copy.deepcopy(layer.to("meta").to(torch.bfloat16))
    assert moved.compute_device.type == "meta" and moved.compute_dtype == torch.bfloat16
    assert moved.values.device.type == "cpu" and moved.bias.dtype == torch.bfloat16
    layer._apply(lambda tensor: tensor.cpu() if tensor.device.type == "cpu" else torch.empty_like(tensor, device="cpu"))
    assert layer.compute_device.type == "cpu" and layer.values.device.type == "cpu"


def test_each_dtype_is_made_ready_once(backend, layer):
    layer.to("meta")
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        layer(torch.empty(1, layer.in_features, device="meta", dtype=dtype))
    assert len(backend.prepared) == 2


def test_without_such_a_backend_packed_tensors_move(layer):
    layer.to("meta")
    assert layer.values.device.type == "meta" and layer.compute_device.type == "meta"


def test_what_a_backend_does_not_take_the_reference_computes_with_a_warning(backend, monkeypatch, layer):
    monkeypatch.setitem(backends.ORDER, "cpu", ("fake",))
    x = torch.randn(2, layer.in_features, dtype=torch.float64)
    with pytest.warns(UserWarning, match="backend 'fake' does not take doubles; the reference computes"):
        y = layer(x)
    layer.backend = "reference"
    assert torch.equal(y, layer(x)) and not backend.prepared


def test_buffers_given_back_to_the_host_leave_x_where_it_was(layer):
    kept = dict(layer.named_buffers())
    layer.to("meta").keep_on_host(kept)
    assert layer.compute_device.type == "meta" and all(t is kept[name] for name, t in layer.named_buffers())
