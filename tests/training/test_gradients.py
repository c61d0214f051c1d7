"""Gradients on the packed base: those of a dense layer, with checkpointing and compiled too."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

import salr
from salr.integrations.peft_layer import SalrLoraLinear

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])


def prepared(path, **options):
    """Return a prepared float32 model whose adapters all do something."""
    torch.manual_seed(0)
    tuned = salr.prepare_for_training(salr.load(path, dtype="fp32"), rank=4, **options)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B.default" in name:
                parameter.normal_(std=0.1)
    return tuned


def lora_layers(tuned):
    return {
        name: module for name, module in tuned.get_base_model().named_modules() if isinstance(module, SalrLoraLinear)
    }


def assert_equals_dense(path, layer, name):
    """Compare a layer's product and all its gradients with those of the decoded weight and its factors."""
    weight = torch.from_numpy(salr.open(path).dense(name, residual=False))
    factors = [layer.lora_A, layer.lora_B]
    own = {(kind, a): factors[kind][a].weight for a in ("default", "residual") for kind in (0, 1)}
    dense = {key: parameter.detach().clone().requires_grad_() for key, parameter in own.items()}
    x = torch.randn(3, 5, weight.shape[1])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = theirs @ weight.T
    for adapter in ("default", "residual"):
        expected = expected + layer.scaling[adapter] * (theirs @ dense[0, adapter].T) @ dense[1, adapter].T
    found, incoming = layer(ours), torch.randn(expected.shape)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.backward(incoming)
    expected.backward(incoming)
    pairs = [(ours.grad, theirs.grad), *((own[key].grad, dense[key].grad) for key in own)]
    for gradient, reference in pairs:
        assert (gradient - reference).norm() <= 1e-4 * reference.norm() and reference.norm() > 0


@pytest.mark.parametrize("file", ["mixed", "two_of_four"])
def test_every_gradient_is_that_of_the_dense_layer_in_every_encoding(request, file):
    path = request.getfixturevalue(file)
    modules, layers = salr.open(path).modules, lora_layers(prepared(path))
    assert set(layers) == set(modules)
    seen = {(entry.encoding, entry.pattern) for entry in modules.values()}
    expected = {"bf16", "fp16", "fp32", "int8", "nf4"} if file == "mixed" else {"fp32"}
    assert {encoding for encoding, _ in seen} == expected
    assert ("nf4", "dense") in seen or file != "mixed"
    for name, layer in layers.items():
        assert_equals_dense(path, layer, name)


def gradients(tuned):
    """Return the gradients of one backward pass, and clear them."""
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    found = {name: parameter.grad for name, parameter in tuned.named_parameters() if parameter.grad is not None}
    tuned.zero_grad()
    return found


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(packed, use_reentrant):
    tuned = prepared(packed)
    expected = gradients(tuned)
    tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = []
    hook = lora_layers(tuned)["model.layers.1.self_attn.q_proj"].register_forward_hook(lambda *_: calls.append(1))
    found = gradients(tuned)
    hook.remove()
    assert len(calls) == 2  # once more in the backward pass
    assert found.keys() == expected.keys() and len(found) == 56
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_a_compiled_training_step_is_one_graph_with_the_same_gradients(mixed):
    tuned = prepared(mixed)
    mlp = tuned.get_base_model().model.layers[0].mlp  # int8, nf4, and an int8 residual
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    x, found = torch.randn(2, 3, 64), []
    for run in (mlp, compiled):
        inputs = x.clone().requires_grad_()
        y = run(inputs)
        y.square().sum().backward()
        found.append([y.detach(), inputs.grad, *(p.grad for p in mlp.parameters() if p.requires_grad)])
        tuned.zero_grad()
    assert len(found[0]) == 2 + 12
    for eager, traced in zip(*found, strict=True):
        assert (traced - eager).norm() <= 1e-4 * eager.norm() and eager.norm() > 0


