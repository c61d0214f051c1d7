"""The operations between linears: their torch twins equal transformers' modules, and kernels equal their twins."""

from __future__ import annotations

import pytest
import torch

from salr.runtime import layer_operations as twins
from tests.cuda.matrices import DEVICE

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture
def kernels():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    from salr.cuda import operations

    return operations


def config(**changes):
    import transformers

    settings = {"hidden_size": 256, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2,
                "num_hidden_layers": 1, "vocab_size": 32, "max_position_embeddings": 64}  # fmt: skip
    return transformers.LlamaConfig(**(settings | changes))


def normal(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.randn(*shape, device=device).to(dtype)


def tables(head_columns, dtype, device="cpu", n=64):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = config(hidden_size=4 * head_columns)
    cos, sin = LlamaRotaryEmbedding(sizes).to(device)(torch.empty(0, dtype=dtype, device=device),
                                                       torch.arange(n, device=device)[None])  # fmt: skip
    half = head_columns // 2
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_the_twin_of_add_norm_is_llamas_own_sum_and_norm(dtype):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(72, eps=1e-5).to(dtype)
    norm.weight.data = normal(72, dtype=dtype)
    x, residual = normal(5, 72, dtype=dtype), normal(5, 72, dtype=dtype)
    summed, normed = twins.add_norm(x, residual, norm.weight, 1e-5)
    assert torch.equal(summed, residual + x) and torch.equal(normed, norm(residual + x))
    alone, normed = twins.add_norm(x, None, norm.weight, 1e-5)
    assert alone is x and torch.equal(normed, norm(x))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_the_twin_of_gated_is_llamas_own_activation(dtype):
    from transformers.activations import ACT2FN

    gate, up = normal(3, 40, dtype=dtype), normal(3, 40, dtype=dtype)
    expected = ACT2FN["silu"](gate) * up
    got = twins.gated(torch.cat([gate, up], 1))
    # torch's own float32 exponential differs in the last place between whole vectors and the rest of a row
    assert torch.equal(got, expected) if dtype in DTYPES else torch.allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_the_twin_of_rotary_is_llamas_own_embedding_and_fills_the_cache(dtype):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    sequences, rows, heads, kv, d = 2, 3, 4, 2, 16
    qkv = normal(sequences * rows, (heads + 2 * kv) * d, dtype=dtype)
    slots, starts = torch.tensor([4, 7], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    k, v = (torch.zeros(sequences, kv, 12, d, dtype=dtype) for _ in range(2))
    got = twins.rotary(qkv, *tables(d, dtype), k, v, slots, starts)
    positions = torch.tensor([[4, 5, 6], [5, 6, 7]])
    cos, sin = LlamaRotaryEmbedding(config(hidden_size=4 * d))(qkv, positions)
    q, new_k, new_v = (part.view(sequences, rows, -1, d).transpose(1, 2)
                       for part in qkv.split([heads * d, kv * d, kv * d], 1))  # fmt: skip
    q, new_k = apply_rotary_pos_emb(q, new_k, cos, sin)
    assert torch.equal(got.view(sequences, rows, heads, d), q.transpose(1, 2))
    for s in range(2):
        at = slice(int(slots[s]), int(slots[s]) + rows)
        assert torch.equal(k[s, :, at], new_k[s]) and torch.equal(v[s, :, at], new_v[s])
        assert not k[s, :, : at.start].any() and not k[s, :, at.stop :].any()


def close(got, expected, ulps=1):
    """Compare 16-bit results with at most ``ulps`` units of the last place of the larger one between them."""
    unit = torch.finfo(expected.dtype).eps * expected.float().abs().clamp_min(1e-3)
    difference = (got.float() - expected.float()).abs()
    assert torch.isfinite(got).all() and (difference <= ulps * unit).all(), (difference / unit).max().item()


@pytest.mark.gpu
@pytest.mark.emulated(hidden=[576], rows=[2, 9])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [8, 576, 4096, 8192, 14336])
@pytest.mark.parametrize("rows", [1, 2, 9, 33])
def test_add_norm_equals_llamas_own_modules(kernels, dtype, hidden, rows):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(hidden, eps=1e-5).to(DEVICE, dtype)
    norm.weight.data = normal(hidden, dtype=dtype, device=DEVICE)
    x, residual = (normal(rows, hidden, dtype=dtype, device=DEVICE) for _ in range(2))
    summed, normed = kernels.add_norm(x, residual, norm.weight, 1e-5)
    assert torch.equal(summed, residual + x)
    # The sum of squares is added in another order: a factor one unit off may round each of two products differently.
    close(normed, norm(residual + x), ulps=2)
    alone, normed = kernels.add_norm(x, None, norm.weight, 1e-5)
    assert alone.data_ptr() == x.data_ptr()
    close(normed, norm(x), ulps=2)


@pytest.mark.gpu
@pytest.mark.emulated(rows=[])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (5, 1536), (32, 14336), (300, 2056)])
def test_gated_equals_llamas_own_activation(kernels, dtype, rows, columns):
    gate_up = normal(rows, 2 * columns, dtype=dtype, device=DEVICE) * 4
    close(kernels.gated(gate_up), twins.gated(gate_up))


