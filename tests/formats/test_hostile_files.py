"""One hostile file for each rule of validation: every digest is right, one thing is wrong, and the error says which."""

from __future__ import annotations

import numpy as np
import pytest
from salr.formats.errors import ChecksumError, FormatError, VersionError
from salr.formats.reader import SalrFile

Q, K, UP, DOWN, GATE = (
    "layers.0.attn.q",
    "layers.0.attn.k",
    "layers.0.mlp.up",
    "layers.0.mlp.down",
    "layers.0.mlp.gate",
)
EXPERTS = "layers.1.experts.up"


@pytest.fixture
def refuse(draft, tmp_path):
    """Return a function that writes the draft and expects opening, or reading ``module``, to fail as described."""

    def check(kind: type[Exception], *words: str, module: str | None = None) -> None:
        path = draft.write(tmp_path / "hostile.salr")
        if module is None:
            with pytest.raises(kind) as error:
                SalrFile(path)
        else:
            file = SalrFile(path)
            with pytest.raises(kind) as error:
                file.module(module)
            with pytest.raises(kind):
                file.dense(module)
            assert str(error.value) in [str(problem) for _, problem in file.check_all()]
        message = str(error.value)
        assert type(error.value) is kind and message.startswith(f"{path}: ")
        for word in words:
            assert word in message

    return check


def test_the_untouched_draft_is_sound(draft, golden, tmp_path):
    path = draft.write(tmp_path / "same.salr")
    assert path.read_bytes() == golden.read_bytes()


# --- version and digests ---------------------------------------------------------------------------------------------


def test_a_plain_safetensors_file_is_no_salr_file(draft, refuse):
    draft.metadata = {"salr_version": None}
    refuse(FormatError, "without salr_version", "needed a .salr file", "salr convert")


def test_another_version_is_refused_by_its_number(draft, refuse):
    draft.metadata = {"salr_version": "2"}
    refuse(VersionError, "version '2'", "needed version 1", "upgrade salr")


@pytest.mark.parametrize("stored", [None, "", "0" * 32, "0" * 31, "é" * 32])
def test_a_wrong_or_missing_header_digest_is_seen(draft, refuse, stored):
    draft.metadata = {"salr_header_xxh3": stored}
    refuse(ChecksumError, "the header's digest does not match")


@pytest.mark.parametrize("stored", [None, "", "f" * 32])
def test_a_wrong_or_missing_manifest_digest_is_seen(draft, refuse, stored):
    draft.metadata = {"salr_manifest_xxh3": stored}
    refuse(ChecksumError, "the manifest's digest does not match")


def test_a_manifest_of_another_dtype_is_none(draft, refuse):
    draft.manifest_dtype = "I8"
    refuse(FormatError, "tensor 'salr.manifest': there is no manifest")


def test_a_file_without_a_manifest_is_refused(tmp_path):
    from safetensors.numpy import save_file
    from salr.formats.container import Container
    from salr.formats.validation import ZERO_DIGEST, header_digest

    path, metadata = tmp_path / "hostile.salr", {"salr_version": "1", "salr_header_xxh3": ZERO_DIGEST}
    save_file({"a": np.zeros(8, np.float32)}, path, metadata=metadata)
    seal = header_digest(Container(path).header_bytes, ZERO_DIGEST)
    path.write_bytes(
        path.read_bytes().replace(b'"salr_header_xxh3":"' + b"0" * 32, b'"salr_header_xxh3":"' + seal.encode())
    )
    with pytest.raises(FormatError, match=r"hostile.salr: tensor 'salr.manifest': there is no manifest"):
        SalrFile(path)


def test_a_tensor_without_a_digest_is_named(draft, refuse):
    del draft.manifest["checksums"]["norm.weight"]
    refuse(FormatError, "tensor 'norm.weight'", "has no digest in the manifest")


def test_a_digest_without_its_tensor_is_named(draft, refuse):
    draft.manifest["checksums"]["ghost"] = "0" * 32
    refuse(FormatError, "tensor 'ghost'", "is missing from the file")


def test_a_wrong_digest_of_a_tensor_is_found_by_the_full_check(draft, tmp_path):
    draft.manifest["checksums"]["norm.weight"] = "0" * 32
    file = SalrFile(draft.write(tmp_path / "hostile.salr"))
    problems = [(name, problem) for name, problem in file.check_all() if problem]
    assert [name for name, _ in problems] == ["norm.weight"]
    assert type(problems[0][1]) is ChecksumError and "hostile.salr: tensor 'norm.weight': its bytes differ" in str(
        problems[0][1]
    )