def test_a_frozen_residual_acts_and_gets_no_gradient(packed):
    model = salr.load(packed, dtype="fp32")
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    tuned = salr.prepare_for_training(model, rank=4, train_residual=False)
    with torch.no_grad():
        assert torch.equal(tuned(input_ids=IDS).logits, before)
    assert len(gradients(tuned)) == 28 and not any("residual" in name for name, _ in tuned.named_parameters())


def test_bfloat16_models_train_float32_factors_unless_told_otherwise(packed, train):
    for autocast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        tuned = salr.prepare_for_training(salr.load(packed), rank=4, autocast_adapter_dtype=autocast)
        trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
        assert len(trained) == 56 and {parameter.dtype for parameter in trained} == {dtype}
        losses = train(tuned, 4)
        assert losses[-1] < losses[0]


def test_a_layer_with_its_adapters_is_one_node_of_autograd(packed):
    layer = lora_layers(prepared(packed))["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 3, 64)
    inputs = [function for function, _ in layer(x).grad_fn.next_functions if function is not None]
    assert [type(function).__name__ for function in inputs] == ["AccumulateGrad"] * 4
    assert not layer.eval().base_layer(x).requires_grad


def test_who_watches_the_packed_layer_sees_it_without_its_adapters(packed):
    layer = lora_layers(prepared(packed))["model.layers.0.self_attn.q_proj"]
    x, seen = torch.randn(2, 3, 64), []
    expected = layer(x)
    hook = layer.base_layer.register_forward_hook(lambda module, inputs, y: seen.append(y))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    hook.remove()
    assert torch.equal(seen[0], layer.base_layer(x)) and not torch.allclose(seen[0], expected, atol=1e-3)


def returned(_, inputs):
    """Return new arguments in the place of all that a module was called with."""
    return (inputs[0],)


def through_accelerate(layer):
    hooks = pytest.importorskip("accelerate.hooks", reason="its hooks take the place of forward")

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, x):
            return (x,), {}

    hooks.add_hook_to_module(layer, Hook())
    return SimpleNamespace(remove=lambda: hooks.remove_hook_from_module(layer))


WATCHED = {
    "before": lambda layer: layer.register_forward_pre_hook(returned),
    "before with options": lambda layer: layer.register_forward_pre_hook(
        lambda _, inputs, options: (inputs[:1], options), with_kwargs=True
    ),
    "before all modules": lambda layer: register_module_forward_pre_hook(
        lambda module, inputs: returned(module, inputs) if module is layer else None
    ),
    "accelerate": through_accelerate,
}


@pytest.mark.parametrize("where", WATCHED)
def test_a_hook_that_gives_the_packed_layer_its_input_loses_no_adapter(packed, where):
    layer = lora_layers(prepared(packed))["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 3, 64)
    expected = layer(x)
    hook = WATCHED[where](layer.base_layer)
    try:
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    finally:
        hook.remove()


def test_hooks_on_all_modules_see_the_packed_layer_without_its_adapters(packed):
    layer = lora_layers(prepared(packed))["model.layers.0.self_attn.q_proj"]
    x, seen = torch.randn(2, 3, 64), []
    hook = register_module_forward_hook(
        lambda module, inputs, y: seen.append((len(inputs), y)) if module is layer.base_layer else None
    )
    try:
        layer(x)
    finally:
        hook.remove()
    ((n_inputs, y),) = seen
    assert n_inputs == 1 and torch.equal(y, layer.base_layer(x))


def test_dropout_acts_on_the_new_adapter_in_training_only(packed):
    tuned = prepared(packed, dropout=0.5)
    layer = lora_layers(tuned)["model.layers.0.self_attn.q_proj"]
    x = torch.randn(4, 64)
    noisy = [layer(x), layer(x)]
    tuned.eval()
    assert not torch.allclose(*noisy) and torch.equal(layer(x), layer(x))
    tuned.train()
    with torch.no_grad():
        layer.lora_B["default"].weight.zero_()
    assert torch.equal(layer(x), layer(x))  # the residual has none
