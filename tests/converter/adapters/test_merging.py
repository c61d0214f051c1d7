"""Merged adapters: the product is the sum of the old ones, bit for bit, folded or fitted, and the error is measured."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from salr.converter.adapters import merging as adapter_merging
from salr.converter.adapters.editing import add_adapter, remove_adapter, scale_adapter
from salr.converter.adapters.merging import merge_adapters
from salr.converter.adapters.summary import list_adapters
from salr.converter.verification import compare_with_source
from salr.formats.dtypes import from_float32
from salr.formats.errors import AdapterError, FormatError, OptionError, OutputError
from salr.formats.reader import SalrFile
from salr.formats.rewriting import Destination

import salr

Q, K, DOWN = (f"model.layers.1.{leaf}" for leaf in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))


@pytest.fixture(scope="module")
def loras(llama32, lora, make_lora):
    """Return three adapters: a and b with scaling 1.5 (ranks 4 and 2), c with rank 8 and another scaling."""
    return {
        "a": lora,
        "b": make_lora(llama32, 31, r=2, lora_alpha=3, target_modules=["q_proj", "k_proj"]),
        "c": make_lora(llama32, 32, r=8, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=True),
    }


@pytest.fixture(scope="module")
def three(llama32, loras, tmp_path_factory):
    """Return ``llama32`` converted with all three."""
    out = tmp_path_factory.mktemp("three") / "three.salr"
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude", adapters=tuple(loras.items()))
    salr.convert(llama32, out, options)
    return out


@pytest.fixture
def mine(three, tmp_path):
    """Return a copy of ``three``, to be edited in place."""
    return shutil.copy(three, tmp_path / "mine.salr")


def product(file, module, names):
    """Return the sum of the adapters' updates in float64."""
    total = np.zeros(file.modules[module].shape)
    scalings = {adapter.name: adapter.scaling for adapter in file.modules[module].adapters}
    for pair in file.pairs(module):
        if pair.name in names:
            stack = file.adapters(module, [pair.name])
            total += scalings[pair.name] * (stack.lora_B.astype(np.float64) @ stack.lora_A.astype(np.float64))
    return total


def entry_of(file, module, name):
    return next(adapter for adapter in file.modules[module].adapters if adapter.name == name)


def sound(path):
    file = salr.open(path)
    assert [problem for _, problem in file.check_all() if problem] == []
    return file


def test_equal_scalings_and_dtypes_merge_bit_for_bit(mine, three):
    report = merge_adapters(mine, ["a", "b"], "m")
    old, new = SalrFile(three), sound(mine)
    assert (report.n_exact, report.n_folded, report.n_fitted, report.error) == (6, 0, 0, 0.0)
    np.testing.assert_array_equal(
        new.tensor(f"{Q}.lora_A.m"), np.concatenate([old.tensor(f"{Q}.lora_A.{name}") for name in "ab"])
    )
    np.testing.assert_array_equal(
        new.tensor(f"{Q}.lora_B.m"), np.concatenate([old.tensor(f"{Q}.lora_B.{name}") for name in "ab"], 1)
    )
    assert bytes(new.raw(f"{K}.lora_A.m")) == bytes(old.raw(f"{K}.lora_A.b"))
    entry = entry_of(new, Q, "m")
    assert (entry.rank, entry.scaling, entry.alpha, entry.origin) == (6, 1.5, 9.0, "merged from a, b")
    assert [adapter.name for adapter in new.modules[Q].adapters] == ["residual", "c", "m"]


def test_other_scalings_are_folded_to_float32_rounding(mine, three):
    report = merge_adapters(mine, ["c", "a", "b"], "m")
    assert (report.n_exact, report.n_folded, report.n_fitted) == (2, 4, 0)
    for module in (Q, K, DOWN):
        old, new = product(SalrFile(three), module, "abc"), product(sound(mine), module, ["m"])
        np.testing.assert_allclose(new, old, rtol=0, atol=2**-22 * np.abs(old).max())
    assert entry_of(SalrFile(mine), Q, "m").scaling == 1.0
    assert "each lora_B times its scaling, in float32" in entry_of(SalrFile(mine), Q, "m").converted