# --- what the manifest implies, against the header -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        f"{Q}.values", f"{Q}.bitmap", f"{Q}.row_offsets", f"{Q}.lora_A.residual", f"{Q}.lora_B.style",
        f"{UP}.scales", f"{UP}.rank_scales.residual", f"{DOWN}.scales", f"{GATE}.values", f"{EXPERTS}.lora_B.residual",
    ],
)  # fmt: skip
def test_each_missing_tensor_of_a_module_is_named(draft, refuse, name):
    draft.drop(name)
    refuse(FormatError, f"tensor '{name}': is missing from the file")


def other_dtype(dtype: str) -> str:
    return {"U8": "I8", "I8": "U8", "BF16": "U16", "F16": "I16", "F32": "I32", "U64": "I64"}[dtype]


MODULE_TENSORS = [
    f"{Q}.values", f"{Q}.bitmap", f"{Q}.row_offsets", f"{Q}.lora_A.residual", f"{Q}.lora_B.residual",
    f"{Q}.lora_A.style", f"{Q}.lora_B.style", f"{K}.values", f"{UP}.values", f"{UP}.scales",
    f"{UP}.lora_A.residual", f"{UP}.lora_B.residual", f"{UP}.rank_scales.residual", f"{DOWN}.values", f"{DOWN}.scales",
    f"{GATE}.values", f"{EXPERTS}.values", f"{EXPERTS}.bitmap", f"{EXPERTS}.row_offsets", f"{EXPERTS}.lora_A.residual",
]  # fmt: skip


@pytest.mark.parametrize("name", MODULE_TENSORS)
def test_a_module_tensor_of_another_dtype_is_refused(draft, refuse, name):
    dtype, shape, _ = draft.tensors[name]
    draft.put(name, draft.array(name), dtype=other_dtype(dtype))
    refuse(FormatError, f"tensor '{name}': {other_dtype(dtype)} {list(shape)}", "needed", f"{list(shape)}")


@pytest.mark.parametrize("name", MODULE_TENSORS)
def test_a_module_tensor_of_another_shape_is_refused(draft, refuse, name):
    dtype, shape, _ = draft.tensors[name]
    draft.put(name, draft.array(name), shape=(1, *shape))
    refuse(FormatError, f"tensor '{name}': {dtype} {[1, *shape]}", f"{list(shape)}")


@pytest.mark.parametrize("name", MODULE_TENSORS)
def test_a_module_tensor_of_another_size_is_refused(draft, refuse, name):
    dtype, shape, _ = draft.tensors[name]
    longer = (shape[0] * 2, *shape[1:])
    draft.put(name, np.tile(draft.array(name), 2), shape=longer)
    refuse(FormatError, f"tensor '{name}': {dtype} {list(longer)}", f"{list(shape)}")


def test_a_trained_adapter_may_not_be_int8(draft, refuse):
    draft.put(f"{Q}.lora_A.style", np.zeros((1, 9), np.int8), dtype="I8")
    refuse(FormatError, f"tensor '{Q}.lora_A.style': I8 [1, 9]", "needed BF16 or F16 or F32 [1, 9]")


def test_values_past_the_largest_nnz_are_refused(draft, refuse):
    draft.module(Q)["nnz"] = 46
    refuse(FormatError, f"manifest modules.{Q}.nnz is 46", "needed at most 45")


def test_nnz_that_disagrees_with_the_size_of_values_is_refused(draft, refuse):
    draft.module(Q)["nnz"] = 45
    refuse(FormatError, f"tensor '{Q}.values': BF16 [64]", "needed BF16 [96]")


def test_a_dense_pattern_that_lacks_weights_is_refused(draft, refuse):
    draft.module(GATE)["nnz"] = 5
    refuse(FormatError, f"tensor '{GATE}': nnz 5", "needed 6 in a dense pattern")


@pytest.mark.parametrize("shape", [[10**18, 10**18], [2**63, 2**63], [10**4000, 10**4000], [1, 1], [9, 5]])
def test_a_shape_that_is_not_the_tensors_is_refused(draft, refuse, shape):
    draft.module(Q)["shape"] = shape
    draft.module(Q)["nnz"] = 1
    refuse(FormatError, Q)


def test_a_dense_pattern_of_an_absurd_shape_is_refused(draft, refuse):
    draft.module(GATE).update(shape=[10**4000, 10**4000], nnz=6)
    refuse(FormatError, GATE)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "a/../../b", "a//b", "", ".", "..", "a/", "a\\b", "C:x", "a/./b", "nul\0byte"]
)
def test_an_asset_that_could_leave_its_folder_is_refused(draft, refuse, name):
    draft.put(f"assets/{name}", np.zeros(3, np.uint8))
    refuse(FormatError, f"tensor 'assets/{name}'", "could leave its folder", "needed a plain name")


