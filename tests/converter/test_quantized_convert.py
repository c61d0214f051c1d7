"""Whole conversions with smaller values: every encoding by every method reads back to exactly what was measured."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from salr.converter.execution.packing import pack_module
from salr.converter.execution.threads import one_thread_each
from salr.converter.module_options import VALUES, parse_override
from salr.converter.pipeline import plan_conversion
from salr.formats.errors import FormatError, OptionError
from salr.formats.values import encode_quantized, encoded_bytes

import salr

METHODS = ["magnitude", "alternating", "wanda", "sparsegpt", "joint"]
PATTERNS = {"unstructured": 0.55, "2:4": 0.5, "dense": 0.0}
#: the seven layers of a block, each stored in another way; 20 columns a scale divide neither 48 nor 40 columns
LAYERS = {
    "q_proj": "values=int8,group_size=20",
    "k_proj": "values=nf4,group_size=20",
    "v_proj": "values=bf16",
    "o_proj": "values=fp16,adapter_values=int8",
    "gate_proj": "values=fp32",
    "up_proj": "values=int8,group_size=128,adapter_values=int8",
    "down_proj": "values=nf4,group_size=1,adapter_values=int8",
}
OVERRIDES = tuple(parse_override(f"*.{layer} {settings}") for layer, settings in LAYERS.items())
GATE = "model.layers.0.mlp.gate_proj"


# --- every method, pattern and encoding -------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(m, p) for m in METHODS for p in PATTERNS], ids="-".join)
def mixed(request, block, tmp_path_factory, options_of):
    """Return a file of one method and pattern, its seven layers stored in seven ways, and method and pattern."""
    method, pattern = request.param
    out = tmp_path_factory.mktemp("mixed") / "m.salr"
    kind = {"pattern": "2:4"} if pattern == "2:4" else {}
    options = options_of(method, PATTERNS[pattern], overrides=OVERRIDES, **kind)
    salr.convert(block, out, options)
    return salr.open(out), method, pattern


def test_each_layer_is_stored_as_it_was_set(mixed):
    file, _, pattern = mixed
    assert len(file.modules) == 7
    for name, entry in file.modules.items():
        wanted = parse_override(f"x {LAYERS[name.rpartition('.')[2]]}")[1]
        quantized = wanted["values"] in ("int8", "nf4")
        assert (entry.encoding, entry.pattern) == (wanted["values"], pattern)
        assert entry.group_size == (wanted["group_size"] if quantized else None)
        has_residual = quantized or pattern != "dense"
        assert [(a.name, a.rank, a.scaling) for a in entry.adapters] == [("residual", 4, 1.0)] * has_residual
        names = [tensor for tensor in file.tensors if tensor.startswith(f"{name}.")]
        if has_residual:
            dtype = "I8" if wanted.get("adapter_values") == "int8" else "BF16"
            assert {file.tensors[f"{name}.lora_{side}.residual"].dtype for side in "AB"} == {dtype}
            assert (f"{name}.rank_scales.residual" in names) == (dtype == "I8")
        assert (f"{name}.bitmap" in names) == (f"{name}.row_offsets" in names) == (pattern != "dense")
        assert (f"{name}.scales" in names) == quantized


def test_each_layer_keeps_the_exact_number(mixed):
    file, method, pattern = mixed
    for name, entry in file.modules.items():
        mask = file.module(name).mask()
        assert entry.nnz == mask.sum()
        if pattern == "2:4":
            assert (mask.reshape(-1, 4).sum(1) == 2).all()
        elif pattern == "dense":
            assert mask.all()
        elif method in ("alternating", "wanda", "joint"):
            assert set(mask.sum(1)) == {entry.n_columns - entry.n_columns * 55 // 100}
        else:
            assert entry.nnz == entry.n_weights - entry.n_weights * 55 // 100


def test_the_manifests_errors_are_those_of_the_file_read_back(mixed, block, check_errors, check_scales):
    check_errors(mixed[0], block)
    assert len(check_scales(mixed[0])) == 4


def test_verify_finds_nothing_wrong(mixed, block, complaints):
    assert complaints(mixed[0], block) == []


def test_the_residual_repairs_rounding_too(mixed, block, oriented, check_scales):
    file, *_ = mixed
    for name in check_scales(file):
        weight = oriented(block, file.modules[name])
        without, with_residual = (((weight - file.dense(name, residual=r)) ** 2).sum() for r in (False, True))
        assert with_residual < without or without == 0


def test_values_from_tells_which_values_follow_from_the_source(mixed):
    file, method, pattern = mixed
    fitted = {"magnitude": "source", "wanda": "source", "alternating": "source_minus_residual"}.get(method, "refit")
    for entry in file.modules.values():
        if entry.group_size is not None:
            assert entry.values_from == ("source" if method in ("magnitude", "wanda") else "refit")
        else:
            assert entry.values_from == ("source" if pattern == "dense" else fitted)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_values_of_a_whole_model_follow_from_the_source(values, sparsity, block32, quantize, oriented):
    file = quantize(block32, values=values, sparsity=sparsity, group_size=20, adapter_values="int8")
    encoding = "fp32" if values == "source" else values
    floats = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for name, entry in file.modules.items():
        tensors, kept = file.module(name), file.module(name).mask()
        weight = torch.from_numpy(oriented(block32, entry).astype(np.float32))
        assert entry.encoding == encoding and tensors.stored().nbytes == encoded_bytes(encoding, entry.nnz)
        if encoding in floats:
            expected = weight.to(floats[encoding]).float().numpy()[kept]
            np.testing.assert_array_equal(tensors.dense()[kept], expected)
        else:
            each = np.repeat(tensors.scales, 20, 1)[:, : entry.n_columns]
            codes = encode_quantized(weight.numpy()[kept], each[kept], encoding)
            np.testing.assert_array_equal(tensors.stored(), codes)


def test_fewer_bits_cost_more_error_and_less_space(block32, quantize):
    files = {v: quantize(block32, f"{v}.salr", values=v, sparsity=0.0) for v in ("fp32", "bf16", "int8", "nf4")}
    errors = [sum(e.error.residual for e in file.modules.values()) for file in files.values()]
    sizes = [sum(file.tensors[f"{name}.values"].n_bytes for name in file.modules) for file in files.values()]
    assert errors == sorted(errors) and errors[0] == 0 < errors[1]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


@pytest.mark.parametrize("method", ["magnitude", "alternating"])
def test_the_file_holds_exactly_the_matrices_that_were_measured(method, block, calibration, tmp_path, options_of):
    options = options_of(method, overrides=OVERRIDES)
    if method == "alternating":  # without data, so that each module can be packed by itself
        options = dataclasses.replace(options, calibration=calibration("none"))
    salr.convert(block, tmp_path / "m.salr", options)
    file, plan = salr.open(tmp_path / "m.salr"), plan_conversion(block, options)
    with one_thread_each(1) as pool:
        for planned in plan.modules:
            packed = pool.submit(pack_module, planned, plan.checkpoint, options, torch.device("cpu")).result()
            assert packed.entry == file.modules[planned.name]
            for name, array in packed.tensors.items():
                assert array.tobytes() == bytes(file.raw(name)), name
            whole = packed.matrices[0].weight().numpy()
            sparse = dataclasses.replace(packed.matrices[0], factors=None).weight().numpy()
            np.testing.assert_array_equal(file.dense(planned.name, residual=False), sparse)
            np.testing.assert_allclose(file.dense(planned.name), whole, rtol=0, atol=1e-6 * np.abs(whole).max())


@pytest.mark.parametrize("method", ["magnitude", "joint"])
def test_one_and_two_workers_give_the_same_bytes(method, block, quantize):
    for workers in (1, 2):
        quantize(block, f"{workers}.salr", method=method, overrides=OVERRIDES, workers=workers)
    folder = quantize(block, "again.salr", method=method, overrides=OVERRIDES).path.parent
    assert len({(folder / f"{name}.salr").read_bytes() for name in ("1", "2", "again")}) == 1


# --- other shapes of models -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "values"),
    [("gpt2", "int8"), ("gpt2", "nf4"), ("moe", "nf4"), ("stacked_moe", "int8"), ("stacked_moe", "nf4"),
     ("tied_llama", "nf4"), ("llama16", "int8")],
)  # fmt: skip
def test_every_kind_of_model_agrees_with_its_source(
    model, values, request, quantize, complaints, check_errors, check_scales
):
    source = request.getfixturevalue(model)
    file = quantize(source, values=values, group_size=20)
    assert {entry.encoding for entry in file.modules.values()} == {values}
    assert complaints(file, source) == []
    check_errors(file, source)
    check_scales(file)


@pytest.mark.parametrize("values", ["int8", "nf4"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_stacked_experts_have_scales_of_their_own(values, sparsity, stacked_moe, quantize, oriented):
    file = quantize(stacked_moe, values=values, sparsity=sparsity, group_size=20)
    stacked = {name: entry for name, entry in file.modules.items() if len(entry.shape) == 3}
    assert len(stacked) == 4
    for name, entry in stacked.items():
        tensors, mask = file.module(name), file.module(name).mask()
        assert tensors.scales.shape == (*entry.shape[:2], -(-entry.shape[2] // 20))
        assert not np.array_equal(tensors.scales[0], tensors.scales[1])
        weight = oriented(stacked_moe, entry).astype(np.float32)
        each = np.repeat(tensors.scales, 20, -1)[..., : entry.n_columns]
        np.testing.assert_array_equal(tensors.stored(), encode_quantized(weight[mask], each[mask], values))


def test_an_int8_residual_of_stacked_experts_is_refused_by_name_with_a_fix_that_works(
    stacked_moe, quantize, tmp_path, complaints
):
    overrides = []
    for _ in range(4):
        with pytest.raises(OptionError, match=r"adapter_values int8 for stacked experts") as error:
            quantize(stacked_moe, values="nf4", adapter_values="int8", overrides=tuple(overrides))
        assert "experts" in error.value.tensor and not (tmp_path / "m.salr").exists()
        overrides.append(parse_override(error.value.fix.removeprefix("--set ").strip("'")))
        assert overrides[-1][0] == error.value.tensor
    file = quantize(stacked_moe, values="nf4", adapter_values="int8", overrides=tuple(overrides))
    dtypes = {file.tensors[f"{name}.lora_A.residual"].dtype: len(entry.shape) for name, entry in file.modules.items()}
    assert dtypes == {"F32": 3, "I8": 2} and complaints(file, stacked_moe) == []


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_a_note_tells_which_quantized_modules_saw_no_data(sparsity, stacked_moe, options_of, tmp_path):
    report = salr.convert(stacked_moe, tmp_path / "m.salr", options_of("joint", sparsity, values="nf4"))
    assert [note for note in report.notes if note.startswith("4 modules saw no calibration data")]


def test_rank_0_needs_no_int8_factors_even_for_stacked_experts(stacked_moe, quantize):
    file = quantize(stacked_moe, values="nf4", adapter_values="int8", rank=0)
    assert not [name for name in file.tensors if "lora" in name or "rank_scales" in name]


def test_scope_global_can_leave_a_module_nothing_at_all(block32, quantize, changed, complaints, check_errors):
    source = changed(block32, GATE, lambda weight: weight * 2**-9)
    file = quantize(source, values="nf4", scope="global", sparsity=0.6)
    assert file.modules[GATE].nnz == 0 and not file.module(GATE).scales.any()
    assert len({entry.nnz / entry.n_weights for entry in file.modules.values()}) > 3
    total = sum(entry.n_weights for entry in file.modules.values())
    assert sum(entry.nnz for entry in file.modules.values()) == total - total * 6 // 10
    assert complaints(file, source) == []
    check_errors(file, source)


@pytest.mark.parametrize("method", METHODS)
def test_rows_and_columns_of_zeros_stay_zeros(method, block32, quantize, changed, complaints):
    def with_zeros(weight):
        weight[3], weight[:, 20:40] = 0, 0
        return weight

    source = changed(block32, GATE, with_zeros)
    file = quantize(source, method=method, values="nf4", group_size=20, rank=0, exclude=("*.self_attn.*",))
    dense = file.dense(GATE)
    assert np.isfinite(dense).all() and complaints(file, source) == []
    if method in ("magnitude", "alternating", "wanda"):  # others make up for what came before
        assert not dense[3].any() and not dense[:, 20:40].any() and not file.module(GATE).scales[3].any()


# --- trained adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "values"), [("magnitude", "int8"), ("joint", "nf4")])
def test_trained_adapters_stay_bit_exact_beside_quantized_values(
    method, values, block32, make_lora, quantize, complaints
):
    lora = make_lora(block32)
    adapters = (("a", lora),)
    settings = {"values": values, "group_size": 20, "adapter_values": "int8", "adapters": adapters}
    file = quantize(block32, method=method, exclude=("*.down_proj",), **settings)
    trained = load_file(lora / "adapter_model.safetensors")
    assert len(trained) == 4
    for key, factor in trained.items():
        module, side = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        assert file.tensors[f"{module}.{side}.a"].dtype == "F32"
        assert bytes(file.raw(f"{module}.{side}.a")) == factor.numpy().tobytes()
        if side == "lora_A":
            update = 1.5 * trained[key.replace("lora_A", "lora_B")].numpy() @ factor.numpy()
            found = file.dense(module, adapters=True) - file.dense(module)
            np.testing.assert_allclose(found, update, atol=1e-5)
    assert complaints(file, block32, adapters) == []
    # what is only adapted, not packed, stays as it was
    only_adapted = file.modules["model.layers.0.mlp.down_proj"]
    assert (only_adapted.encoding, only_adapted.pattern, only_adapted.error.residual) == ("fp32", "dense", 0.0)


# --- parts of a file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", ["int8", "nf4"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_part_of_a_converted_module_decodes_to_that_part(values, pattern, block, quantize):
    kind = {"pattern": "2:4"} if pattern == "2:4" else {}
    file = quantize(block, values=values, group_size=10, sparsity=PATTERNS[pattern], **kind)
    whole = file.module(GATE).dense()
    for rows in (slice(None), slice(0, 1), slice(7, 22), slice(39, 40)):
        for columns in (slice(None), slice(0, 10), slice(10, 48), slice(20, 37), slice(40, 48)):
            part = file.slice(GATE, rows=rows, columns=columns)
            np.testing.assert_array_equal(part.dense(), whole[rows, columns])
            assert part.entry.nnz == part.mask().sum() and part.entry.shape == whole[rows, columns].shape
            assert part.scales.shape == (part.entry.shape[0], -(-part.entry.shape[1] // 10))
            assert not part.values[encoded_bytes(values, part.entry.nnz) :].any() and part.values.nbytes % 64 == 0
            # a part is canonical: its own part is the same again
            again = part.part(slice(None), slice(None))
            np.testing.assert_array_equal(again.values, part.values)


def test_a_part_that_begins_inside_a_group_of_scales_is_refused(block, quantize):
    file = quantize(block, values="nf4", group_size=10)
    with pytest.raises(FormatError, match="a slice from column 5, needed a multiple of group_size 10"):
        file.slice(GATE, columns=slice(5, 20))


# --- what was changed afterwards is found -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["magnitude", "joint"])
def small(request, block, options_of, tmp_path_factory):
    """Return a file with nf4 values and int8 factors of one method, and the method."""
    out = tmp_path_factory.mktemp("small") / "m.salr"
    salr.convert(block, out, options_of(request.param, values="nf4", group_size=20, adapter_values="int8"))
    return out, request.param


@pytest.mark.parametrize("tensor", ["values", "scales", "lora_B.residual", "rank_scales.residual"])
def test_a_changed_quantized_tensor_is_found(tensor, small, block, complaints, open_draft, tmp_path):
    path, method = small
    draft = open_draft(path)
    data = draft.array(f"{GATE}.{tensor}")
    if tensor == "values":
        data[:40] ^= 0x88
    elif tensor == "lora_B.residual":
        data[:] = 0 - data
    else:
        data.view(np.float16 if tensor == "scales" else np.float32)[:] /= 2
    draft.put(f"{GATE}.{tensor}", data)
    problems = complaints(salr.open(draft.write(tmp_path / "edited.salr")), block)
    follows = method == "magnitude" and tensor in ("values", "scales")
    assert len(problems) == 1 and f"tensor '{GATE}'" in problems[0]
    assert ("kept values" if follows else "its residual error is") in problems[0]
