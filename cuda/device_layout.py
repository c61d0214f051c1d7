"""The device layout of a packed weight: slabs, as kernels/slabs.cuh defines them, made on the GPU at load.

Invariant: a slab layout holds every kept weight exactly, in the product's 16-bit dtype, or as sign and magnitude, or as
NF4 codes; rows are padded to 256 and columns to 128 with weights that are 0.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .compilation import ENCODINGS, function
from .launching import Launch, address, fields, stream_of

BLOCK_ROWS, SLAB_COLUMNS, UNITS = 256, 64, 16
COLUMN_MULTIPLE = 128
#: of x: what is copied at once
_X_COLUMN_MULTIPLE = 8
HEADER_BYTES, _BITMAP_BYTES, _SCALES_BYTES = 32, 128, 32
#: of shared memory, that a thread block takes beside what a launch asks for: CUDA's own, and barriers
RESERVED_BYTES = 1024 + 512
_DENSE_BYTES = {"dense16": 2048, "dense8": 1024, "dense4": 512}
_PRODUCT_DTYPES = (torch.bfloat16, torch.float16)


class Weight(Protocol):
    """What is needed of a packed weight (see ``salr.runtime.packed.PackedWeight``); it is laid out where it lies."""

    n_rows: int
    n_columns: int
    nnz: int
    encoding: str
    pattern: str
    values: torch.Tensor
    bitmap: torch.Tensor | None
    row_offsets: torch.Tensor | None
    scales: torch.Tensor | None
    group_size: int | None

    def to(self, device: torch.device | str) -> Weight:
        """Return the same weight with its tensors on a device."""
        ...


@dataclass(frozen=True)
class SlabWeight:
    """A weight (N, K) as slabs on a GPU.

    ``slabs`` uint8; ``offsets`` (n_row_blocks * n_slabs + 1,) int32 in units of 16 bytes; ``dtype`` of the product;
    ``pattern`` of what is kept, unstructured or 2:4.
    """

    n_rows: int
    n_columns: int
    encoding: str
    dtype: torch.dtype
    slabs: torch.Tensor
    offsets: torch.Tensor
    largest_slab_bytes: int
    pattern: str = "unstructured"

    @property
    def n_row_blocks(self) -> int:
        """Row blocks of 256 rows."""
        return -(-self.n_rows // BLOCK_ROWS)

    @property
    def n_slabs(self) -> int:
        """Slabs of 64 columns in a row block; even."""
        return padded_columns(self.n_columns) // SLAB_COLUMNS

    @property
    def padded_columns(self) -> int:
        """K, padded: how many columns the slabs have."""
        return padded_columns(self.n_columns)

    @property
    def x_columns(self) -> int:
        """K, rounded up to a multiple of 8: how many columns kernels read of x; beyond them slabs meet zeros."""
        return -(-self.n_columns // _X_COLUMN_MULTIPLE) * _X_COLUMN_MULTIPLE

    def padded(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (M, K) with columns of zeros up to ``x_columns``.

        Raises:
            ValueError: x has another number of columns.
        """
        if x.shape[1] not in (self.n_columns, self.x_columns):
            raise ValueError(f"x has {x.shape[1]} columns, the weight {self.n_columns}")
        missing = self.x_columns - x.shape[1]
        return torch.nn.functional.pad(x, (0, missing)) if missing else x

    @property
    def n_bytes(self) -> int:
        """Size on the GPU."""
        return self.slabs.numel() + 4 * self.offsets.numel()


