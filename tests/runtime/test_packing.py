"""What is packed in torch is what the format's own packing makes, and decodes to the kept weights."""

from __future__ import annotations

import pytest
import torch
from salr.formats.bitmap import pack_bitmap
from salr.formats.values import NF4_CODE_BOOK

from salr.runtime import reference
from salr.runtime.packing import pack


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (5, 64), (7, 65), (4, 300)])
@pytest.mark.parametrize(("encoding", "error"), [("bf16", 2**-8), ("fp16", 2**-10), ("fp32", 0.0)])
def test_kept_weights_come_back_rounded_to_the_encoding(shape, encoding, error):
    torch.manual_seed(shape[1])
    weight, kept = torch.randn(shape), torch.rand(shape) < 0.5
    packed = pack(weight, kept, encoding)
    assert (packed.bitmap.numpy() == pack_bitmap(kept.numpy())).all()
    assert packed.nnz == int(kept.sum()) and packed.row_offsets.tolist()[-1] == packed.nnz
    n_bytes = packed.values.numel() * packed.values.element_size()
    assert n_bytes % 64 == 0 and n_bytes >= packed.nnz * packed.values.element_size() + 64
    torch.testing.assert_close(reference.dense(packed), weight * kept, rtol=error, atol=0)


@pytest.mark.parametrize("shape", [(3, 63), (4, 128), (4, 300)])
def test_quantized_weights_come_back_within_half_a_step(shape):
    torch.manual_seed(shape[1])
    weight, kept = torch.randn(shape), torch.rand(shape) < 0.7
    most = (weight * kept).abs().max()
    error = (reference.dense(pack(weight, kept, "int8")) - weight * kept).abs().max()
    assert 0 < error <= most / 127 * 0.51
    step = float(abs(NF4_CODE_BOOK[1:] - NF4_CODE_BOOK[:-1]).max())
    error = (reference.dense(pack(weight, kept, "nf4")) - weight * kept).abs().max()
    assert 0 < error <= most * (step / 2 + 1e-3)
    assert not reference.dense(pack(weight, kept, "int8"))[~kept].any()


def test_a_matrix_with_nothing_kept_is_all_zeros():
    for encoding in ("bf16", "int8", "nf4"):
        assert not reference.dense(pack(torch.randn(4, 20), torch.zeros(4, 20, dtype=torch.bool), encoding)).any()