@pytest.mark.gpu
@pytest.mark.emulated(d=[])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128, 256])
@pytest.mark.parametrize(("heads", "kv", "sequences", "rows"), [(4, 2, 3, 1), (7, 1, 2, 5), (32, 8, 1, 1)])
@pytest.mark.parametrize("with_norms", [False, True])
def test_rotary_equals_its_twin_and_leaves_other_slots_alone(kernels, dtype, d, heads, kv, sequences, rows, with_norms):
    torch.manual_seed(heads)
    qkv = normal(sequences * rows, (heads + 2 * kv) * d, dtype=dtype, device=DEVICE)
    slots = torch.randint(0, 20, (sequences,), dtype=torch.int32, device=DEVICE)
    starts = torch.minimum(slots, torch.tensor(3, device=DEVICE, dtype=torch.int32))
    caches = [[torch.full((sequences, kv, 40, d), torch.nan, dtype=dtype, device=DEVICE) for _ in "kv"] for _ in "ab"]
    norms = (normal(d, dtype=dtype, device=DEVICE), normal(d, dtype=dtype, device=DEVICE), 1e-6) if with_norms else None
    both = [
        module.rotary(qkv, *tables(d, dtype, DEVICE), *cache, slots, starts, norms)
        for module, cache in zip((kernels, twins), caches, strict=True)
    ]
    for got, expected in zip([both[0], *caches[0]], [both[1], *caches[1]], strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
        got, expected = got.nan_to_num(), expected.nan_to_num()
        if with_norms:
            torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2)
        else:
            assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.emulated(dtype=[torch.bfloat16], d=[64], sequences=[1, 3], capacity=[300], heads=[14])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("d", "heads", "kv"), [(128, 32, 8), (64, 14, 2), (128, 8, 8), (256, 8, 1), (64, 24, 8)])
@pytest.mark.parametrize("sequences", [1, 3, 32])
@pytest.mark.parametrize(("capacity", "window"), [(40, None), (300, None), (2048, None), (300, 17), (300, 100)])
def test_attention_equals_float32_attention(kernels, dtype, d, heads, kv, sequences, capacity, window):
    torch.manual_seed(capacity + sequences)
    q = normal(sequences, heads, d, dtype=dtype, device=DEVICE)
    k, v = (normal(sequences, kv, capacity, d, dtype=dtype, device=DEVICE) for _ in range(2))
    slots = torch.randint(0, capacity, (sequences,), dtype=torch.int32, device=DEVICE)
    slots[0], starts = capacity - 1, slots // 3
    for s in range(sequences):  # what is not in use must not matter
        k[s, :, : starts[s]] = v[s, :, : starts[s]] = torch.nan
        k[s, :, slots[s] + 1 :] = v[s, :, slots[s] + 1 :] = torch.nan
    got = kernels.attend(q, k, v, slots, starts, window)
    clean = [cache.nan_to_num().float() for cache in (k, v)]
    expected = twins.attend(q.float(), *clean, slots, starts, window)
    torch.testing.assert_close(got.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)
    again = [kernels.attend(q, k, v, slots, starts, window) for _ in range(20)]
    assert all(torch.equal(y, got) for y in again)


@pytest.mark.gpu
def test_a_captured_step_follows_slots_that_change_on_the_device(kernels):
    d, heads, kv, capacity = 128, 8, 2, 96
    qkv = normal(2, (heads + 2 * kv) * d, device=DEVICE)
    cos, sin = tables(d, torch.bfloat16, DEVICE, capacity)
    k, v = (torch.zeros(2, kv, capacity, d, dtype=torch.bfloat16, device=DEVICE) for _ in "kv")
    slots, starts = torch.tensor([5, 9], dtype=torch.int32, device=DEVICE), torch.zeros(2, dtype=torch.int32).to(DEVICE)

    def step(module, k, v, slots):
        q = module.rotary(qkv, cos, sin, k, v, slots, starts)
        return module.attend(q, k, v, slots, starts)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(kernels, k.clone(), v.clone(), slots)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = step(kernels, k, v, slots)
            slots += 1
    other_k, other_v, other_slots = k.clone(), v.clone(), slots.clone()
    for _ in range(40):
        graph.replay()
        expected = step(twins, other_k, other_v, other_slots)
        other_slots += 1
    assert torch.equal(slots, other_slots) and torch.equal(k, other_k) and torch.equal(v, other_v)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((4096, 14336, 128, 4, torch.bfloat16), None),
        ((4096, 14336, 128, 4, torch.float32), "float32"),
        ((4100, 14336, 128, 4, torch.bfloat16), "multiples of 8"),
        ((4096, 14336, 80, 4, torch.float16), "80 columns"),
        ((4096, 14336, 128, 16, torch.float16), "at most 8"),
    ],
)
def test_sizes_without_kernels_are_told(kernels, sizes, reason):
    found = kernels.reason_not_taken(*sizes)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("file", ["add_norm.cu", "add_norm_beside.cu", "rotary.cu", "gated.cu", "attend.cu"])
@pytest.mark.parametrize("half", [0, 1])
def test_every_shape_of_a_kernel_compiles_for_the_oldest_and_the_newest_target(kernels, file, half):
    from salr.cuda.compilation import TARGETS, cubin

    shapes = {
        "add_norm.cu": [{"CHUNKS": 1}, {"CHUNKS": 4}],
        "add_norm_beside.cu": [{}],
        "rotary.cu": [{"HEAD_COLUMNS": d} for d in (64, 128, 256)],
        "gated.cu": [{}],
        "attend.cu": [
            {"HEAD_COLUMNS": 128, "GROUP": 4, "WARPS": 8},
            {"HEAD_COLUMNS": 64, "GROUP": 7, "WARPS": 8},
            {"HEAD_COLUMNS": 256, "GROUP": 8, "WARPS": 4},
        ],
    }
    for definitions in shapes[file]:
        for target in (TARGETS[file][0], TARGETS[file][-1]):
            assert cubin(file, (("HALF", half), *definitions.items()), target)[:4] == b"\x7fELF"
