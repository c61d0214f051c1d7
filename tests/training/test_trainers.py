"""Trainers of other libraries take the models unchanged: transformers' Trainer, and TRL's where it is installed."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import salr

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

DATA = [{"input_ids": torch.arange(i, i + 6), "labels": torch.arange(i, i + 6)} for i in range(1, 13)]


def arguments(folder, **options):
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, learning_rate=0.02, logging_steps=1,
        save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip


def prepared(path):
    torch.manual_seed(0)
    return salr.prepare_for_training(salr.load(path, dtype="fp32"), rank=2)


def trained(trainer, **options):
    """Train; return the losses and the trainable parameters."""
    trainer.train(**options)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def with_groups(tuned, folder):
    optimizer = torch.optim.AdamW(salr.param_groups(tuned, 0.02))
    return transformers.Trainer(tuned, arguments(folder), train_dataset=DATA, optimizers=(optimizer, None))


def test_the_trainer_trains_both_adapters_at_their_rates_and_resumes_to_the_same_weights(packed, tmp_path):
    losses, weights = trained(with_groups(prepared(packed), tmp_path))
    assert losses[-1] < losses[0] and len(weights) == 56
    _, resumed = trained(with_groups(prepared(packed), tmp_path), resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weight) for name, weight in weights.items())


def test_a_directory_of_transformers_trains_with_peft_and_the_trainer(packed, tmp_path):
    from salr.converter.export.hf import export_hf

    export_hf(packed, tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    losses, weights = trained(transformers.Trainer(tuned, arguments(tmp_path / "out"), train_dataset=DATA))
    assert losses[-1] < losses[0] and len(weights) == 28


def test_trls_trainer_makes_the_adapter_itself_and_the_result_is_saved(speaker, tmp_path):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset

    tokenizer = salr.load_tokenizer(speaker)
    tokenizer.pad_token = tokenizer.eos_token = "w9"
    data = Dataset.from_list([{"prompt": f"w{i} ", "completion": f"w{i + 1} w{i + 2}"} for i in range(1, 13)])
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=3, learning_rate=0.02,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        salr.load(speaker, dtype="fp32"), args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora
    )
    _, weights = trained(trainer)
    assert len(weights) == 28 and any(weight.any() for name, weight in weights.items() if "lora_B" in name)
    report = salr.save(trainer.model, tmp_path / "tuned.salr")
    assert [adapter.name for adapter in report.adapters] == ["default"]
