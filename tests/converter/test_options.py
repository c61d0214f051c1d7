"""Options are valid in themselves; patterns, overrides and recipes say what is wrong with them."""

from __future__ import annotations

import pytest
from salr.converter.module_options import ModuleOptions, matches, parse_override, read_recipe
from salr.converter.options import ConvertOptions
from salr.formats.errors import OptionError


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.95])
def test_sparsity_reaches_from_0_to_95_percent(sparsity):
    assert ModuleOptions(sparsity).sparsity == sparsity


@pytest.mark.parametrize("sparsity", [-0.01, 0.951, 1.0, 2, float("nan"), float("inf"), "0.5", None])
def test_any_other_sparsity_is_refused(sparsity):
    with pytest.raises(OptionError, match=r"needed 0 to 0.95 \(the fraction removed\)"):
        ModuleOptions(sparsity)


@pytest.mark.parametrize("rank", [-1, 1.5, 16.0, "8", True])
def test_a_rank_is_an_integer_from_0(rank):
    with pytest.raises(OptionError, match="needed an integer, 0 or more"):
        ModuleOptions(rank=rank)


@pytest.mark.parametrize(("field", "value"), [("method", "guess"), ("scope", "column")])
def test_an_unknown_choice_lists_the_known_ones(field, value):
    with pytest.raises(OptionError, match=f"{field} '{value}', needed one of ") as error:
        ConvertOptions(**{field: value})
    assert {"method": "magnitude", "scope": "row"}[field] in str(error.value)


@pytest.mark.parametrize("workers", [0, -1])
def test_there_is_at_least_one_worker(workers):
    with pytest.raises(OptionError, match="needed 1 or more"):
        ConvertOptions(workers=workers, method="magnitude")


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*.q_proj", "model.layers.0.q_proj", True), ("*.q_proj", "model.layers.0.q_proj2", False),
        ("lm_head", "lm_head", True), ("lm_head", "model.lm_head", False), ("*.[0-3].*", "a.2.b", True),
        ("*.Q_PROJ", "a.q_proj", False),
        (r"re:.*\.1\d\..*", "layers.12.x", True), (r"re:.*\.1\d\..*", "layers.2.x", False),
        ("re:q_proj", "a.q_proj", False),
    ],
)  # fmt: skip
def test_globs_and_expressions_match_whole_names(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_an_invalid_expression_is_named():
    with pytest.raises(OptionError, match=r"pattern 're:\(' is no regular expression"):
        matches("re:(", "a")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*.q_proj sparsity=0.3,rank=8", ("*.q_proj", {"sparsity": 0.3, "rank": 8})),
        ("  lm_head   rank=0 ", ("lm_head", {"rank": 0})),
        ("a sparsity=0.5, rank=4", ("a", {"sparsity": 0.5, "rank": 4})),
    ],
)  # fmt: skip
def test_an_override_is_a_pattern_and_settings(text, expected):
    assert parse_override(text) == expected


@pytest.mark.parametrize("text", ["", "a", "a rank", "a rank=x", "a sparsity=", "a rank=1.5", "rank=3"])
def test_an_override_of_another_form_is_refused(text):
    with pytest.raises(OptionError, match="--set"):
        parse_override(text)


def test_an_override_of_an_unknown_setting_lists_the_known_ones():
    with pytest.raises(OptionError, match=r"--set a: unknown setting 'colour', needed .*sparsity, rank"):
        ConvertOptions(overrides=(("a", {"colour": 1.0}),), method="magnitude")


def test_later_overrides_win_and_keep_what_they_do_not_name():
    overrides = (("*", {"rank": 4}), ("b*", {"sparsity": 0.2}), ("*", {"rank": 5}))
    options = ConvertOptions(ModuleOptions(0.6, 9), overrides=overrides, method="magnitude")
    assert (options.for_module("a").sparsity, options.for_module("a").rank) == (0.6, 5)
    assert (options.for_module("b").sparsity, options.for_module("b").rank) == (0.2, 5)


def test_an_override_is_held_to_the_same_ranges():
    with pytest.raises(OptionError, match=r"sparsity 1\.5"):
        ConvertOptions(overrides=(("*", {"sparsity": 1.5}),), method="magnitude").for_module("a")


def test_a_recipe_is_a_table_for_each_pattern(tmp_path):
    (tmp_path / "r.toml").write_text('["*.q_proj"]\nsparsity = 0.25\n["re:.*v_proj"]\nrank = 3\n')
    assert read_recipe(tmp_path / "r.toml") == (("*.q_proj", {"sparsity": 0.25}), ("re:.*v_proj", {"rank": 3}))


@pytest.mark.parametrize(
    "content", [b"= 3", b"sparsity = 0.5", b"\xff\xfe", b"['*'"], ids=["no TOML", "no table", "no UTF-8", "cut"]
)
def test_a_recipe_that_is_none_is_named(tmp_path, content):
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(OptionError, match=r"r\.toml: "):
        read_recipe(tmp_path / "r.toml")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"r\.toml: cannot be read \(No such file or directory\)"):
        read_recipe(tmp_path / "r.toml")


def test_recorded_options_come_back_as_they_were():
    overrides = (("a*", {"rank": 3}),)
    options = ConvertOptions(
        ModuleOptions(0.3, 5), scope="row", include=("x",), exclude=("y",), overrides=overrides, method="magnitude"
    )
    assert ConvertOptions.from_recorded(options.recorded()) == options