def test_other_dtypes_are_widened_exactly(mine, loras, three, tmp_path):
    half = shutil.copytree(loras["a"], tmp_path / "half")
    tensors = load_file(half / "adapter_model.safetensors")
    save_file({key: tensor.half() for key, tensor in tensors.items()}, half / "adapter_model.safetensors")
    add_adapter(mine, half, "h")
    before = product(SalrFile(mine), Q, "ah")
    assert merge_adapters(mine, ["a", "h"], "m").n_exact == 4
    after = sound(mine)
    assert after.tensors[f"{Q}.lora_B.m"].dtype == "F32"
    np.testing.assert_allclose(product(after, Q, ["m"]), before, rtol=0, atol=1e-16)


def test_a_rank_gives_the_best_approximation_and_its_measured_error(mine, three):
    report = merge_adapters(mine, ["a", "b", "c"], "m", rank=5)
    old, new = SalrFile(three), sound(mine)
    lost, energy = 0.0, 0.0
    for module, entry in new.modules.items():
        if not any(adapter.name == "m" for adapter in entry.adapters):
            continue
        exact, fitted = product(old, module, "abc"), product(new, module, ["m"])
        assert entry_of(new, module, "m").rank == min(5, sum(len(old.tensor(n)) for n in names_a(old, module)))
        if sum(len(old.tensor(name)) for name in names_a(old, module)) > 5:
            singular = np.linalg.svd(exact, compute_uv=False)
            np.testing.assert_allclose(((exact - fitted) ** 2).sum(), (singular[5:] ** 2).sum(), rtol=1e-5)
            lost, energy = lost + ((exact - fitted) ** 2).sum(), energy + (exact**2).sum()
        else:
            np.testing.assert_array_equal(exact, fitted)
    np.testing.assert_allclose(report.error, lost / energy, rtol=1e-5)
    assert 0.01 < report.error < report.worst_error < 1 and report.worst_module in new.modules
    assert (report.n_fitted, report.n_exact) == (4, 2)


def names_a(file, module):
    return [name for name in file.tensors if name.startswith(f"{module}.lora_A.") and not name.endswith("residual")]


def test_a_rank_that_suffices_changes_nothing(three, tmp_path):
    merge_adapters(three, ["a", "b"], "m", destination=Destination(tmp_path / "exact.salr"))
    merge_adapters(three, ["a", "b"], "m", rank=6, destination=Destination(tmp_path / "ranked.salr"))
    assert (tmp_path / "exact.salr").read_bytes() == (tmp_path / "ranked.salr").read_bytes()


def test_merging_gives_the_same_bytes_whatever_the_threads(three, tmp_path):
    n_threads = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            merge_adapters(three, list("abc"), "m", rank=3, destination=Destination(tmp_path / f"{threads}.salr"))
    finally:
        torch.set_num_threads(n_threads)
    assert (tmp_path / "1.salr").read_bytes() == (tmp_path / "2.salr").read_bytes()


def test_merging_into_one_of_the_names_and_merging_again_both_work(mine, three):
    merge_adapters(mine, ["a", "b"], "a")
    merge_adapters(mine, ["c", "a"], "c")
    file = sound(mine)
    assert [adapter.name for adapter in list_adapters(mine)] == ["residual", "c"]
    np.testing.assert_allclose(product(file, Q, ["c"]), product(SalrFile(three), Q, "abc"), atol=1e-8)
    folded = [line for line in file.manifest.ledger if line.fate == "folded"]
    assert {line.file.split("/")[0] for line in folded} == {"a", "b", "c"}
    assert {line.reason for line in folded} == {"factor merged into adapter 'c'"}


def test_a_merged_file_agrees_with_its_base_and_with_what_was_not_merged(mine, llama32, loras, open_draft):
    merge_adapters(mine, ["a", "b"], "m")
    for given_adapters in (("c",), ("a", "b", "c")):
        adapters = tuple((name, loras[name]) for name in given_adapters)
        assert [p for _, p in compare_with_source(SalrFile(mine), llama32, adapters) if p] == []
    with pytest.raises(OptionError, match="the file holds adapter 'c'"):
        list(compare_with_source(SalrFile(mine), llama32))
    draft = open_draft(mine)
    draft.put(f"{Q}.lora_A.c", draft.array(f"{Q}.lora_A.c") ^ 1)
    found = compare_with_source(SalrFile(draft.write(mine)), llama32, (("c", loras["c"]),))
    assert [str(p) for _, p in found if p and "differs from the trained factor" in str(p)]


