"""What is made trainable, at which rates, and what is refused."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from salr.formats.errors import AdapterError, OptionError
from transformers import AutoModelForCausalLM

import salr
from salr.runtime import graph_decoding
from salr.training.activations import largest_singular_values

IDS = torch.tensor([[3, 14, 15, 9, 26, 5], [5, 3, 5, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
Q = "model.layers.0.self_attn.q_proj"


def prepared(path, **options):
    torch.manual_seed(0)
    return salr.prepare_for_training(salr.load(path, dtype="fp32"), **{"rank": 4} | options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_the_residual_leaves_the_packed_base_and_acts_as_before(packed):
    expected = logits(salr.load(packed, dtype="fp32"))
    tuned = prepared(packed)
    torch.testing.assert_close(logits(tuned), expected, rtol=1e-5, atol=1e-6)
    layer = tuned.get_base_model().get_submodule(Q)
    assert not [name for name, _ in layer.base_layer.named_buffers() if "residual" in name]
    assert layer.scaling == {"default": 2.0, "residual": 1.0} and layer.lora_alpha["default"] == 8
    trained = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(trained) == 56 and all(".default." in name or ".residual." in name for name in trained)


def test_whichever_adapters_are_chosen_or_disabled_the_residual_acts_and_stays_trainable(packed):
    expected = logits(salr.load(packed, dtype="fp32"))
    tuned = prepared(packed, target=["q_proj"])
    with torch.no_grad():
        tuned.get_base_model().get_submodule(Q).lora_B["default"].weight.fill_(0.1)
    adapted = logits(tuned)
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned), expected, rtol=1e-5, atol=1e-6)
    tuned.set_adapter("default")
    assert torch.equal(logits(tuned), adapted) and not torch.allclose(adapted, expected, atol=1e-3)
    residual = [p for name, p in tuned.named_parameters() if ".residual." in name]
    assert len(residual) == 28 and all(parameter.requires_grad for parameter in residual)
    with torch.no_grad():
        mixed = tuned.eval()(input_ids=IDS, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.stack([expected[0], adapted[1]]), rtol=1e-4, atol=1e-5)
    with tuned.disable_adapter(), torch.no_grad():
        disabled = tuned(input_ids=IDS, adapter_names=["__base__", "default"]).logits
    torch.testing.assert_close(disabled, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prepare", [salr.prepare_for_training, lambda model: get_peft_model(model, LoraConfig(r=2))])
def test_weights_laid_out_for_decoding_are_given_back_and_text_comes_from_the_adapters(packed, monkeypatch, prepare):
    monkeypatch.setattr(graph_decoding, "DEVICES", ("cpu",))
    model = salr.load(packed, dtype="fp32")
    options = {"input_ids": IDS[:1], "max_new_tokens": 4, "do_sample": False}
    before = model.generate(**options)
    decoder = weakref.ref(graph_decoding.decoder_of(model))
    tuned = prepare(model)
    gc.collect()
    assert decoder() is None
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B.default" in name:
                parameter.normal_(std=0.5)
    after = tuned.eval().generate(**options)
    assert not torch.equal(after, before)
    assert torch.equal(after[0, 6:7], logits(tuned)[0, -1:].argmax(-1))


def test_two_runs_are_bitwise_equal_and_learn(packed, train):
    runs = [(tuned := prepared(packed), train(tuned, 6)) for _ in range(2)]
    assert runs[0][1] == runs[1][1] and runs[0][1][-1] < runs[0][1][0] - 0.5
    for first, second in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(first, second)


def test_adamw_gives_the_residual_a_tenth_of_the_rate_unless_told(packed):
    tuned = prepared(packed)
    groups = salr.param_groups(tuned, 1e-3)
    assert [(g["name"], g["lr"], len(g["params"])) for g in groups] == [("adapters", 1e-3, 28), ("residual", 1e-4, 28)]
    assert salr.param_groups(tuned, 1e-3, 5e-4, optimizer="sgd")[1]["lr"] == 5e-4
    frozen = prepared(packed, train_residual=False)
    assert [group["name"] for group in salr.param_groups(frozen, 1e-3)] == ["adapters"]


def test_sgd_gives_each_layer_one_over_the_square_of_its_inputs_largest_singular_value(packed):
    tuned, seen = prepared(packed), {}
    names = [Q, "model.layers.1.mlp.down_proj"]
    for name in names:
        layer = tuned.get_base_model().get_submodule(name)
        layer.register_forward_pre_hook(lambda module, inputs, name=name: seen.__setitem__(name, inputs[0]))
    batch = {"input_ids": IDS, "attention_mask": MASK}
    with torch.no_grad():
        tuned(**batch)
    rows = {name: seen[name][MASK.bool()].clone() for name in names}
    groups = salr.param_groups(tuned, 1e-3, optimizer="sgd", activations=iter([batch]))
    assert len(groups) == 15 and tuned.training
    rates = {group["name"]: group["lr"] for group in groups}
    for name in names:
        expected = 1 / torch.linalg.matrix_norm(rows[name], 2) ** 2
        assert rates[f"residual {name}"] == pytest.approx(float(expected), rel=1e-2)
    twice = largest_singular_values(tuned, [Q], [batch, batch])[Q]
    assert twice**2 == pytest.approx(2 / rates[f"residual {Q}"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": -1.0}, "lr -1.0, needed a finite number, 0 or more"),
        ({"residual_lr": "fast"}, "residual_lr 'fast', needed a finite number, 0 or more, or auto"),
        ({"optimizer": "lion"}, "optimizer 'lion', needed one of adamw, sgd"),
        ({"optimizer": "sgd"}, "residual_lr 'auto' with SGD, needed activations"),
    ],
)
def test_rates_that_make_no_sense_are_refused(packed, arguments, words):
    with pytest.raises(OptionError, match=words):
        salr.param_groups(prepared(packed), **{"lr": 1e-3} | arguments)


def test_a_model_without_anything_trainable_is_refused(packed):
    tuned = prepared(packed)
    tuned.requires_grad_(False)
    with pytest.raises(OptionError, match=r"no trainable parameter; load adapters with is_trainable=True, or prepare"):
        salr.param_groups(tuned, 1e-3)


def test_a_model_that_was_never_prepared_is_refused_packed_or_dense(packed, llama):
    words = r"the model has no adapter of peft; use salr.prepare_for_training or get_peft_model"
    for model in (salr.load(packed), AutoModelForCausalLM.from_pretrained(llama)):
        assert any(parameter.requires_grad for parameter in model.parameters())
        with pytest.raises(AdapterError, match=words):
            salr.param_groups(model, 1e-3)


def test_adapters_of_peft_are_grouped_whatever_they_are_on_and_so_is_what_else_trains(packed, llama):
    dense = AutoModelForCausalLM.from_pretrained(llama)
    wrapped = get_peft_model(dense, LoraConfig(r=2, target_modules=["q_proj"]))
    integrated = salr.load(packed)
    integrated.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    thawed = get_peft_model(salr.load(packed), LoraConfig(r=2, target_modules=["q_proj"]))
    thawed.get_base_model().model.norm.weight.requires_grad_(True)
    compiled = torch.compile(wrapped)
    found = [salr.param_groups(model, 1e-3) for model in (wrapped, integrated, thawed, compiled)]
    assert [[(g["name"], len(g["params"])) for g in groups] for groups in found] == [
        [("adapters", n)] for n in (4, 4, 5, 4)
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank 0, needed 1 or more"),
        ({"rank": 33}, r"k_proj': rank 33, needed at most min\(N, K\) = 32; lower the rank, or leave the layer out"),
        ({"alpha": float("nan")}, "alpha nan, needed a finite number"),
        ({"dropout": 1.0}, "dropout 1.0, needed"),
        ({"name": "residual"}, "adapter name 'residual', needed letters"),
        ({"name": "a.b"}, "adapter name 'a.b', needed letters"),
        ({"target": ["x_proj"]}, r"target \['x_proj'\] fits no layer of LlamaForCausalLM"),
        ({"target": ["q_proj", "x_proj"]}, r"target \['x_proj'\] fits no layer of LlamaForCausalLM"),
        ({"target": "("}, r"target '\(' is no regular expression \(missing \)"),
        (
            {"target": ["q_proj", "lm_head"]},
            "tensor 'lm_head': target .* fits a layer that is not packed, or an expert",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_model_changes(packed, options, words):
    model = salr.load(packed, dtype="fp32")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises((OptionError, AdapterError), match=words):
        salr.prepare_for_training(model, **options)
    assert names == [name for name, _ in model.named_modules()]
    salr.prepare_for_training(model)
    with pytest.raises(AdapterError, match="has adapters of peft already; load it again"):
        salr.prepare_for_training(model)


def test_a_rank_need_fit_the_layers_it_goes_on_only(packed):
    with torch.no_grad():
        tuned = prepared(packed, rank=64, target=["q_proj"])
    assert tuned.get_base_model().get_submodule(Q).lora_A["default"].weight.shape == (64, 64)


def test_a_file_without_residual_says_so(llama, tmp_path):
    salr.convert(llama, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 0), method="magnitude"))
    with pytest.raises(AdapterError, match=r"no residual to train; train LoRA alone .*, or convert again with --rank"):
        prepared(tmp_path / "m.salr")
    assert len(salr.param_groups(prepared(tmp_path / "m.salr", train_residual=False), 1e-3)) == 1


@pytest.mark.parametrize("model", ["moe", "stacked_moe"])
def test_of_a_mixture_everything_but_the_experts_trains(request, model, train, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 2), method="magnitude")
    salr.convert(request.getfixturevalue(model), tmp_path / "m.salr", options)
    tuned = prepared(tmp_path / "m.salr")
    names = {name.partition(".lora_")[0] for name, p in tuned.get_base_model().named_parameters() if p.requires_grad}
    assert len(names) == 8 and all("self_attn" in name for name in names)
    losses = train(tuned)
    assert losses[-1] < losses[0]
    salr.save(tuned, tmp_path / "tuned.salr")
    again = salr.load(tmp_path / "tuned.salr", dtype="fp32")
    torch.testing.assert_close(logits(again), logits(tuned), rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="not packed, or an expert"):
        prepared(tmp_path / "m.salr", target="re.*experts.*|.*experts.*")


def test_a_directory_of_transformers_trains_but_is_no_file_to_save_into(packed, train, tmp_path):
    from salr.converter.export.hf import export_hf

    export_hf(packed, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert model.hf_quantizer.is_trainable
    tuned = salr.prepare_for_training(model, rank=4)
    losses = train(tuned)
    assert losses[-1] < losses[0]
    with pytest.raises(AdapterError, match=r"was loaded from a directory of transformers, needed a .salr file"):
        salr.save(tuned, tmp_path / "o.salr")


def test_without_peft_the_error_says_what_to_install(packed, monkeypatch):
    model = salr.load(packed)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(OptionError, match=r"training without PEFT, needed peft; pip install 'salr\[peft\]'"):
        salr.prepare_for_training(model)
