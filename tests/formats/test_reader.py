"""The reader: lazy, read-only, and the same numbers whether a module is read whole, in parts or adapter by adapter."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from salr.formats.errors import FormatError, SalrError
from salr.formats.manifest import MANIFEST_NAME
from salr.formats.reader import SalrFile
from salr.formats.validation import ZERO_DIGEST, digest, header_digest

Q, K, UP, DOWN, GATE = (
    "layers.0.attn.q",
    "layers.0.attn.k",
    "layers.0.mlp.up",
    "layers.0.mlp.down",
    "layers.0.mlp.gate",
)
EXPERTS = "layers.1.experts.up"
MODULES = [Q, K, UP, DOWN, GATE, EXPERTS]
spans = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda ends: slice(*sorted(ends)))


@pytest.fixture(scope="module")
def file(golden):
    return SalrFile(golden)


@pytest.mark.parametrize("name", MODULES)
def test_dense_is_the_base_plus_what_is_asked_for(file, name):
    base = file.dense(name, residual=False)
    names = [adapter.name for adapter in file.modules[name].adapters]
    np.testing.assert_array_equal(file.dense(name), base + file.adapters(name, ["residual"]).product())
    np.testing.assert_array_equal(file.dense(name, adapters=True), base + file.adapters(name).product())
    trained = [name for name in names if name != "residual"]
    expected = base + file.adapters(name, trained).product()
    np.testing.assert_array_equal(file.dense(name, residual=False, adapters=True), expected)


@pytest.mark.parametrize("name", MODULES)
def test_the_concatenated_adapters_are_the_sum_of_the_pairs(file, name):
    stack = file.adapters(name)
    expected = np.zeros(file.modules[name].shape, np.float64)
    for adapter in file.modules[name].adapters:
        part = stack.ranks[adapter.name]
        assert part.stop - part.start == adapter.rank
        expected += file.adapters(name, [adapter.name]).product()
    assert stack.lora_A.shape[-2] == stack.lora_B.shape[-1] == stack.scaling.size
    np.testing.assert_allclose(stack.product(), expected, rtol=1e-6, atol=1e-6)


def test_a_module_without_adapters_has_a_stack_of_rank_0(file):
    stack = file.adapters(K)
    assert (stack.lora_A.shape, stack.lora_B.shape, stack.ranks) == ((0, 8), (3, 0), {})
    assert not stack.product().any()


def test_the_adapters_stand_in_the_manifests_order(file):
    assert file.adapters(Q).ranks == {"residual": slice(0, 2), "style": slice(2, 3)}


@given(spans, spans, st.sampled_from([Q, K, GATE, EXPERTS]))
def test_a_slice_is_the_same_part_of_the_dense_matrix(golden, rows, columns, name):
    file = SalrFile(golden)
    expected = file.dense(name, residual=False)[..., rows, columns]
    assume(expected.size)
    part = file.slice(name, rows=rows, columns=columns)
    np.testing.assert_array_equal(part.dense(), expected)
    np.testing.assert_array_equal(part.mask(), file.module(name).mask()[..., rows, columns])
    assert part.entry.nnz == part.mask().sum() and part.entry.shape == expected.shape


@pytest.mark.parametrize(("name", "group"), [(UP, 4), (DOWN, 3)])
def test_a_slice_of_a_quantized_module_keeps_its_scales(file, name, group):
    whole = file.dense(name, residual=False)
    for rows in (slice(0, 1), slice(1, None), slice(None)):
        for columns in (slice(0, group), slice(group, None), slice(group, 2 * group), slice(None), slice(0, 5)):
            part = file.slice(name, rows=rows, columns=columns)
            np.testing.assert_array_equal(part.dense(), whole[rows, columns])


def test_a_slice_inside_a_group_of_scales_is_refused(file):
    with pytest.raises(SalrError, match="group"):
        file.slice(UP, columns=slice(2, 8))


@pytest.mark.parametrize("columns", [slice(3, 3), slice(9, 12), slice(0, 9, 2), slice(None, None, -1), slice(5, 2)])
def test_a_slice_that_is_empty_or_has_gaps_is_refused(file, columns):
    with pytest.raises(FormatError, match=rf"golden_v1.salr: tensor '{Q}': slice .*, needed one run, not empty"):
        file.slice(Q, columns=columns)
    with pytest.raises(FormatError, match="slice 2:2:1"):
        file.slice(Q, rows=slice(2, 2))


def test_a_slice_across_fours_is_no_longer_2_4(file):
    assert file.slice(K, columns=slice(4, 8)).entry.pattern == "2:4"
    assert file.slice(K, columns=slice(2, 8)).entry.pattern == "unstructured"


def test_a_slice_has_row_offsets_and_padding_of_its_own(file):
    part = file.slice(Q, rows=slice(2, 5), columns=slice(4, 9))
    assert part.row_offsets.tolist() == [0, 5, 6, 6]
    assert part.bitmap.tolist() == [[0b11111], [0b10000], [0]]
    assert part.values.nbytes % 64 == 0 and not part.values[6:].any() and part.stored().size == 6


@pytest.mark.parametrize("name", [Q, UP, EXPERTS])
def test_what_the_reader_hands_out_is_read_only(file, name):
    tensors = file.module(name)
    for array in (tensors.values, tensors.bitmap, tensors.row_offsets, file.pairs(name)[0].lora_A):
        with pytest.raises(ValueError, match="read-only"):
            array[..., 0] = 1


@pytest.mark.parametrize("ask", ["module", "dense", "adapters", "pairs", "slice", "module_tensor_names"])
def test_asking_for_a_module_that_is_not_there_names_it(file, ask):
    with pytest.raises(FormatError, match="tensor 'nowhere': there is no packed module of this name"):
        getattr(file, ask)("nowhere")


def test_every_tensor_is_a_modules_or_kept_or_an_asset_or_the_manifest(file):
    packed = [name for module in file.modules for name in file.module_tensor_names(module)]
    assets = [f"assets/{name}" for name in file.assets]
    assert sorted([*packed, *assets, *file.dense_tensors(), "salr.manifest"]) == sorted(file.tensors)


def test_a_masks_count_is_nnz_in_every_module(file):
    for name, entry in file.modules.items():
        assert file.module(name).mask().sum() == entry.nnz
        assert file.module(name).mask().shape == entry.shape


def test_opening_reads_no_module(draft, tmp_path):
    draft.put(f"{Q}.row_offsets", np.zeros(6, np.uint64))
    file = SalrFile(draft.write(tmp_path / "f.salr"))
    assert file.modules[Q].nnz == 16
    with pytest.raises(FormatError):
        file.module(Q)


def shuffled(file: SalrFile) -> bytes:
    """Return the same file with its tensors in another order, at odd positions."""
    metadata = {
        "salr_version": "1",
        "salr_manifest_xxh3": digest(file.raw(MANIFEST_NAME)),
        "salr_header_xxh3": ZERO_DIGEST,
    }
    header, body = {"__metadata__": metadata}, b""
    for name in sorted(file.tensors, key=lambda name: name[::-1]):
        tensor, begin = file.tensors[name], len(body)
        body += bytes(file.raw(name))
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, len(body)]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (1 - len(text) % 2)
    text = text.replace(b'xxh3":"' + ZERO_DIGEST.encode(), b'xxh3":"' + header_digest(text, ZERO_DIGEST).encode())
    return len(text).to_bytes(8, "little") + text + body


def test_a_file_in_any_tensor_order_and_alignment_reads_the_same(file, tmp_path):
    (tmp_path / "odd.salr").write_bytes(shuffled(file))
    odd = SalrFile(tmp_path / "odd.salr")
    assert any(tensor.begin % 2 for tensor in odd.tensors.values())
    assert [problem for _, problem in odd.check_all() if problem] == []
    for name in MODULES:
        np.testing.assert_array_equal(odd.dense(name, adapters=True), file.dense(name, adapters=True))