def test_removing_a_merged_adapter_leaves_the_file_of_a_conversion_without_its_parts(mine, llama32, loras, tmp_path):
    merge_adapters(mine, ["a", "b"], "m")
    remove_adapter(mine, "m")
    options = salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude", adapters=(("c", loras["c"]),))
    salr.convert(llama32, tmp_path / "c.salr", options)
    assert mine.read_bytes() == (tmp_path / "c.salr").read_bytes()


def test_the_name_of_a_merged_adapter_stays_taken(mine, loras):
    merge_adapters(mine, ["a", "b"], "m")
    with pytest.raises(AdapterError, match="the ledger lists an adapter 'b' that was merged; give another name"):
        add_adapter(mine, loras["b"], "b")


def test_the_settings_of_all_that_were_trained_stay_with_what_they_were_merged_into(mine, open_draft):
    draft, a, c = open_draft(mine), {"r": 4, "lr": 1e-3}, {"r": 8, "data": "0f"}
    draft.manifest["source"]["trained"] = {"a": a, "c": c}
    draft.write(mine)
    merge_adapters(mine, ["a", "b"], "a")
    merged = {"merged_from": {"a": a}}
    assert sound(mine).manifest.source["trained"] == {"a": merged, "c": c}
    merge_adapters(mine, ["c", "a"], "m")
    assert sound(mine).manifest.source["trained"] == {"m": {"merged_from": {"a": merged, "c": c}}}
    remove_adapter(mine, "m")
    assert "trained" not in sound(mine).manifest.source


def test_untouched_tensors_keep_bytes_and_digests(mine, three):
    merge_adapters(mine, ["a", "b"], "m", rank=2)
    old, new = SalrFile(three), sound(mine)
    common = set(old.tensors) & set(new.tensors) - {"salr.manifest"}
    assert set(old.tensors) - common - {"salr.manifest"} == {n for n in old.tensors if n.endswith((".a", ".b"))}
    assert all(old.manifest.checksums[name] == new.manifest.checksums[name] for name in common)


def stacked_experts(draft):
    """Give the golden file's experts two trained adapters of ranks 1 and 2, and return the sum of their products."""
    module, rng = "layers.1.experts.up", np.random.default_rng(0)
    total = np.zeros((2, 3, 10))
    for name, rank, scaling in (("x", 1, 0.5), ("y", 2, 3.0)):
        lora_a = rng.normal(size=(2, rank, 10)).astype(np.float32)
        lora_b = rng.normal(size=(2, 3, rank)).astype(np.float32)
        draft.put(f"{module}.lora_A.{name}", lora_a, dtype="F32", shape=lora_a.shape)
        draft.put(f"{module}.lora_B.{name}", lora_b, dtype="F32", shape=lora_b.shape)
        entry = {"name": name, "rank": rank, "scaling": scaling, "alpha": 1.0, "origin": "x", "converted": None}
        draft.module(module)["adapters"].append(entry)
        total += scaling * (lora_b.astype(np.float64) @ lora_a.astype(np.float64))
    return module, total


@pytest.mark.parametrize("rank", [None, 2])
def test_adapters_of_stacked_experts_merge_expert_by_expert(draft, tmp_path, rank):
    module, total = stacked_experts(draft)
    path = draft.write(tmp_path / "experts.salr")
    merge_adapters(path, ["x", "y"], "m", rank=rank)
    lost = 0.0 if rank is None else (np.linalg.svd(total, compute_uv=False)[:, 2:] ** 2).sum()
    found = ((product(sound(path), module, ["m"]) - total) ** 2).sum()
    np.testing.assert_allclose(found, lost, rtol=1e-5, atol=1e-10)


