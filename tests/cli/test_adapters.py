"""`salr adapters` and `salr export peft`: what they print, where they write, and one line for every mistake."""

from __future__ import annotations

import json
import shutil

import pytest

MAGNITUDE = ("--method", "magnitude")


@pytest.fixture(scope="module")
def adapted(salr, llama32, lora, make_lora, tmp_path_factory):
    """Return a .salr file with a residual and adapters a and b."""
    folder = tmp_path_factory.mktemp("cli")
    second = make_lora(llama32, 51, r=2, target_modules=["k_proj", "q_proj"])
    options = ("--rank", 4, "--adapter", f"a={lora}", "--adapter", f"b={second}")
    assert salr("convert", *MAGNITUDE, llama32, folder / "m.salr", *options).exit_code == 0
    return folder / "m.salr"


@pytest.fixture
def mine(adapted, tmp_path):
    """Return a copy of ``adapted``, to be edited in place."""
    return shutil.copy(adapted, tmp_path / "m.salr")


def names(salr, path):
    return [adapter["name"] for adapter in json.loads(salr("adapters", "list", path, "--json").stdout)]


def test_list_shows_one_row_an_adapter(salr, adapted, tmp_path):
    result = salr("adapters", "list", adapted)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["adapter", "rank", "scaling", "alpha", "modules", "size", "origin"]
    assert [row[:4] for row in rows[1:]] == [["residual", "4", "1", "14"], ["a", "4", "1.5", "6"], ["b", "2", "3", "6"]]
    first = json.loads(salr("adapters", "list", adapted, "--json").stdout)[1]
    assert (first["name"], first["ranks"], first["n_modules"], first["origins"]) == ("a", [4], 4, ["PEFT LoRA"])


def test_list_of_a_file_without_adapters_says_so(salr, llama, tmp_path):
    salr("convert", *MAGNITUDE, llama, tmp_path / "m.salr", "--rank", 0)
    assert "holds no adapters" in salr("adapters", "list", tmp_path / "m.salr").stdout


def test_add_takes_the_directorys_name_unless_one_is_given(salr, mine, lora):
    result = salr("adapters", "add", mine, lora)
    assert result.stdout == f"added adapter 'lora0': 4 modules, rank 4, scaling 1.5, 0.0 MB; wrote {mine}\n"
    assert salr("adapters", "add", mine, f"again={lora}", "--quiet").output == ""
    assert names(salr, mine) == ["residual", "a", "again", "b", "lora0"]
    assert salr("verify", mine).exit_code == 0


def test_remove_scale_and_merge_edit_in_place_and_verify_stays_clean(salr, mine, llama32, lora):
    assert "scaling 0.75" in salr("adapters", "scale", mine, "a", 0.5).stdout
    assert "scaling 2," in salr("adapters", "scale", mine, "b", "--scaling", 2).stdout
    assert salr("adapters", "scale", mine, "residual", "--", -1).exit_code == 0
    result = salr("adapters", "merge", mine, "a", "b", "--into", "m")
    assert "merged a, b into adapter 'm': 6 modules" in result.stdout
    assert "4 modules exactly, 2 with scalings folded in float32, 0 fitted again" in result.stdout
    assert "removed adapter 'residual': 14 modules" in salr("adapters", "remove", mine, "residual").stdout
    result = salr("verify", mine, "--against", llama32)
    assert result.exit_code == 0, result.output
    assert "not compared: adapter 'm', which was merged inside the file" in result.stdout
    assert names(salr, mine) == ["m"] and [path.name for path in mine.parent.iterdir()] == ["m.salr"]


def test_merge_with_a_rank_prints_the_measured_error(salr, mine):
    result = salr("adapters", "merge", mine, "a", "b", "--into", "m", "--rank", 3)
    assert "2 modules exactly, 0 with scalings folded in float32, 4 fitted again" in result.stdout
    assert "error of the fit, share of |sum|^2: " in result.stdout


def test_output_writes_another_file(salr, fails, mine):
    before, out = mine.read_bytes(), mine.with_name("out.salr")
    assert salr("adapters", "remove", mine, "a", "-o", out).stdout.endswith(f"wrote {out}\n")
    assert mine.read_bytes() == before and names(salr, out) == ["residual", "b"]
    assert "the output exists already" in fails("adapters", "remove", mine, "a", "-o", out)
    assert salr("adapters", "remove", mine, "b", "-o", out, "--force").exit_code == 0
    assert names(salr, out) == ["residual", "a"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("remove", "z"), "there is no adapter 'z', needed one of: a, b, residual"),
        (("scale", "a"), "no factor and no scaling, needed one of both: FACTOR, or --scaling S"),
        (("scale", "a", "2", "--scaling", "2"), "a factor and a scaling, needed one of both"),
        (("merge", "a", "--into", "m"), "needed two or more, each once"),
        (("merge", "a", "residual", "--into", "m"), "needed 'residual' on both sides, or on none"),
        (("merge", "a", "b", "--into", "residual"), "adapter name 'residual'"),
        (("add", __file__), "test_adapters.py: is a file, needed the directory of a PEFT adapter"),
        (("add", "nowhere"), "nowhere/adapter_config.json: cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(fails, mine, adapted, arguments, words):
    command, *rest = arguments
    assert words in fails("adapters", command, mine, *rest)
    assert mine.read_bytes() == adapted.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("adapters", "list"), ("adapters", "add", "x"), ("adapters", "remove", "a"), ("adapters", "scale", "a", "2"),
        ("adapters", "merge", "a", "b", "--into", "m"), ("export", "peft", "out"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_missing_file_is_one_line(fails, tmp_path, arguments):
    group, command, *rest = arguments
    assert "nowhere.salr: no such file" in fails(group, command, tmp_path / "nowhere.salr", *rest)


@pytest.mark.parametrize("group", ["adapters", "export"])
def test_help_lists_the_commands(salr, group):
    expected = {"adapters": ["list", "add", "remove", "scale", "merge"], "export": ["peft"]}[group]
    result = salr(group, "--help")
    assert result.exit_code == 0 and all(command in result.stdout for command in expected)


def test_export_names_every_directory(salr, fails, adapted, tmp_path):
    result = salr("export", "peft", adapted, tmp_path / "out")
    assert result.stdout.splitlines() == [
        f"wrote {tmp_path / 'out' / place}" for place in ("base", "adapters/a", "adapters/b", "adapters/residual")
    ]
    assert "the output exists already" in fails("export", "peft", adapted, tmp_path / "out")


def test_export_says_where_the_residual_of_experts_went(salr, stacked_moe, tmp_path):
    salr("convert", *MAGNITUDE, stacked_moe, tmp_path / "m.salr", "--rank", 4)
    result = salr("export", "peft", tmp_path / "m.salr", tmp_path / "out")
    assert "modules that PEFT cannot adapt" in result.stdout and "have their residual in the base." in result.stdout
