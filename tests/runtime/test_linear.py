"""SalrLinear and SalrStack: products of every encoding, adapters, devices and dtypes, gradients, and tracing."""

from __future__ import annotations

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from salr.formats.reader import SalrFile
from salr.formats.values import ENCODINGS

from salr.runtime.errors import LoadError
from salr.runtime.experts import SalrStack
from salr.runtime.layout import buffer_name, module_layout
from salr.runtime.linear import SalrLinear
from salr.runtime.mapped import mapped_tensor

Q, UP, DOWN, STACK = "layers.0.attn.q", "layers.0.mlp.up", "layers.0.mlp.down", "layers.1.experts.up"
FLAT = ["layers.0.attn.k", Q, DOWN, "layers.0.mlp.gate", UP]


def filled(file, name, bias=None):
    """Return the module of the file with its tensors, mapped."""
    layout = module_layout(name, file.modules[name], file.tensors)
    module = SalrLinear(layout, bias) if len(layout.entry.shape) == 2 else SalrStack(layout)
    state = {buffer_name(spec.name): mapped_tensor(file, f"{name}.{spec.name}") for spec in layout.tensors}
    module.load_state_dict(state, assign=True, strict=bias is None)
    return module


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def file(golden):
    return SalrFile(golden)


def dense(file, name, **chosen):
    return torch.from_numpy(file.dense(name, **{"residual": True, "adapters": True} | chosen))


def test_the_golden_file_has_every_encoding(file):
    assert {file.modules[name].encoding for name in FLAT} == set(ENCODINGS)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 5), (2, 1, 3), (0,), (2, 0)])
def test_the_product_is_that_of_the_dense_matrix_for_any_batch_shape(file, name, shape):
    layer, weight = filled(file, name), dense(file, name)
    x = torch.randn(*shape, layer.in_features)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    assert layer(x).shape == (*shape, layer.out_features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_result_has_the_dtype_of_x(file, dtype):
    layer, weight, x = filled(file, Q), dense(file, Q), torch.randn(4, 9).to(dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), (x.float() @ weight.T).to(dtype))


def test_a_bias_is_added_and_may_learn(file):
    bias = torch.nn.Parameter(torch.arange(5.0))
    layer, x = filled(file, Q, bias), torch.randn(3, 9)
    torch.testing.assert_close(layer(x), x @ dense(file, Q).T + bias)
    layer(x).sum().backward()
    assert bias.grad.tolist() == [3.0] * 5
    with torch.no_grad():
        torch.testing.assert_close(layer(x), x @ dense(file, Q).T + bias)


def test_x_that_is_not_contiguous_is_taken(file):
    x = torch.randn(9, 4)
    torch.testing.assert_close(filled(file, Q)(x.T), x.T @ dense(file, Q).T, rtol=1e-5, atol=1e-4)


def test_a_wrong_width_is_told(file):
    with pytest.raises(ValueError, match="x has 8 columns, the weight 9"):
        filled(file, Q)(torch.randn(2, 8))


@pytest.mark.parametrize("name", [*FLAT, STACK])
def test_packed_tensors_keep_their_bytes_whatever_dtype_is_asked_for(file, name):
    module = filled(file, name)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        module.to(dtype)
    after = module.half().state_dict()
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert tensor.dtype == before[key].dtype
        assert tensor.flatten().view(torch.uint8).equal(before[key].flatten().view(torch.uint8))


def test_a_bias_follows_the_dtype(file):
    layer = filled(file, Q, torch.nn.Parameter(torch.zeros(5))).to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16 and layer.factor_A.get_buffer("style").dtype == torch.float32


def test_another_device_takes_all_tensors_along(file):
    layer = filled(file, UP).to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    assert layer(torch.randn(2, 10, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("name", FLAT)
def test_a_state_dict_fills_another_module(file, name):
    first = filled(file, name)
    second = SalrLinear(module_layout(name, file.modules[name], file.tensors), device="cpu")
    x = torch.randn(2, first.in_features)
    for tensor in second.buffers():
        tensor.zero_()
    assert second(x).count_nonzero() == 0  # and scales are derived, which must not outlive the loading
    second.load_state_dict({key: tensor.clone() for key, tensor in first.state_dict().items()})
    torch.testing.assert_close(second(x), first(x))


def through_torch_save(module):
    stream = io.BytesIO()  # plain pickle does not know torch.uint64
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_torch_save])
def test_a_copy_computes_the_same_and_is_independent(file, duplicate):
    layer, x = filled(file, Q), torch.randn(2, 9)
    expected = layer(x)
    other = duplicate(layer)
    layer.set_adapters({})
    assert torch.equal(other(x), expected) and not torch.equal(layer(x), expected)


def test_adapters_are_switched_and_scaled_and_the_residual_stays(file):
    layer, x = filled(file, Q), torch.randn(3, 9)
    base, both = dense(file, Q, adapters=False), dense(file, Q)
    for scales, weight in (({}, base), ({"style": 1.0}, both), ({"style": -2.0}, base - 2 * (both - base))):
        layer.set_adapters(scales)
        torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-4)
    assert layer.adapter_names == ("style",)


def test_one_float_adapter_is_used_where_it_lies(file):
    layer = filled(file, Q)
    layer.set_adapters({})
    adapters = layer.matrices()[0].adapters
    assert adapters.lora_A.data_ptr() == layer.factor_A.get_buffer("residual").data_ptr()
    assert layer.matrices()[0].weight.values.data_ptr() == layer.values.data_ptr()


