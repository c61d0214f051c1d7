"""salr generate: the text on stdout, its cost on stderr, in chat or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICK = ("--max-tokens", 6, "--temperature", 0)


def expected(path, text, n_tokens=6, chat=True):
    """Return what transformers itself generates with the loaded model."""
    import salr

    model, tokenizer = salr.load(path), salr.load_tokenizer(path)
    prompt = f"w104 {text} w99" if chat else text
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, max_new_tokens=n_tokens, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])


def test_the_text_goes_to_stdout_and_its_cost_to_stderr(salr, speaker):
    result = salr("generate", speaker, "w5 w6", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == expected(speaker, "w5 w6").split() and len(result.stdout.split()) == 6
    assert "4 tokens read, first answered in " in result.stderr and "6 written" in result.stderr


def test_where_only_the_reference_computes_that_is_said(salr, speaker):
    said = salr("generate", speaker, "w5", "--backend", "reference", *QUICK).stderr
    assert "the reference backend decodes every weight at each token" in said


def test_raw_continues_the_prompt_without_a_template(salr, speaker):
    result = salr("generate", speaker, "w5 w6", "--raw", "--quiet", *QUICK)
    assert result.stdout.split() == expected(speaker, "w5 w6", chat=False).split()
    assert result.stdout.split() != expected(speaker, "w5 w6").split() and result.stderr == ""


def test_json_tells_text_and_counts(salr, speaker):
    found = json.loads(salr("generate", speaker, "w5 w6", "--json", *QUICK).stdout)
    assert found["text"].split() == expected(speaker, "w5 w6").split()
    assert (found["n_prompt_tokens"], found["n_new_tokens"]) == (4, 6)
    assert 0 < found["first_token_seconds"] <= found["seconds"] and found["tokens_per_second"] > 0


def test_a_seed_repeats_a_sampled_text(salr, speaker):
    texts = [
        salr("generate", speaker, "w5", "--temperature", 1, "--seed", seed, "--max-tokens", 12).stdout
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_prompt_each_line_is_answered_with_what_was_said_before(speaker):
    command = [sys.executable, "cli.py", "generate", str(speaker), *map(str, QUICK), "--quiet"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, input="w5 w6\n\nw7\n", timeout=300, env=environment
    )
    first, second = done.stdout.splitlines()
    assert first.split() == expected(speaker, "w5 w6").split()
    assert second.split() == expected(speaker, f"w5 w6 w109 {first.strip()} w104 w7").split()


def test_a_text_ends_where_the_models_positions_do_and_says_so(salr, speaker):
    for asked in (13, 12):
        result = salr("generate", speaker, "w5 " * 50, "--max-tokens", asked, "--temperature", 0)
        assert result.exit_code == 0, result.stderr
        assert "52 tokens read" in result.stderr and "; 12 written" in result.stderr
        assert ("up to the last of its positions" in result.stderr) == (asked == 13)


def test_a_prompt_without_tokens_or_without_room_for_an_answer_is_one_line(fails, speaker):
    assert "a prompt without a token; give some text" in fails("generate", speaker, "", "--raw")
    assert "a prompt that is no UTF-8 text" in fails("generate", speaker, "w5 \udcff")
    line = fails("generate", speaker, "w5 " * 64, "--raw")
    assert "a prompt of 64 tokens, needed fewer than the model's 64 positions; shorten it" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapter", "none=2"), "adapter 'none', needed one of none: the model has none"),
        (("--max-tokens", 0), "--max-tokens 0, needed 1 or more"),
        (("--temperature", 1e-300), "--temperature 1e-300, needed 1e-06 or more; give 0 for the likeliest token"),
        (("--seed", 2**63), f"--seed {2**63}, needed at most {2**63 - 1}"),
        (("--temperature", -1), "--temperature -1.0, needed a number, 0 or more"),
        (("--temperature", "nan"), "--temperature nan, needed a number, 0 or more"),
        (("--temperature", "inf"), "--temperature inf, needed a number, 0 or more"),
        (("--adapter", "style"), "adapter 'style', needed one of none: the model has none"),
        (("--adapter", "style=much"), "scale 'much', needed a number"),
        (("--backend", "quickest"), "backend 'quickest', needed one of"),
        (("--dtype", "int8"), "dtype 'int8', needed auto"),
    ],
)
def test_what_cannot_be_done_is_one_line(fails, speaker, options, message):
    assert message in fails("generate", speaker, "w5", *options)


def test_json_needs_a_prompt_and_a_file_its_tokenizer(fails, speaker, packed):
    assert "--json without a prompt; give a prompt" in fails("generate", speaker, "--json")
    assert "no usable tokenizer" in fails("generate", packed, "hello")


def test_an_encoder_is_told_apart(fails, tmp_path, speaker, salr):
    import shutil

    import torch
    from transformers import BertConfig, BertModel

    import salr as library

    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    BertModel(config).save_pretrained(tmp_path / "bert")
    library.unpack(speaker, tmp_path / "speaker")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "speaker" / name, tmp_path / "bert")
    options = library.ConvertOptions(library.ModuleOptions(0.5, 2), method="magnitude")
    library.convert(tmp_path / "bert", tmp_path / "bert.salr", options)
    assert "BertModel does not generate text" in fails("generate", tmp_path / "bert.salr", "w5")


@pytest.mark.parametrize(("device", "found"), [("nowhere", "needed cpu or cuda"), ("cuda:99", "is not there")])
def test_a_device_that_is_not_there_is_one_line(speaker, device, found):
    """Both commands at once: a process takes seconds to start."""
    lines = [[sys.executable, "cli.py", name, str(speaker), "--device", device] for name in ("generate", "bench")]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    for process in [subprocess.Popen(line, cwd=ROOT, text=True, **pipes) for line in lines]:
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 1 and found in said and len(said.splitlines()) == 1, said


def test_a_system_message_needs_a_template(fails, speaker):
    assert "--system without a chat template" in fails("generate", speaker, "w5", "--system", "w6", "--raw")