# --- a module's tensors, against each other --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "offsets",
    [
        [1, 5, 5, 14, 15, 16], [0, 5, 5, 14, 15, 17], [0, 5, 5, 14, 15, 15], [0, 5, 4, 14, 15, 16],
        [0, 2**63, 5, 14, 15, 16], [0, 2**64 - 1, 5, 14, 15, 16], [0, 0, 0, 0, 0, 0],
    ],
    ids=["starts late", "ends late", "ends early", "falls", "leaves values", "wraps around", "all zero"],
)  # fmt: skip
def test_row_offsets_that_do_not_rise_from_0_to_nnz_are_refused(draft, refuse, offsets):
    draft.put(f"{Q}.row_offsets", np.array(offsets, np.uint64))
    refuse(FormatError, f"tensor '{Q}.row_offsets': does not rise from 0 to nnz", "needed 16 at its end", module=Q)


@pytest.mark.parametrize("offsets", [[0, 6, 6, 14, 15, 16], [0, 5, 6, 14, 15, 16], [0, 5, 5, 14, 16, 16]])
def test_row_offsets_that_disagree_with_the_bitmap_are_refused(draft, refuse, offsets):
    draft.put(f"{Q}.row_offsets", np.array(offsets, np.uint64))
    refuse(FormatError, f"tensor '{Q}.bitmap': row", "another number of set bits than row_offsets say", module=Q)


@pytest.mark.parametrize("module", [Q, K, UP, DOWN, EXPERTS])
def test_any_flipped_bit_of_a_bitmap_is_refused(draft, refuse, module):
    bits = draft.array(f"{module}.bitmap")
    bits[-1] ^= 1
    draft.put(f"{module}.bitmap", bits)
    refuse(FormatError, f"tensor '{module}.bitmap': row", module=module)


def test_a_bit_past_the_last_column_is_refused_even_where_the_count_is_right(draft, refuse):
    bits = draft.array(f"{Q}.bitmap").reshape(5, 2)
    bits[3] = [0, 0b10]
    draft.put(f"{Q}.bitmap", bits)
    refuse(FormatError, f"tensor '{Q}.bitmap': bits are set past the last column", module=Q)


@pytest.mark.parametrize(("module", "used"), [(Q, 32), (K, 24), (UP, 10), (DOWN, 4), (GATE, 24), (EXPERTS, 36)])
@pytest.mark.parametrize("end", ["first", "last"])
def test_padding_that_is_not_zero_is_refused(draft, refuse, module, used, end):
    data = draft.array(f"{module}.values")
    data[used if end == "first" else -1] = 1
    draft.put(f"{module}.values", data)
    refuse(FormatError, f"tensor '{module}.values': the padding is not zero", module=module)


def test_a_2_4_module_with_three_kept_weights_in_a_group_is_refused(draft, refuse):
    draft.put(f"{K}.bitmap", np.array([[0b0000_1111], [0b0110_1100], [0b1010_1010]], np.uint8))
    refuse(FormatError, f"tensor '{K}.bitmap'", "2:4", module=K)


def test_a_group_size_far_beyond_the_columns_is_one_group(draft, tmp_path):
    draft.module(DOWN)["group_size"] = 2**62
    draft.put(f"{DOWN}.scales", np.ones((2, 1), np.float32), dtype="F32", shape=(2, 1))
    file = SalrFile(draft.write(tmp_path / "wide.salr"))
    assert file.dense(DOWN)[0, 3] == 1


def test_a_source_tensor_that_is_also_kept_dense_is_refused(draft, refuse):
    draft.put(f"{Q}.weight", np.zeros(3, np.uint8))
    refuse(FormatError, f"tensor '{Q}': source_tensor '{Q}.weight' is also kept dense", "each tensor once")


def test_factors_of_one_adapter_in_two_dtypes_are_refused(draft, refuse):
    draft.put(f"{Q}.lora_B.style", np.zeros((5, 1), np.float16), dtype="F16")
    refuse(FormatError, f"tensor '{Q}.lora_B.style': F16 [5, 1]", "needed F32 [5, 1]")


@pytest.mark.parametrize("part", ["scales", "lora_A.other", "rank_scales.residual"])
def test_a_part_of_a_module_that_its_entry_does_not_call_for_is_refused(draft, refuse, part):
    draft.put(f"{Q}.{part}", np.full(3, 7, np.uint8))
    refuse(FormatError, f"tensor '{Q}.{part}': its module's entry does not call for it")