@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 9), st.sampled_from([0.0, 1e-20, 1.0, 1e9])
)
def test_a_fit_of_any_shape_loses_what_the_svd_must_lose(n_rows, n_columns, total, rank, size):
    generator = torch.Generator().manual_seed(n_rows * 100 + total)
    lora_b = torch.randn(n_rows, total, generator=generator, dtype=torch.float64) * size
    lora_a = torch.randn(total, n_columns, generator=generator, dtype=torch.float64)
    rank = min(rank, n_rows, n_columns, total)
    factors = adapter_merging._fit(lora_b, lora_a, rank)
    assert factors.lora_A.shape == (rank, n_columns) and factors.lora_B.shape == (n_rows, rank)
    exact = (lora_b @ lora_a).numpy()
    lost = ((exact - factors.lora_B.astype(np.float64) @ factors.lora_A.astype(np.float64)) ** 2).sum()
    smallest = (np.linalg.svd(exact, compute_uv=False)[rank:] ** 2).sum()
    assert lost <= smallest * 1.001 + 1e-12 * (exact**2).sum() + 1e-60
    np.testing.assert_allclose(factors.error, lost, rtol=1e-3, atol=1e-12 * (exact**2).sum() + 1e-60)


@pytest.mark.parametrize(
    ("names", "into", "rank", "kind", "words"),
    [
        (["a"], "m", None, OptionError, "needed two or more, each once"),
        (["a", "a"], "m", None, OptionError, "needed two or more, each once"),
        (["a", "z"], "m", None, AdapterError, "there is no adapter 'z'"),
        (["a", "residual"], "m", None, AdapterError, "the residual merged into another adapter"),
        (["a", "b"], "c", None, AdapterError, "adapter 'c' exists already"),
        (["a", "b"], "residual", None, AdapterError, "adapter name 'residual', needed 'residual' on both sides"),
        (["a", "b"], "m/n", None, AdapterError, "adapter name 'm/n'"),
        (["a", "b"], "m", 0, OptionError, "rank 0, needed 1 or more"),
    ],
)
def test_a_senseless_merge_is_refused_and_changes_nothing(mine, three, names, into, rank, kind, words):
    with pytest.raises(kind, match=words):
        merge_adapters(mine, names, into, rank=rank)
    assert mine.read_bytes() == three.read_bytes() and [p.name for p in mine.parent.iterdir()] == ["mine.salr"]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38])
def test_factors_that_cannot_be_scaled_are_refused_and_change_nothing(mine, open_draft, value):
    draft = open_draft(mine)
    data = draft.array(f"{Q}.lora_B.a")
    data[:4] = np.frombuffer(np.float32(value).tobytes(), np.uint8)
    draft.put(f"{Q}.lora_B.a", data)
    draft.write(mine)
    scale_adapter(mine, "a", factor=100)
    before = mine.read_bytes()
    with pytest.raises(AdapterError, match=f"'{Q}': factors times their scaling are beyond float32"):
        merge_adapters(mine, ["a", "b"], "m")
    assert mine.read_bytes() == before


def test_an_interrupted_merge_leaves_the_old_file(mine, three, monkeypatch):
    monkeypatch.setattr(adapter_merging, "_merge", lambda *arguments: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        merge_adapters(mine, ["a", "b"], "m")
    assert mine.read_bytes() == three.read_bytes() and [p.name for p in mine.parent.iterdir()] == ["mine.salr"]


def test_a_missing_file_and_an_existing_output_are_refused(three, tmp_path):
    with pytest.raises(FormatError, match="no such file"):
        merge_adapters(tmp_path / "nowhere.salr", ["a", "b"], "m")
    (tmp_path / "out.salr").write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already"):
        merge_adapters(three, ["a", "b"], "m", destination=Destination(tmp_path / "out.salr"))
    assert (tmp_path / "out.salr").read_bytes() == b"old"


def test_bfloat16_factors_of_one_scaling_stay_bfloat16(mine, open_draft):
    draft = open_draft(mine)
    for module in (Q, Q.replace("1", "0", 1)):
        for name in ("a", "b"):
            for factor in ("lora_A", "lora_B"):
                key = f"{module}.{factor}.{name}"
                half = from_float32(draft.array(key).view(np.float32), "BF16")
                draft.put(key, half, dtype="BF16", shape=draft.tensors[key][1])
    before = SalrFile(draft.write(mine))
    merge_adapters(mine, ["b", "a"], "m")
    after = sound(mine)
    assert after.tensors[f"{Q}.lora_A.m"].dtype == "BF16"
    np.testing.assert_allclose(product(after, Q, ["m"]), product(before, Q, "ab"), rtol=0, atol=1e-16)
