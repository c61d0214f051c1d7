"""A whole model on a GPU: what stays on the host, its logits and tokens, and every way to run it."""

from __future__ import annotations

import pytest
import torch

import salr
from salr.runtime import graph_decoding
from salr.runtime.experts import packed_modules

pytestmark = pytest.mark.gpu
SIZES = {
    "vocab_size": 96, "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.fixture(scope="module", params=["LlamaForCausalLM", "Qwen3ForCausalLM"])
def packed(request, tmp_path_factory):
    """Return a .salr file of a random model whose layers can be stacked."""
    import transformers

    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model_class = getattr(transformers, request.param)
    config = model_class.config_class(**SIZES, eos_token_id=None, initializer_range=0.08)
    model_class(config).to(torch.bfloat16).save_pretrained(folder / "dense")
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 16), method="magnitude")
    salr.convert(folder / "dense", folder / "m.salr", options)
    return folder / "m.salr"


def prompts(batch, length):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(length))


def exact(packed, ids):
    """Return float32 logits computed on the CPU by the reference."""
    with torch.no_grad():
        return salr.load(packed, dtype="fp32", backend="reference")(ids).logits


def error(got, expected):
    return float((got.float().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("how", ["device", "to"])
def test_packed_tensors_stay_on_the_host_and_the_layout_alone_is_on_the_gpu(packed, how):
    model = salr.load(packed, device="cuda") if how == "device" else salr.load(packed).to("cuda")
    for _, module in packed_modules(model):
        assert all(tensor.device.type == "cpu" for tensor in module.buffers())
        assert module.compute_device.type == "cuda"
    assert all(parameter.device.type == "cuda" for parameter in model.parameters())
    ids = prompts(2, 9)
    with torch.no_grad():
        assert error(model(ids.cuda()).logits, exact(packed, ids)) < 3e-2
    on_host = {name: tensor.shape for name, tensor in salr.load(packed).state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == on_host


@pytest.mark.parametrize("batch", [1, 3, 32])
def test_a_captured_step_gives_the_models_logits(packed, batch):
    model, ids = salr.load(packed, device="cuda"), prompts(batch, 30)
    session = graph_decoding.decoder_of(model).session(batch, 40)
    logits = [session.read(ids[:, :20].cuda()).clone()]
    for t in range(20, 30):
        session.tokens.copy_(ids[:, t])
        logits.append(session.step().clone())
    assert error(torch.stack(logits, 1), exact(packed, ids)[:, 19:]) < 3e-2


def test_prompts_of_many_rows_are_read_alike(packed):
    model, ids = salr.load(packed, device="cuda"), prompts(2, 400)
    session = graph_decoding.decoder_of(model).session(2, 410)
    assert error(session.read(ids.cuda()), exact(packed, ids)[:, -1]) < 3e-2


def test_padded_prompts_are_read_as_if_they_stood_alone(packed):
    model, ids = salr.load(packed, device="cuda"), prompts(2, 12)
    ids[1, :5] = 0
    session = graph_decoding.decoder_of(model).session(2, 20)
    got = session.read(ids.cuda(), [0, 5]).clone()
    assert error(got[0], exact(packed, ids[:1])[0, -1]) < 3e-2
    assert error(got[1], exact(packed, ids[1:, 5:])[0, -1]) < 3e-2
    session.tokens.copy_(torch.tensor([7, 8]))
    after = session.step()
    assert error(after[1], exact(packed, torch.cat([ids[1:, 5:], torch.tensor([[8]])], 1))[0, -1]) < 3e-2


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_tokens_are_the_likeliest_within_rounding(packed, batch):
    model, ids = salr.load(packed, device="cuda"), prompts(batch, 8)
    graph = graph_decoding.decoder_of(model)
    got = model.generate(ids.cuda(), max_new_tokens=24, do_sample=False, pad_token_id=0).cpu()
    assert graph_decoding.decoder_of(model) is graph and graph.session(batch, 32).cache.capacity == 256
    logits = exact(packed, got)[:, 7:-1]
    chosen = logits.gather(2, got[:, 8:, None])[..., 0]
    assert got.shape == (batch, 32)
    assert (logits.max(-1).values - chosen <= 0.1 * logits.std(-1)).all()
    again = model.generate(ids.cuda(), max_new_tokens=24, do_sample=False, pad_token_id=0).cpu()
    assert torch.equal(got, again)


def test_sampling_follows_its_seed(packed):
    model, drawn = salr.load(packed, device="cuda"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5, "pad_token_id": 0}
        drawn.append(model.generate(prompts(2, 5).cuda(), **options))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_gradients_flow_to_x_past_weights_on_the_host(packed):
    model = salr.load(packed, device="cuda")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features)
    ours = x.to("cuda", torch.bfloat16).requires_grad_()
    layer(ours).float().pow(2).sum().backward()
    theirs = x.clone().requires_grad_()
    salr.load(packed, dtype="fp32").model.layers[0].mlp.up_proj(theirs).pow(2).sum().backward()
    assert error(ours.grad, theirs.grad) < 3e-2


def test_a_device_map_keeps_packed_tensors_on_the_host_too(packed):
    pytest.importorskip("accelerate", reason="device_map needs accelerate")
    model, ids = salr.load(packed, device_map="cuda"), prompts(1, 6)
    assert all(module.values.device.type == "cpu" for _, module in packed_modules(model))
    with torch.no_grad():
        assert error(model(ids.cuda()).logits, exact(packed, ids)) < 3e-2


def test_float32_activations_are_left_to_the_reference_with_a_warning(packed):
    from salr.runtime import backends

    backends._warn.cache_clear()
    with pytest.warns(UserWarning, match="does not take activations in float32"):
        model = salr.load(packed, device="cuda", dtype="fp32")
    ids = prompts(1, 6)
    with torch.no_grad():
        assert error(model(ids.cuda()).logits, exact(packed, ids)) < 1e-4


def test_torch_compile_takes_products_forward_and_backward(packed):
    model = salr.load(packed, device="cuda")
    mlp = model.model.layers[0].mlp
    x = torch.randn(5, mlp.up_proj.in_features, device="cuda", dtype=torch.bfloat16)
    found = []
    for run in (mlp, torch.compile(mlp, fullgraph=True)):
        wanting = x.clone().requires_grad_()
        y = run(wanting)
        y.float().pow(2).sum().backward()
        found.append((y.detach(), wanting.grad))
    for eager, compiled in zip(*found, strict=True):
        assert error(compiled.cpu(), eager.cpu()) < 2e-2


def test_a_model_runs_on_another_gpu_than_the_current_one(packed):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ids = prompts(2, 300)
    models = [salr.load(packed, device=f"cuda:{i}") for i in (0, 1)]
    for model in models:
        with torch.no_grad():
            assert error(model(ids.to(model.device)).logits, exact(packed, ids)) < 3e-2
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    first, second = (model.generate(ids[:1, :8].to(model.device), **options).cpu() for model in models)
    assert torch.equal(first, second)
    layer = models[1].model.layers[0].mlp.up_proj
    x = torch.randn(300, layer.in_features, device="cuda:1", dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().pow(2).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.any()
