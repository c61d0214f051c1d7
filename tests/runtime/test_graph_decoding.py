"""A decoder computes what its transformers model computes, and generates the same tokens; here on the CPU."""

from __future__ import annotations

import pytest
import torch

import salr
from salr.runtime import decoder as decoding
from salr.runtime import graph_decoding
from salr.runtime.llama import read_model, reason_not_read

SERVED = ["llama2", "llama3", "mistral", "qwen2", "qwen3"]


@pytest.fixture
def load(convert_random, monkeypatch):
    """Return a function: architecture -> the loaded model, which decodes on the CPU as it does on a GPU."""
    monkeypatch.setattr(graph_decoding, "DEVICES", ("cpu",))
    return lambda name, **options: salr.load(convert_random(name)[0], **options)


def prompts(batch, length, seed=0):
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("length", [1, 5, 24])
def test_logits_after_a_prompt_and_after_each_token_are_the_models(load, name, length):
    model, ids = load(name), prompts(2, length + 4)
    decoder = read_model(model)
    cache = decoding.StaticCache.empty(decoder, 2, 32)
    logits = [decoding.read_prompt(decoder, cache, ids[:, :length])]
    starts = torch.zeros(2, dtype=torch.int32)
    for t in range(length, length + 4):
        logits.append(decoding.step(decoder, cache, ids[:, t], torch.full((2,), t, dtype=torch.int32), starts))
    with torch.no_grad():
        expected = model(ids).logits[:, length - 1 :]
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama2", "qwen3"])
def test_padded_prompts_are_read_as_if_they_stood_alone(load, name):
    model, long, short = load(name), prompts(1, 9, 1), prompts(1, 4, 2)
    decoder = read_model(model)
    cache = decoding.StaticCache.empty(decoder, 2, 32)
    together = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    got = [decoding.read_prompt(decoder, cache, together, [0, 5])]
    after = torch.tensor([7, 8])
    slots, starts = torch.tensor([9, 9], dtype=torch.int32), torch.tensor([0, 5], dtype=torch.int32)
    got.append(decoding.step(decoder, cache, after, slots, starts))
    for s, alone in enumerate((long, short)):
        with torch.no_grad():
            expected = model(torch.cat([alone, after[s : s + 1, None]], 1)).logits[0, -2:]
        torch.testing.assert_close(torch.stack([g[s] for g in got]), expected, rtol=1e-4, atol=1e-5)


def own(model, **options):
    """Return what transformers' own loop generates."""
    return type(model).generate(model, **options)


def counting(monkeypatch):
    calls = []
    step = graph_decoding.Session.step
    monkeypatch.setattr(graph_decoding.Session, "step", lambda self: calls.append(1) or step(self))
    return calls


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_generation_gives_transformers_own_tokens(load, monkeypatch, name, batch):
    model, calls = load(name), counting(monkeypatch)
    ids = prompts(batch, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0 if batch > 1 else 1
    options = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    got = model.generate(**options)
    written = got.shape[1] - 6
    n_steps = written - (written == 12)  # a step begins before an end token is seen
    assert len(calls) == n_steps > 1 and torch.equal(got, own(model, **options))
    assert len(calls) == n_steps


def test_sampling_draws_the_same_tokens_as_transformers_from_one_seed(load, monkeypatch):
    model, calls = load("llama2"), counting(monkeypatch)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2, "pad_token_id": 0}
    options |= {"input_ids": prompts(2, 5), "max_new_tokens": 10}
    drawn = []
    for run in (model.generate, lambda **options: own(model, **options)):
        torch.manual_seed(3)
        drawn.append(run(**options))
    assert calls and torch.equal(*drawn)


def test_generation_stops_at_an_end_token_and_pads_sequences_that_ended(load):
    model, ids = load("llama2"), prompts(3, 5)
    free = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    end = int(free[1, 7])
    options = {"input_ids": ids, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": end}
    got = model.generate(**options)
    assert torch.equal(got, own(model, **options)) and (got[1, 8:] == 1).all()


def test_a_streamer_gets_each_token_once_and_the_end(load):
    class Streamer:
        def __init__(self):
            self.got, self.ended = [], 0

        def put(self, value):
            self.got += value.flatten().tolist()

        def end(self):
            self.ended += 1

    model, streamer = load("llama2"), Streamer()
    output = model.generate(prompts(1, 4), max_new_tokens=6, do_sample=False, streamer=streamer, pad_token_id=0)
    assert streamer.got == output[0].tolist() and streamer.ended == 1


def test_what_is_not_served_is_left_to_transformers(load, monkeypatch):
    model, calls = load("llama2"), counting(monkeypatch)
    options = {"input_ids": prompts(1, 4), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(num_beams=2, **options), own(model, num_beams=2, **options))
    asked = options | {"return_dict_in_generate": True}
    assert torch.equal(model.generate(**asked).sequences, own(model, **asked).sequences)
    right = torch.tensor([[1, 1, 1, 0]])
    assert torch.equal(model.generate(attention_mask=right, **options), own(model, attention_mask=right, **options))
    assert not calls


@pytest.mark.parametrize(("name", "reason"), [("gemma", "GemmaForCausalLM"), ("mixtral", "Mixtral"), ("phi", "Phi")])
def test_other_models_are_refused_with_a_reason_and_still_generate(load, monkeypatch, name, reason):
    model, calls = load(name), counting(monkeypatch)
    assert reason in reason_not_read(model)
    assert model.generate(prompts(1, 4), max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (1, 6)
    assert not calls


def test_a_hooked_projection_is_left_to_transformers(load):
    model = load("llama2")
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: None)
    assert "up_proj" in reason_not_read(model)


def test_a_changed_model_gets_a_new_decoder_and_an_unchanged_one_keeps_it(load):
    model = load("llama2")
    first = graph_decoding.decoder_of(model)
    assert graph_decoding.decoder_of(model) is first
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    second = graph_decoding.decoder_of(model)
    assert second is not first
    model.set_adapters({})
    assert graph_decoding.decoder_of(model) is not second
    model.train()
    assert graph_decoding.decoder_of(model) is None


def test_a_session_is_kept_while_it_suffices(load):
    graph = graph_decoding.decoder_of(load("llama2"))
    session = graph.session(2, 40)
    assert session.cache.capacity == 256 and graph.session(2, 200) is session
    assert graph.session(2, 257) is not session and graph.session(1, 10).tokens.shape == (1,)


@pytest.mark.parametrize(
    ("mask", "found"),
    [
        (None, []),
        ([[1, 1], [1, 1]], [0, 0]),
        ([[0, 1], [1, 1]], [1, 0]),
        ([[1, 0], [1, 1]], None),
        ([[0, 0], [1, 1]], None),
        ([[[1]]], None),
    ],
)
def test_only_padding_on_the_left_is_served(mask, found):
    assert graph_decoding.n_left_padding(None if mask is None else torch.tensor(mask)) == found