def padded_columns(n_columns: int) -> int:
    """Return K rounded up to what a stage of the fused kernel multiplies."""
    return -(-n_columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def reason_not_slabs(weight: Weight, dtype: torch.dtype) -> str | None:
    """Return why a weight cannot be laid out for a product in ``dtype``, None if it can."""
    if dtype not in _PRODUCT_DTYPES:
        return f"activations in {str(dtype).removeprefix('torch.')} (bfloat16 and float16 have kernels)"
    if weight.scales is None:
        return None
    group = weight.group_size
    if group is None or (group % SLAB_COLUMNS and group < weight.n_columns):
        return f"groups of {group} columns (multiples of {SLAB_COLUMNS} have kernels)"
    scales = weight.scales
    if not torch.equal(scales.to(torch.float16).to(scales.dtype), scales):
        return "scales that float16 does not hold"
    if weight.encoding == "int8" and bool((weight.values[: weight.nnz] == 128).any()):
        return "an int8 value of -128"
    return None


def slab_encoding(weight: Weight) -> str:
    """Return how a weight is laid out: quantized values without a bitmap, a removed weight being the code of 0.

    Reading a byte for a weight that is 0 takes less time than finding out that it is.
    """
    if weight.scales is not None:
        return "dense4" if weight.encoding == "nf4" else "dense8"
    return "dense16" if weight.bitmap is None else "bitmap16"


class _Source(ctypes.Structure):
    _fields_ = fields("bitmap values row_offsets before scales", "n_rows n_columns n_slabs n_groups slabs_per_group")


@torch.no_grad()
def lay_out(weight: Weight, dtype: torch.dtype) -> SlabWeight:
    """Return a weight as slabs for products in ``dtype``; 16- and 32-bit values are rounded to it, as ``.to`` does."""
    encoding = slab_encoding(weight)
    n_blocks, n_slabs = -(-weight.n_rows // BLOCK_ROWS), padded_columns(weight.n_columns) // SLAB_COLUMNS
    before, kept = _kept_before(weight, n_blocks, n_slabs)
    headers, offsets, largest = _offsets(encoding, kept, n_blocks, n_slabs, weight.values.device)
    slabs = torch.zeros(int(offsets[-1]) * 16, dtype=torch.uint8, device=weight.values.device)
    values = weight.values if encoding in ("dense8", "dense4") else weight.values.to(dtype)
    scales = None if weight.scales is None else weight.scales.to(torch.float16).contiguous()
    group = min(weight.group_size or 0, n_slabs * SLAB_COLUMNS)
    source = _Source(
        address(weight.bitmap), address(values), address(weight.row_offsets), address(before), address(scales),
        weight.n_rows, weight.n_columns, n_slabs, 0 if scales is None else scales.shape[1],
        -(-group // SLAB_COLUMNS),
    )  # fmt: skip
    _launch(
        "lay_out", weight, encoding, (n_blocks * n_slabs, 1, 1), UNITS * 32,
        [source, *(ctypes.c_void_p(t.data_ptr()) for t in (slabs, offsets, headers))],
    )  # fmt: skip
    return SlabWeight(weight.n_rows, weight.n_columns, encoding, dtype, slabs, offsets, largest, weight.pattern)


def _kept_before(weight: Weight, n_blocks: int, n_slabs: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return what is kept in earlier slabs of each row (rows, slabs) int32, and in each unit (blocks, slabs, 16)."""
    if weight.bitmap is None:
        return None, None
    n_rows = n_blocks * BLOCK_ROWS
    counts = torch.empty(n_rows, n_slabs, dtype=torch.int32, device=weight.values.device)
    sizes = (weight.n_rows, weight.n_columns, n_rows, n_slabs)
    arguments = [
        ctypes.c_void_p(address(weight.bitmap)),
        ctypes.c_void_p(counts.data_ptr()),
        *map(ctypes.c_int, sizes),
    ]
    _launch("count_kept", weight, slab_encoding(weight), (-(-counts.numel() // 256), 1, 1), 256, arguments)
    kept = counts.view(n_blocks, UNITS, 16, n_slabs).sum(2).permute(0, 2, 1)
    return (counts.cumsum(1, dtype=torch.int32) - counts).contiguous(), kept


def _offsets(
    encoding: str, kept: torch.Tensor | None, n_blocks: int, n_slabs: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return headers (slabs, 16) int16, offsets (slabs + 1,) int32 in units of 16 bytes, and the largest slab."""
    n_units = n_blocks * n_slabs
    scales = 0 if encoding.endswith("16") else _SCALES_BYTES
    if encoding.startswith("bitmap"):
        assert kept is not None
        unit_bytes = _BITMAP_BYTES + 2 * kept.reshape(n_units, UNITS)
    else:
        unit_bytes = torch.full((n_units, UNITS), _DENSE_BYTES[encoding] + scales, device=device)
    sizes = (unit_bytes + 15) // 16
    ends = HEADER_BYTES // 16 + sizes.cumsum(1)
    headers = torch.cat([ends[:, -1:], ends[:, :-1]], 1).to(torch.int16)
    offsets = torch.zeros(n_units + 1, dtype=torch.int64, device=device)
    torch.cumsum(ends[:, -1], 0, out=offsets[1:])
    return headers.contiguous(), offsets.to(torch.int32), 16 * int(ends[:, -1].max())


def unit_bounds(weight: SlabWeight) -> torch.Tensor:
    """Return where each unit of a slab begins, and the slab's end, (slabs, 17) int32 in units of 16 bytes.

    As headers have it: the first number is the slab's size, the others are where units 1 to 15 begin.
    """
    starts = weight.offsets[:-1, None]
    number = torch.arange(UNITS, device=starts.device)
    header = weight.slabs.view(torch.int16)[8 * starts.long() + number].int()
    first = torch.full_like(starts, HEADER_BYTES // 16)
    return starts + torch.cat([first, header[:, 1:], header[:, :1]], 1)


def fixed_shared_bytes(encoding: str) -> int:
    """Return the shared memory that a thread block takes beside what a launch asks for.

    CUDA's own and barriers; for 4-bit codes the table: each of 256 pairs of them once for each lane.
    """
    return RESERVED_BYTES + (256 * 128 if encoding == "dense4" else 0)


def definitions(encoding: str, dtype: torch.dtype, **more: int) -> tuple[tuple[str, int], ...]:
    """Return the kernels' definitions for a layout."""
    fixed = {"ENCODING": ENCODINGS[encoding], "HALF": int(dtype == torch.float16)}
    return tuple({**fixed, **more}.items())


def _launch(
    name: str, weight: Weight, encoding: str, grid: tuple[int, int, int], n_threads: int, arguments: list[Any]
) -> None:
    """Launch a kernel of lay_out.cu on the weight's device."""
    device = weight.values.device.index
    has_bitmap = int(weight.bitmap is not None)
    chosen = definitions(encoding, torch.bfloat16, SOURCE_HAS_BITMAP=has_bitmap)
    launch = Launch(function("lay_out.cu", name, chosen, device), grid, n_threads, 0, arguments, is_dependent=False)
    launch(stream_of(weight.values))
