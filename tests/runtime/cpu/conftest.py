"""Packed weights of any encoding and shape, made with the format's own functions, and a compile cache of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from salr.formats.bitmap import pack_bitmap, row_offsets
from salr.formats.values import encode_quantized, pad_values

from salr.runtime.packed import PackedWeight

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compile into a folder of this session, so that no earlier object hides a change."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("SALR_CACHE")
    os.environ["SALR_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["SALR_CACHE"]
    else:
        os.environ["SALR_CACHE"] = before


def encoded(kept: torch.Tensor, scales: np.ndarray | None, encoding: str) -> torch.Tensor:
    """Return kept weights (nnz,) as a padded values tensor."""
    if scales is not None:
        return torch.from_numpy(pad_values(encode_quantized(kept.numpy(), scales, encoding), encoding, kept.numel()))
    stored = kept.to(FLOATS[encoding])
    bits = stored.view({2: torch.int16, 4: torch.int32}[stored.element_size()]).numpy()
    padded = pad_values(bits.view(f"u{bits.itemsize}"), encoding, kept.numel())
    return torch.from_numpy(padded.view(np.uint8)).view(FLOATS[encoding])


@pytest.fixture(scope="session")
def make_weight() -> Callable[..., PackedWeight]:
    """Return a function that makes an (N, K) matrix with an empty row, a full row and random others."""

    def make(
        n_rows: int,
        n_columns: int,
        encoding: str,
        density: float = 0.5,
        group_size: int = 128,
        dense: bool = False,
        seed: int = 0,
    ) -> PackedWeight:
        random = np.random.default_rng(seed)
        mask = random.random((n_rows, n_columns)) < density
        if 0 < density < 1:
            mask[-1], mask[n_rows // 2] = True, False
        mask |= dense
        weights = random.standard_normal((n_rows, n_columns)).astype(np.float32)
        scales = None
        if encoding not in FLOATS:
            largest = 3 / 127 if encoding == "int8" else 3
            scales = ((random.random((n_rows, -(-n_columns // group_size))) + 0.5) * largest).astype(np.float32)
        each = None if scales is None else np.repeat(scales, group_size, 1)[:, :n_columns][mask]
        bitmap = pack_bitmap(mask)
        return PackedWeight(
            n_rows=n_rows,
            n_columns=n_columns,
            nnz=int(mask.sum()),
            encoding=encoding,
            pattern="dense" if dense else "unstructured",
            values=encoded(torch.from_numpy(weights[mask]), each, encoding),
            bitmap=None if dense else torch.from_numpy(bitmap),
            row_offsets=None if dense else torch.from_numpy(row_offsets(bitmap).view(np.int64)),
            scales=None if scales is None else torch.from_numpy(scales),
            group_size=None if scales is None else group_size,
        )

    return make
