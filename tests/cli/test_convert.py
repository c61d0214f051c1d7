"""`salr convert`: the story it tells, what it refuses, and that nothing is left where it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from salr.converter.options import ConvertOptions
from salr.converter.pipeline import plan_conversion
from salr.converter.sources.checkpoint import Checkpoint
from salr.formats.reader import SalrFile

from salr.cli.console import megabytes
from salr.cli.convert import show_source

MAGNITUDE = ("--method", "magnitude")


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out.salr"


def names_left(out: Path) -> list[str]:
    """Return the names of the output and of all that a run left beside it."""
    return [path.name for path in out.parent.iterdir() if path.name.startswith("out")]


def test_a_conversion_tells_its_story_in_plain_lines(salr, source, out):
    result = salr("convert", *MAGNITUDE, source, out, "--rank", 8)
    assert result.exit_code == 0 and result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("tiny-llama   LlamaForCausalLM, bf16, ")
    assert "plan    pack 14 linears" in lines[1] and "50 % removed, rank 8" in lines[1]
    for word in (
        "packed weights",
        "kept values",
        "kept dense",
        "total",
        "error (share of |W|^2)",
        "21 of 21 input tensors",
    ):
        assert word in result.stdout
    assert f"next:  salr verify {out} --against {source}" in result.stdout and "\x1b" not in result.stdout
    assert SalrFile(out).manifest.options["rank"] == 8


def test_the_printed_total_is_the_files_size(salr, source, out):
    result = salr("convert", *MAGNITUDE, source, out)
    total = next(line for line in result.stdout.splitlines() if line.startswith("total"))
    assert f"-> {out.stat().st_size / 1e6:.1f} MB" in total


def test_json_gives_the_report_as_one_object(salr, source, out):
    result = salr("convert", *MAGNITUDE, source, out, "--json")
    report = json.loads(result.stdout)
    assert report["path"] == str(out) and report["n_inputs"] == 21 and result.stderr == ""
    assert report["sizes"]["file_bytes"] == out.stat().st_size
    assert 0 < report["error"]["residual"] <= report["error"]["bound"] + 1e-6


def test_surplus_tensors_are_told_once_and_before_the_work(salr, source, out):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    dry, told = salr("convert", *MAGNITUDE, source, out, "--dry-run"), salr("convert", *MAGNITUDE, source, out)
    (warning,) = [line for line in told.stdout.splitlines() if "has no place for 9 tensors" in line]
    assert warning.startswith("! The LlamaForCausalLM that config.json describes ")
    assert told.stdout.index(warning) < told.stdout.index("packed weights") and warning in dry.stdout.splitlines()
    report = json.loads(salr("convert", *MAGNITUDE, source, out, "--json", "--force").stdout)
    assert report["notes"] == [warning.removeprefix("! ")]


def test_quiet_says_nothing(salr, source, out):
    result = salr("convert", *MAGNITUDE, source, out, "--quiet")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "") and out.is_file()


def test_verbose_names_every_module(salr, source, out):
    result = salr("convert", *MAGNITUDE, source, out, "--verbose", "--rank", 4)
    assert all(name in result.stdout for name in SalrFile(out).modules)


def test_every_option_reaches_the_conversion(salr, source, out, tmp_path):
    (tmp_path / "recipe.toml").write_text('["*.k_proj"]\nrank = 2\nsparsity = 0.25\n')
    result = salr(
        "convert", source, out, "--sparsity", 0.75, "--rank", 5, "--scope", "row", "--exclude", "*.o_proj",
        "--include", "lm_head", "--recipe", tmp_path / "recipe.toml", "--set", "re:.*0.*up_proj rank=0",
        "--set", "*.v_proj sparsity=0", "--workers", 2, "--method", "magnitude", "--device", "cpu",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    modules = SalrFile(out).modules
    found = {
        name.removeprefix("model.layers."): (e.nnz / e.n_weights, [a.rank for a in e.adapters])
        for name, e in modules.items()
    }
    assert found["0.self_attn.q_proj"] == (0.25, [5]) and found["lm_head"] == (0.25, [5])
    assert found["1.self_attn.k_proj"] == (0.75, [2]) and found["0.self_attn.v_proj"] == (1, [])
    assert found["0.mlp.up_proj"] == (0.25, []) and found["1.mlp.up_proj"] == (0.25, [5])
    assert "0.self_attn.o_proj" not in found


def test_the_command_line_beats_the_recipe(salr, source, out, tmp_path):
    (tmp_path / "recipe.toml").write_text('["*"]\nrank = 2\n')
    salr("convert", *MAGNITUDE, source, out, "--recipe", tmp_path / "recipe.toml", "--set", "*.q_proj rank=3")
    ranks = {name.rsplit(".", 1)[-1]: entry.adapters[0].rank for name, entry in SalrFile(out).modules.items()}
    assert ranks["q_proj"] == 3 and set(ranks.values()) == {2, 3}


def test_adapters_are_named_by_the_user_or_by_their_directory(salr, llama32, lora, out):
    result = salr("convert", *MAGNITUDE, llama32, out, "--adapter", f"style={lora}", "--adapter", lora, "--rank", 4)
    assert result.exit_code == 0, result.output
    assert "adapter 'style' kept exact: 4 modules" in result.stdout
    names = {adapter.name for entry in SalrFile(out).modules.values() for adapter in entry.adapters}
    assert names == {"residual", "style", lora.name}


def test_a_lora_directory_needs_no_more_than_its_base(salr, llama32, lora, out):
    assert salr("convert", *MAGNITUDE, lora, out, "--base", llama32).exit_code == 0
    assert {a.name for e in SalrFile(out).modules.values() for a in e.adapters} == {"residual", "default"}


def test_a_dry_run_lists_every_tensor_with_its_reason_and_writes_nothing(salr, source, out):
    result = salr("convert", *MAGNITUDE, source, out, "--dry-run", "--exclude", "*.q_proj")
    assert result.exit_code == 0 and names_left(out) == []
    for name in load_file(source / "model.safetensors"):
        assert name in result.stdout
    assert "excluded by --exclude" in result.stdout and "Linear in a block" in result.stdout


def test_a_dry_run_as_json_is_the_ledger(salr, llama32, lora, out):
    result = salr("convert", *MAGNITUDE, llama32, out, "--dry-run", "--json", "--adapter", f"a={lora}")
    lines = json.loads(result.stdout)
    expected = [*load_file(llama32 / "model.safetensors"), *load_file(lora / "adapter_model.safetensors")]
    assert sorted(line["key"] for line in lines) == sorted(expected) and names_left(out) == []
    assert {line["fate"] for line in lines} == {"packed", "kept"} and all(line["reason"] for line in lines)


def test_an_existing_output_is_refused_without_force(salr, fails, source, out):
    out.write_bytes(b"precious")
    assert "out.salr: the output exists already; give --force to replace it, or another name" in fails(
        "convert", source, out
    )
    assert out.read_bytes() == b"precious" and names_left(out) == ["out.salr"]
    assert salr("convert", *MAGNITUDE, source, out, "--force").exit_code == 0 and SalrFile(out).modules


def test_a_forced_conversion_that_fails_leaves_the_old_file(fails, source, out):
    out.write_bytes(b"precious")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    assert f"tensor '{name}': holds NaN or infinity" in fails("convert", *MAGNITUDE, source, out, "--force", "--quiet")
    assert out.read_bytes() == b"precious" and names_left(out) == ["out.salr"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "LICENSE", "link"])
def test_an_output_that_is_a_file_of_the_source_is_refused_even_with_force(fails, source, name):
    (source / "link").symlink_to("model.safetensors")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    line = fails("convert", *MAGNITUDE, source, source / name, "--force", "--quiet")
    assert line.endswith(f"{name}: the output is one of the inputs; choose another name")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_a_trained_adapter_is_not_replaced_by_what_is_made_from_it(fails, llama32, lora, tmp_path):
    mine = shutil.copytree(lora, tmp_path / "lora")
    out = mine / "adapter_model.safetensors"
    before = out.read_bytes()
    assert "one of the inputs" in fails("convert", *MAGNITUDE, llama32, out, "--adapter", mine, "--force", "--quiet")
    assert out.read_bytes() == before


def test_what_a_run_with_other_options_left_is_refused_until_fresh(salr, fails, source, out):
    partial = Path(f"{out}.partial")
    partial.mkdir()
    (partial / "data").write_bytes(b"half")
    (partial / "journal").write_text('{"fingerprint":{"options":{"sparsity":0.7}}}\n')
    message = fails("convert", *MAGNITUDE, source, out, "--quiet")
    assert "out.salr.partial: an interrupted run with another" in message and "give --fresh to start over" in message
    assert not out.exists() and (partial / "data").read_bytes() == b"half"
    assert salr("convert", *MAGNITUDE, source, out, "--fresh").exit_code == 0
    assert out.is_file() and not partial.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--sparsity", "1.0"], "sparsity 1.0, needed 0 to 0.95 (the fraction removed)"),
        (["--sparsity", "-0.1"], "sparsity -0.1, needed 0 to 0.95"),
        (["--rank", "-1"], "rank -1, needed an integer, 0 or more"),
        (["--rank", "33"], "rank 33, needed at most min(N, K) = 32"),
        (["--method", "guess"], "method 'guess', needed one of"),
        (["--scope", "column"], "scope 'column', needed one of layer, row, global"),
        (["--include", "nothing.*"], "pattern 'nothing.*' matches no module"),
        (["--exclude", "nothing.*"], "pattern 'nothing.*' matches no module"),
        (["--exclude", "re:("], "pattern 're:(' is no regular expression"),
        (["--set", "nothing.* rank=1"], "pattern 'nothing.*' matches no module"),
        (["--set", "* colour=1"], "unknown setting 'colour'"), (["--set", "*"], "needed 'PATTERN key=value,key=value'"),
        (["--values", "int8", "--group-size", str(2**63)], "needed an integer, 1 or more, up to 2147483647"),
        (["--calibration", "synthetic", "--seed", str(2**63)], "--calibration: seed 9223372036854775808, needed"),
        (["--set", "* rank=1.5"], "--set '* rank=1.5': 'rank=1.5', needed rank= and an integer"),
        (["--set", "* sparsity"], "'sparsity', needed sparsity= and a number"),
        (["--set", "* colour=red"], "unknown setting 'colour'"),
        (["--calibration-length", "64"], "length of calibration without a text, needed --calibration FILE, or"),
        (["--calibration", "none", "--seed", "1"], "seed of calibration without a text"),
        (["--recipe", "/nowhere.toml"], "/nowhere.toml: cannot be read"),
        (["--workers", "0"], "0 workers, needed 1 or more"),
        (["--device", "gpu"], "device 'gpu', needed cpu or cuda[:i,...]"), (["--base", "/nowhere"], "--base"),
        (["--adapter", "/nowhere"], "/nowhere/adapter_config.json: cannot be read"),
        (["--adapter", "residual=/nowhere"], "adapter name 'residual'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_senseless_option_is_one_line_and_leaves_nothing(fails, source, out, options, words):
    assert words in fails("convert", *MAGNITUDE, source, out, "--quiet", *options)
    assert names_left(out) == []


def test_a_device_that_is_not_here_is_told_before_the_story_begins(fails, source, out):
    assert "device 'mps', needed cpu or cuda" in fails("convert", source, out, "--device", "mps")
    assert names_left(out) == []


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json: cannot be read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "there are no weights here"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "not a readable safetensors file"),
        (shutil.rmtree, "no such directory"),
    ],
    ids=["no config", "no weights", "damaged weights", "no directory"],
)
def test_a_broken_source_is_one_line_and_leaves_nothing(fails, source, out, break_it, words):
    break_it(source)
    assert words in fails("convert", *MAGNITUDE, source, out)
    assert names_left(out) == []


@pytest.mark.parametrize(
    ("place", "words"),
    [("/proc/out.salr", "/proc: cannot write here"), ("nowhere/out.salr", "nowhere: no such directory; make it first"),
     ("tiny-llama/config.json/out.salr", "config.json: no such directory"), (".", "this is a directory")],
)  # fmt: skip
def test_an_output_that_cannot_be_written_is_one_line(fails, source, tmp_path, place, words):
    assert words in fails("convert", *MAGNITUDE, source, tmp_path / place, "--quiet")


@pytest.mark.parametrize(
    "arguments",
    [["convert"], ["convert", "a"], ["convert", "a", "b", "--bogus"], ["bogus"], ["convert", "a", "b", "--rank", "x"]],
)
def test_wrong_usage_exits_with_2(salr, arguments):
    assert salr(*arguments).exit_code == 2


def test_what_was_found_is_told_without_reading_a_weight(llama, tmp_path, monkeypatch, capsys):
    sizes = [tensor.nbytes for tensor in load_file(llama / "model.safetensors").values()]
    plan = plan_conversion(llama, ConvertOptions())
    monkeypatch.setattr(Checkpoint, "raw", lambda self, name: pytest.fail(f"{name} is read, or computed"))
    show_source(plan, plan.options, tmp_path / "out.salr", quiet=False)
    assert megabytes(sum(sizes)) in capsys.readouterr().out.splitlines()[0]


def test_what_is_no_file_is_not_replaced_by_force(fails, source, tmp_path):
    import os

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "no regular file" in fails("convert", source, pipe, "--force", "--method", "magnitude")
    assert pipe.is_fifo()


@pytest.mark.parametrize("option", [("--sparsity", 0.6), ("--rank", 4)])
def test_a_budget_beside_what_it_chooses_is_refused(fails, source, tmp_path, option):
    said = fails("convert", source, tmp_path / "o.salr", "--target-bits", 8, *option)
    assert "--target-bits chooses every sparsity and rank itself; drop --sparsity and --rank" in said


def test_a_plan_for_nothing_is_refused(fails, source, tmp_path):
    said = fails("convert", source, tmp_path / "o.salr", "--plan", tmp_path / "p", "--method", "magnitude")
    assert "--plan, needed --part" in said


def test_next_commands_can_be_pasted_whatever_the_paths(salr, source, tmp_path):
    import shlex

    spaced = source.rename(tmp_path / "a model's dir")
    said = salr("convert", spaced, tmp_path / "o o.salr", "--method", "magnitude", "--rank", 4).stdout
    words = shlex.split(next(line for line in said.splitlines() if line.startswith("next:")))
    assert words[1:] == ["salr", "verify", str(tmp_path / "o o.salr"), "--against", str(spaced)]


def test_an_adapter_that_is_not_finite_is_refused(fails, salr, llama32, make_lora, packed, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_lora(llama32, seed=7)
    weights = load_file(folder / "adapter_model.safetensors")
    name = sorted(weights)[0]
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors")
    out = tmp_path / "o.salr"
    said = fails("convert", llama32, out, "--adapter", f"x={folder}", "--method", "magnitude", "--rank", 4)
    assert f"tensor '{name}': holds NaN or infinity" in said and not out.exists()
    mine = tmp_path / "mine.salr"
    mine.write_bytes(packed.read_bytes())
    assert "holds NaN or infinity" in fails("adapters", "add", mine, f"x={folder}")
    assert mine.read_bytes() == packed.read_bytes()


def test_the_plan_says_how_long_windows_really_are(salr, source, tmp_path):
    assert "16 windows of 64 tokens (random tokens)" in salr("convert", source, tmp_path / "o.salr", "--rank", 4).stdout
