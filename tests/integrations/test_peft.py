"""LoRA of the peft library on a packed model: training, saving, loading, switching off."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from salr.formats.errors import AdapterError
from transformers import AutoModelForCausalLM

import salr
from salr.integrations.peft_layer import SalrLoraLinear
from salr.runtime.linear import SalrLinear

IDS = torch.tensor([[3, 14, 15, 9, 26, 5]])
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def step(model, n_steps=3):
    """Take a few steps towards fixed labels; return the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.02)
    losses = []
    for _ in range(n_steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture
def model(packed):
    return salr.load(packed, dtype="fp32")


def test_get_peft_model_takes_packed_layers_without_a_word(model):
    before = logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        tuned = get_peft_model(model, LoraConfig(**LORA))
    layers = [module for module in tuned.modules() if isinstance(module, SalrLoraLinear)]
    assert len(layers) == 4 and all(isinstance(layer.get_base_layer(), SalrLinear) for layer in layers)
    assert torch.equal(logits(tuned), before)
    trainable = {name for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 8 and all("lora_" in name and ".default." in name for name in trainable)


def test_training_learns_and_leaves_the_packed_weights_alone(model):
    bytes_before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not [name for name in bytes_before if "lora_" in name]  # older peft saves whatever is called so
    tuned = get_peft_model(model, LoraConfig(**LORA))
    losses = step(tuned, 5)
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer", ""): tensor for name, tensor in tuned.base_model.model.state_dict().items()}
    for name, tensor in bytes_before.items():
        assert torch.equal(after[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_the_gradients_are_those_of_the_dense_model(packed, model, tmp_path):
    salr.unpack(packed, tmp_path / "dense", dtype="fp32")
    found = {}
    for name, base in (("packed", model), ("dense", AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))):
        torch.manual_seed(0)
        tuned = get_peft_model(base, LoraConfig(**LORA))
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.1)
        tuned(input_ids=IDS, labels=IDS).loss.backward()
        found[name] = {key: p.grad for key, p in tuned.named_parameters() if p.grad is not None}
    assert found["packed"].keys() == found["dense"].keys() and len(found["dense"]) == 8
    for key, gradient in found["dense"].items():
        torch.testing.assert_close(found["packed"][key], gradient, rtol=1e-3, atol=1e-5)


def test_an_adapter_can_be_switched_off_saved_and_loaded(packed, model, tmp_path):
    before = logits(model)
    tuned = get_peft_model(model, LoraConfig(**LORA))
    step(tuned)
    after = logits(tuned)
    assert not torch.allclose(after, before, atol=1e-3)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), before)
    tuned.save_pretrained(tmp_path / "adapter")
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 8
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        packed
    )
    again = PeftModel.from_pretrained(salr.load(packed, dtype="fp32"), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), after, rtol=1e-5, atol=1e-6)


def test_a_files_own_adapter_of_the_same_name_stays_out_of_the_saved_one(llama32, lora, tmp_path):
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 2), method="magnitude", adapters=(("default", lora),))
    salr.convert(llama32, tmp_path / "m.salr", options)
    tuned = get_peft_model(salr.load(tmp_path / "m.salr"), LoraConfig(**LORA | {"r": 3}))
    step(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 8 and {min(tensor.shape) for tensor in saved.values()} == {3}


def test_the_state_dict_of_a_wrapped_model_goes_back_in(packed, model):
    tuned, other = (get_peft_model(base, LoraConfig(**LORA)) for base in (model, salr.load(packed, dtype="fp32")))
    step(tuned)
    state = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    other.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits(other), logits(tuned))


def test_transformers_own_way_to_add_an_adapter_works(packed, model, tmp_path):
    tuned = get_peft_model(model, LoraConfig(**LORA))
    step(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    again = salr.load(packed, dtype="fp32")
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), logits(tuned), rtol=1e-5, atol=1e-6)
    again.save_pretrained(tmp_path / "saved")
    assert len(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == 8


def test_all_linear_finds_every_packed_layer(model):
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert len([module for module in tuned.modules() if isinstance(module, SalrLoraLinear)]) == 14
    assert not isinstance(tuned.base_model.model.lm_head, SalrLoraLinear)


def test_a_second_adapter_goes_on_the_same_layers(model):
    tuned = get_peft_model(model, LoraConfig(**LORA))
    tuned.add_adapter("other", LoraConfig(**LORA | {"r": 2}))
    tuned.set_adapter("other")
    layer = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.get_base_layer(), SalrLinear) and set(layer.lora_A) == {"default", "other"}
    step(tuned, 1)


def test_conv1d_layers_take_lora_too(gpt2, tmp_path):
    salr.convert(gpt2, tmp_path / "m.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 2), method="magnitude"))
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    tuned = get_peft_model(salr.load(tmp_path / "m.salr"), config)
    losses = step(tuned, 4)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_needs_the_dense_weight_is_refused(model, options):
    with pytest.raises(AdapterError, match="needs the dense weight; train plain LoRA, or unpack"):
        get_peft_model(model, LoraConfig(**LORA | options))


def test_merging_into_packed_weights_is_refused(model):
    tuned = get_peft_model(model, LoraConfig(**LORA))
    with pytest.raises(AdapterError, match="cannot be merged into packed weights; save it"):
        tuned.merge_and_unload()


def test_a_trainer_of_transformers_accepts_the_model(model, tmp_path):
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    from transformers import Trainer, TrainingArguments

    tuned = get_peft_model(model, LoraConfig(**LORA))
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, report_to=[], use_cpu=True,
        save_steps=2, logging_steps=1, gradient_checkpointing=True, learning_rate=0.02,
    )  # fmt: skip
    trainer = Trainer(tuned, arguments, train_dataset=data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[1] < losses[0]
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    with pytest.raises(ValueError, match=r"(?i)quantized|adapter"):
        Trainer(salr.load(model.name_or_path), arguments, train_dataset=data)


def test_layers_that_are_not_packed_are_adapted_as_ever(llama):
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), LoraConfig(**LORA))
    assert type(tuned.base_model.model.model.layers[0].self_attn.q_proj).__name__ == "Linear"
