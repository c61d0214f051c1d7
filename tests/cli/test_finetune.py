"""`salr finetune`: what it prints and writes, how it goes on after an interruption, one line for every mistake."""

from __future__ import annotations

import json
import shutil
import signal
from contextlib import contextmanager

import pytest
import torch
from salr.formats.reader import SalrFile

from salr.cli import console

FAST = ("--rank", 2, "--batch", 4, "--lr", 0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Return a file of questions with answers for the tokenizer of ``speaker``."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    lines = [{"question": f"w{i} w{i + 1}", "answer": f"w{i + 2} w{i + 3}"} for i in range(1, 25)]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture(scope="module")
def whole(salr, speaker, data, tmp_path_factory):
    """Return (what a run printed, its file)."""
    out = tmp_path_factory.mktemp("whole") / "tuned.salr"
    return salr("finetune", speaker, "--data", data, "-o", out, *FAST), out


def test_it_says_what_it_recognised_trains_and_writes_a_file_that_verifies(salr, speaker, whole):
    result, out = whole
    assert result.exit_code == 0, result.output
    assert "24 questions with answers, through the chat template; loss on answers only (" in result.stdout
    assert "train   adapter 'default' rank 2 (3.7 k) at 0.01, residual (14.8 k) at 0.001" in result.stdout
    assert "6 steps of 4 examples, cpu float32" in result.stdout and f"wrote {out}" in result.stdout
    assert salr("verify", out).exit_code == 0
    settings = SalrFile(out).manifest.source["trained"]["default"]
    assert (settings["r"], settings["lr"], settings["batch"], len(settings["data"])) == (2, 0.01, 4, 64)
    rows = [line.split()[:2] for line in salr("adapters", "list", out).stdout.splitlines()]
    assert rows == [["adapter", "rank"], ["residual", "8"], ["default", "2"]]
    assert sorted(path.name for path in out.parent.iterdir()) == ["tuned.loss.png", "tuned.salr"]
    assert (out.parent / "tuned.loss.png").read_bytes().startswith(b"\x89PNG")
    assert salr("generate", out, "w3", "--max-tokens", 2, "--temperature", 0).exit_code == 0


def test_an_interrupted_run_goes_on_to_the_very_same_file(salr, fails, speaker, data, whole, tmp_path, monkeypatch):
    @contextmanager
    def pressing_ctrl_c(label, quiet=False):
        yield lambda done, total: signal.raise_signal(signal.SIGINT) if done == 3 else None

    out = tmp_path / "tuned.salr"
    command = ("finetune", speaker, "--data", data, "-o", out, *FAST)
    with monkeypatch.context() as patch:
        patch.setattr(console, "progress_bar", pressing_ctrl_c)
        interrupted = salr(*command)
    assert interrupted.exit_code == 130 and "to convert or train on, give the same command" in interrupted.stderr
    assert not out.exists() and (tmp_path / "tuned.salr.partial").is_dir()
    line = fails(*command[:-1], 0.02)
    assert "the interrupted run had another lr (0.01, now 0.02); give the same again, or --fresh" in line
    assert "the interrupted run had another name ('default', now 'other')" in fails(*command, "--name", "other")
    checkpoints = tmp_path / "tuned.salr.partial" / "checkpoints"
    half = shutil.copytree(checkpoints / "checkpoint-3", checkpoints / "checkpoint-5")  # a killed run's
    (half / "trainer_state.json").write_text("{")
    (tmp_path / "tuned.salr.partial" / "data").write_text("written, but not renamed")
    (tmp_path / "tuned.salr.partial" / "data.partial").mkdir()
    (tmp_path / "tuned.salr.partial" / "data.partial" / "data").write_text("half")
    result = salr(*command)
    assert result.exit_code == 0, result.output
    assert "going on after step 3" in result.stdout
    assert out.read_bytes() == whole[1].read_bytes() and not (tmp_path / "tuned.salr.partial").exists()


def test_frozen_residual_json_and_fresh(salr, speaker, data, tmp_path):
    (tmp_path / "o.salr.partial").mkdir()
    (tmp_path / "o.salr.partial" / "data").write_text("left by something else")
    options = (*FAST, "--freeze-residual", "--max-steps", 1, "--target", "q_proj,k_proj", "--name", "mine")
    command = ("finetune", speaker, "--data", data, "-o", tmp_path / "o.salr", *options)
    refused = salr(*command)
    assert refused.exit_code == 1 and "an interrupted run of another command left this" in refused.stderr
    result = salr(*command, "--fresh", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [adapter["name"] for adapter in report["adapters"]] == ["mine"] and len(report["losses"]) == 1
    assert [group["name"] for group in report["groups"]] == ["adapters"]
    before, after = SalrFile(speaker), SalrFile(tmp_path / "o.salr")
    assert set(after.tensors) - set(before.tensors) == {
        f"model.layers.{i}.self_attn.{x}_proj.lora_{f}.mine" for i in (0, 1) for x in "qk" for f in "AB"
    }


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (
            [{"question": "w1", "answer": "w2"}, {"question": "w1"}],
            "line 2 has no field 'answer', needed the fields of",
        ),
        ([{"prompt": "w1"}], "line 1 has the fields prompt, needed messages; or prompt and completion; or question"),
        ([], "holds no examples, needed JSON objects, one a line"),
    ],
)
def test_data_that_cannot_be_used_are_named_with_line_and_field(fails, speaker, tmp_path, lines, words):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    line = fails("finetune", speaker, "--data", path, "-o", tmp_path / "o.salr")
    assert "bad.jsonl: " in line and words in line
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_mistakes_are_one_line_and_leave_nothing(fails, speaker, data, whole, tmp_path):
    out = tmp_path / "o.salr"
    for arguments, words in [
        ((speaker, "--data", tmp_path / "no.jsonl", "-o", out), "no.jsonl: cannot be read"),
        ((speaker, "--data", data, "-o", out, "--rank", 65), "rank 65, needed at most min(N, K) ="),
        ((speaker, "--data", data, "-o", tmp_path / "o.bin"), "needed a file name ending in .salr"),
        ((speaker, "--data", data, "-o", whole[1]), "the output exists already"),
        ((speaker, "--data", data, "-o", out, "--batch", 0), "batch 0, needed 1 or more"),
        ((speaker, "--data", data, "-o", out, "--batch", 10**30), "needed at most 2147483647"),
        ((speaker, "--data", data, "-o", out, "--rank", 0), "rank 0, needed 1 or more"),
        ((speaker, "--data", data, "-o", out, "--lr", 0), "lr 0.0, needed a finite number above 0"),
        ((speaker, "--data", data, "-o", out, "--seed", 2**32), "seed 4294967296, needed 0 to 4294967295"),
        ((speaker, "--data", data, "-o", out, "--device", "tpu"), "device 'tpu', needed cpu or cuda"),
        ((speaker, "--data", data, "-o", out, "--target", "x_proj"), "fits no layer of LlamaForCausalLM"),
        ((whole[1], "--data", data, "-o", out), "adapter 'default' exists already; give another name"),
        ((data, "--data", data, "-o", out), "train.jsonl: "),
    ]:
        assert words in fails("finetune", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_example_beyond_the_models_positions_is_refused(fails, speaker, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "w1 " * 65}))
    line = fails("finetune", speaker, "--data", path, "-o", tmp_path / "o.salr")
    assert "an example of 65 tokens, needed the model's 64 positions at most; give --max-length 64" in line


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        (
            "_save_optimizer_and_scheduler",
            RuntimeError("unexpected pos 2 vs 1"),
            "a checkpoint cannot be written (unexp",
        ),
        ("training_step", torch.OutOfMemoryError("tried 2 GiB"), "the GPU has too little memory for a step; give --ch"),
    ],
)
def test_a_full_disk_and_a_full_gpu_are_one_line(salr, speaker, data, tmp_path, monkeypatch, method, error, words):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(f"transformers.Trainer.{method}", fail)
    result = salr("finetune", speaker, "--data", data, "-o", tmp_path / "o.salr", *FAST, "--max-steps", 1)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1 and words in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_image_that_cannot_be_written_spoils_nothing(salr, speaker, data, tmp_path):
    (tmp_path / "o.loss.png").mkdir()
    result = salr("finetune", speaker, "--data", data, "-o", tmp_path / "o.salr", *FAST, "--max-steps", 1)
    assert result.exit_code == 0, result.output
    assert f"! No image of the losses: {tmp_path / 'o.loss.png'} cannot be written (Is a directory)." in result.stdout
    assert salr("verify", tmp_path / "o.salr").exit_code == 0


def test_a_run_that_diverges_stops_and_says_so(salr, speaker, data, tmp_path):
    result = salr("finetune", speaker, "--data", data, "-o", tmp_path / "o.salr", "--lr", 1e30, "--batch", 4)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "the loss of step 3 is not finite; give a lower --lr or --residual-lr, and --fresh" in result.stderr
    assert list(tmp_path.iterdir()) == []
