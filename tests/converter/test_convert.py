"""A real checkpoint in, a .salr file out: kept weights are the source's bits, sizes are exact, bytes never vary."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from salr.converter.methods.lowrank import truncated_svd

import salr

NEUTRAL = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def convert(source, out, sparsity=0.5, rank=8, **options):
    report = salr.convert(
        source, out, salr.ConvertOptions(salr.ModuleOptions(sparsity, rank), **options, method="magnitude")
    )
    return salr.open(out), report


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(NEUTRAL[tensor.dtype]).numpy()


@pytest.mark.parametrize("model", ["llama", "llama16", "llama32"])
def test_kept_weights_are_the_sources_bits_and_the_largest_magnitudes(model, request, read_tensors, tmp_path):
    source = request.getfixturevalue(model)
    file, _ = convert(source, tmp_path / "m.salr")
    tensors = read_tensors(source)
    assert len(file.modules) == 14
    for name, entry in file.modules.items():
        weight, mask = tensors[f"{name}.weight"], file.module(name).mask()
        assert entry.nnz == mask.sum() == weight.numel() // 2
        np.testing.assert_array_equal(file.module(name).stored().view(bits(weight).dtype), bits(weight)[mask])
        magnitude = weight.float().abs().numpy()
        assert magnitude[mask].min() >= magnitude[~mask].max()
        np.testing.assert_array_equal(file.dense(name, residual=False), np.where(mask, weight.float().numpy(), 0))


@pytest.mark.parametrize("model", ["llama", "llama16", "llama32"])
def test_kept_tensors_and_assets_come_through_bit_for_bit(model, request, read_tensors, tmp_path):
    source = request.getfixturevalue(model)
    file, report = convert(source, tmp_path / "m.salr")
    tensors = read_tensors(source)
    assert sorted(file.dense_tensors()) == sorted(set(tensors) - {f"{name}.weight" for name in file.modules})
    for name in file.dense_tensors():
        np.testing.assert_array_equal(
            np.frombuffer(file.raw(name), bits(tensors[name]).dtype), bits(tensors[name]).ravel()
        )
    assert file.assets == ["LICENSE", "config.json", "generation_config.json", "tokenizer.json"]
    assert all(file.asset(name) == (source / name).read_bytes() for name in file.assets)
    assert (report.n_modules, report.n_kept, report.n_inputs) == (14, 7, 21)


def test_packed_weights_take_their_exact_bytes(packed):
    file = salr.open(packed)
    for name, entry in file.modules.items():
        n_rows, n_columns = entry.shape
        sizes = {key: file.tensors[f"{name}.{key}"].n_bytes for key in ("values", "bitmap", "row_offsets")}
        assert sizes["bitmap"] == n_rows * n_columns // 8 and sizes["row_offsets"] == 8 * (n_rows + 1)
        padding = sizes["values"] + sizes["bitmap"] - 1.125 * entry.n_weights
        assert 64 <= padding < 128
        assert file.tensors[f"{name}.lora_A.residual"].shape == (8, n_columns)
        assert file.tensors[f"{name}.lora_B.residual"].shape == (n_rows, 8)


def test_the_report_adds_up_to_the_file(llama, tmp_path):
    file, report = convert(llama, tmp_path / "m.salr")
    sizes = report.sizes
    total = sum(tensor.n_bytes for name, tensor in file.tensors.items() if name != "salr.manifest")
    assert sizes.file_bytes == (tmp_path / "m.salr").stat().st_size == total + sizes.overhead_bytes
    assert sizes.packed_weights == sum(entry.n_weights for entry in file.modules.values())
    weights = {name: tensor.n_bytes for name, tensor in salr.open(tmp_path / "m.salr").tensors.items()}
    assert sizes.values_bytes == sum(size for name, size in weights.items() if name.endswith(".values"))
    assert sizes.residual_bytes == sum(size for name, size in weights.items() if name.endswith(".residual"))
    assert sizes.source_bytes == sum(tensor.stat().st_size for tensor in llama.glob("*.safetensors")) - header_size(
        llama
    )
    assert sizes.adapter_bytes == sizes.scales_bytes == 0
    assert sizes.bits_per_weight == 8 * sizes.packed_bytes / sizes.packed_weights


def header_size(folder) -> int:
    return 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")


def test_the_file_opens_with_safetensors_and_large_tensors_are_aligned(packed):
    with safe_open(packed, framework="pt") as file:
        assert file.metadata()["salr_version"] == "1"
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16
    tensors = salr.open(packed).tensors.values()
    assert all(
        t.begin % 64 == 0 for t in tensors if t.n_bytes >= 1024 and not t.name.endswith(("row_offsets", "manifest"))
    )
    assert all(t.begin % 8 == 0 for t in tensors if t.name.endswith("row_offsets"))


def test_one_and_two_workers_give_the_same_bytes(llama, packed, tmp_path):
    for workers in (1, 2, 3):
        convert(llama, tmp_path / f"{workers}.salr", workers=workers)
        assert (tmp_path / f"{workers}.salr").read_bytes() == packed.read_bytes()


def test_the_place_of_source_and_output_never_shapes_the_bytes(llama, packed, tmp_path):
    import shutil

    shutil.copytree(llama, tmp_path / "elsewhere")
    (tmp_path / "deep").mkdir()
    convert(tmp_path / "elsewhere", tmp_path / "deep" / "other name.salr")
    assert (tmp_path / "deep" / "other name.salr").read_bytes() == packed.read_bytes()


def test_the_callers_thread_count_is_put_back(llama, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    convert(llama, tmp_path / "m.salr")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_the_residual_is_the_truncated_svd_of_what_the_mask_removed(llama32, read_tensors, tmp_path):
    file, _ = convert(llama32, tmp_path / "m.salr")
    tensors = read_tensors(llama32)
    for name in file.modules:
        weight, mask = tensors[f"{name}.weight"], torch.from_numpy(file.module(name).mask())
        removed = weight.masked_fill(mask, 0)
        expected = torch.linalg.multi_dot(truncated_svd(removed, 8)).numpy()
        found = file.adapters(name, ["residual"]).product()
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 8, 32])
def test_the_manifests_errors_are_measured_and_keep_the_theorems_bound(llama32, read_tensors, tmp_path, rank):
    file, _ = convert(llama32, tmp_path / "m.salr", rank=rank)
    tensors = read_tensors(llama32)
    for name, entry in file.modules.items():
        weight = tensors[f"{name}.weight"].double().numpy()
        energy = (weight**2).sum()
        masked = ((weight - file.dense(name, residual=False)) ** 2).sum() / energy
        remaining = ((weight - file.dense(name)) ** 2).sum() / energy
        bound = masked * (1 - rank / min(entry.shape))
        assert remaining <= bound * (1 + 1e-6) + 1e-12
        found = (entry.error.energy, entry.error.mask, entry.error.residual, entry.error.bound)
        np.testing.assert_allclose(found, (energy, masked, remaining, bound), rtol=1e-4, atol=1e-11)


def test_rank_0_stores_no_residual(llama, tmp_path):
    file, _ = convert(llama, tmp_path / "m.salr", rank=0)
    assert all(entry.adapters == () and entry.error.residual == entry.error.mask for entry in file.modules.values())
    assert not [name for name in file.tensors if "lora" in name]


def test_without_a_rank_64_or_the_short_side_is_used(llama, tmp_path):
    file, _ = convert(llama, tmp_path / "m.salr", rank=None)
    ranks = {min(entry.shape): entry.adapters[0].rank for entry in file.modules.values()}
    assert ranks == {64: 64, 32: 32}


def test_sparsity_0_stores_every_weight_without_a_bitmap(llama, read_tensors, tmp_path):
    file, _ = convert(llama, tmp_path / "m.salr", sparsity=0)
    for name, entry in file.modules.items():
        assert (entry.pattern, entry.nnz, entry.adapters) == ("dense", entry.n_weights, ())
        assert f"{name}.bitmap" not in file.tensors
        np.testing.assert_array_equal(file.dense(name), read_tensors(llama)[f"{name}.weight"].float().numpy())


def test_sparsity_95_percent_keeps_a_twentieth(llama, tmp_path):
    file, _ = convert(llama, tmp_path / "m.salr", sparsity=0.95)
    for entry in file.modules.values():
        assert entry.nnz == entry.n_weights - entry.n_weights * 95 // 100


def test_scope_row_keeps_the_same_number_in_each_row(llama, tmp_path):
    file, _ = convert(llama, tmp_path / "m.salr", sparsity=0.7, scope="row")
    for name, entry in file.modules.items():
        expected = entry.n_columns - entry.n_columns * 7 // 10
        assert set(np.diff(file.module(name).row_offsets)) == {expected}


def test_scope_global_is_one_threshold_over_all_modules(llama32, read_tensors, tmp_path):
    file, _ = convert(llama32, tmp_path / "m.salr", sparsity=0.6, scope="global")
    tensors = read_tensors(llama32)
    flat = torch.cat([tensors[f"{name}.weight"].abs().ravel() for name in file.modules])
    kept = np.concatenate([file.module(name).mask().ravel() for name in file.modules])
    assert kept.sum() == flat.numel() - flat.numel() * 6 // 10
    assert flat.numpy()[kept].min() >= flat.numpy()[~kept].max()
    assert len({entry.nnz / entry.n_weights for entry in file.modules.values()}) > 1


def test_the_mask_is_chosen_on_the_base_alone_even_with_an_adapter(llama32, lora, tmp_path):
    plain, _ = convert(llama32, tmp_path / "plain.salr")
    adapted, _ = convert(llama32, tmp_path / "adapted.salr", adapters=(("a", lora),))
    for name in plain.modules:
        for key in ("bitmap", "values", "lora_A.residual", "lora_B.residual"):
            assert plain.raw(f"{name}.{key}") == adapted.raw(f"{name}.{key}")
    assert sum(len(entry.adapters) for entry in adapted.modules.values()) == 14 + 4


def test_overrides_and_excludes_reach_their_modules_only(llama, tmp_path):
    overrides = (("*.q_proj", {"sparsity": 0.25}), ("re:.*layers\\.1\\..*q_proj", {"rank": 3}))
    file, _ = convert(llama, tmp_path / "m.salr", overrides=overrides, exclude=("*.up_proj",))
    assert not [name for name in file.modules if "up_proj" in name] and len(file.modules) == 12
    for name, entry in file.modules.items():
        assert entry.nnz == entry.n_weights * (3 if "q_proj" in name else 2) // 4
        assert entry.adapters[0].rank == (3 if "layers.1.self_attn.q_proj" in name else 8)


def test_an_include_packs_what_is_kept_otherwise(llama, tmp_path):
    file, _ = convert(llama, tmp_path / "m.salr", include=("lm_head",))
    assert file.modules["lm_head"].nnz == 128 * 64 // 2
    assert "lm_head.weight" not in file.dense_tensors() and len(file.modules) == 15


def test_tied_embeddings_stay_single(tied_llama, tmp_path):
    file, _ = convert(tied_llama, tmp_path / "m.salr")
    assert [name for name in file.tensors if "embed" in name or "lm_head" in name] == ["model.embed_tokens.weight"]
    assert json.loads(file.asset("config.json"))["tie_word_embeddings"] is True


def test_the_manifest_records_what_shaped_the_bytes(packed, llama):
    import hashlib

    manifest = salr.open(packed).manifest
    files = {file["name"]: file["sha256"] for file in manifest.source["files"]}
    for name in ("config.json", "model.safetensors"):
        assert files[name] == hashlib.sha256((llama / name).read_bytes()).hexdigest()
    assert manifest.generator == f"salr {salr.__version__}" and manifest.source["class"] == "LlamaForCausalLM"
    assert (manifest.options["sparsity"], manifest.options["rank"], manifest.options["method"]) == (0.5, 8, "magnitude")
    assert set(manifest.environment) >= {"device", "torch", "numpy", "machine"}
    assert str(llama) not in bytes(salr.open(packed).raw("salr.manifest")).decode()


def test_progress_counts_every_module_once(llama, tmp_path):
    seen = []
    salr.convert(llama, tmp_path / "m.salr", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 14) for done in range(15)]