def test_int8_factors_are_widened_exactly(file):
    adapters = filled(file, UP).matrices()[0].adapters
    assert adapters.lora_A.dtype == torch.bfloat16
    assert np.array_equal(adapters.lora_A.float().numpy(), file.tensor(f"{UP}.lora_A.residual").astype(np.float32))
    assert adapters.scaling.tolist() == [0.5, 0.125]


@pytest.mark.parametrize("name", FLAT)
def test_the_gradient_of_x_is_that_of_the_dense_matrix(file, name):
    layer, weight = filled(file, name), dense(file, name)
    x = torch.randn(2, 3, layer.in_features, requires_grad=True)
    towards = torch.randn(2, 3, layer.out_features) * (1e-30 if name.endswith("gate") else 1)
    found, expected = (torch.autograd.grad((y * towards).sum(), x)[0] for y in (layer(x), x @ weight.T))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not any(tensor.requires_grad for tensor in layer.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("name", FLAT)
def test_compiled_and_exported_it_is_one_operator_with_the_same_result(file, name):
    layer, weight = filled(file, name), dense(file, name)
    x = torch.randn(4, layer.in_features)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), x @ weight.T, rtol=1e-5, atol=1e-5)
    wanting = x.clone().requires_grad_()
    compiled(wanting).sum().backward()
    torch.testing.assert_close(wanting.grad, weight.sum(0).expand(4, -1), rtol=1e-5, atol=1e-5)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},))
    calls = [node for node in program.graph.nodes if node.target is torch.ops.salr.linear.default]
    assert len(calls) == 1 and {*program.state_dict} == {*layer.state_dict()}
    x = torch.randn(7, layer.in_features)
    torch.testing.assert_close(program.module()(x), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_the_operator_keeps_torchs_rules(file):
    matrix = filled(file, UP).matrices()[0]
    weight, adapters = matrix.weight, matrix.adapters
    arguments = (
        torch.randn(2, 10, requires_grad=True), weight.values, weight.bitmap, weight.row_offsets, weight.scales,
        adapters.lora_A, adapters.lora_B, adapters.scaling, 3, 10, 10, "int8", "unstructured", 4, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.salr.linear.default, arguments)


def test_stacked_experts_are_computed_one_by_one(file):
    stack, weight, x = filled(file, STACK), dense(file, STACK), torch.randn(4, 10)
    for expert in range(2):
        torch.testing.assert_close(stack(x, expert), x @ weight[expert].T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("encoding", ["nf4", "int8", "fp32"])
def test_an_expert_may_begin_in_the_middle_of_a_byte(encoding):
    from salr.formats.bitmap import pack_bitmap, row_offsets
    from salr.formats.manifest import ModuleEntry
    from salr.formats.module import ModuleTensors
    from salr.formats.values import encode_quantized, pad_values

    from salr.runtime.matrix import split
    from salr.runtime.packed import PackedWeight
    from salr.runtime.reference import dense as decode

    rng = np.random.default_rng(0)
    mask = rng.random((3, 5, 11)) < 0.5
    mask[0].flat[: 1 - int(mask[0].sum()) % 2] ^= True  # an odd number in the first expert
    assert mask[0].sum() % 2 == 1
    nnz, bitmap = int(mask.sum()), pack_bitmap(mask)
    values = rng.standard_normal(nnz).astype(np.float32)
    quantized = encoding != "fp32"
    codes = encode_quantized(values, np.full(nnz, 0.5, np.float32), encoding) if quantized else values
    scales = rng.random((3, 5, 3)).astype(np.float32) if quantized else None
    entry = ModuleEntry(
        "m", (3, 5, 11), False, (3, 5, 11), "F32", nnz, "unstructured", encoding, "refit",
        group_size=4 if quantized else None,
    )  # fmt: skip
    tensors = ModuleTensors(entry, pad_values(codes, encoding, nnz), bitmap, row_offsets(bitmap), scales)
    whole = PackedWeight.from_module(tensors)
    for expert, part in enumerate(split(whole, entry.shape)):
        np.testing.assert_array_equal(decode(part).numpy(), tensors.dense()[expert])
        assert part.values.numel() * part.values.element_size() >= 64


def test_the_representation_says_what_the_layer_is(file):
    assert repr(filled(file, Q)).splitlines()[1].strip() == (
        "in_features=9, out_features=5, sparsity=0.64, rank=residual 2 + style 1, encoding=bf16, bias=False"
    )
    assert "experts=2, in_features=10, out_features=3, sparsity=0.70" in repr(filled(file, STACK))


def test_the_placeholder_of_the_weight_takes_no_memory_and_computes_nothing_plausible(file):
    weight = filled(file, Q).weight
    assert weight.shape == (5, 9) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    assert filled(file, Q).to(torch.float32).weight.dtype == torch.float32
    assert weight.untyped_storage().nbytes() == 2 and (torch.ones(1, 9, dtype=torch.bfloat16) @ weight.T).isnan().all()


def test_an_adapter_named_as_a_method_of_torch_is_refused_by_name(file):
    layout = module_layout(Q, file.modules[Q], file.tensors)
    tensors = tuple(replace(spec, name=spec.name.replace("style", "train")) for spec in layout.tensors)
    with pytest.raises(LoadError, match="an adapter is called 'train', a name that torch modules use themselves"):
        SalrLinear(replace(layout, tensors=tensors))
