"""What a kernel is told: a table of 64-bit numbers, most of them addresses.

Invariant: whoever fills a job keeps every tensor alive whose address it holds until the kernel has returned.
A job serves one call: threads share it and claim its parts by the counter ``next``.
"""

from __future__ import annotations

from array import array

FIELDS = (
    "next",  # first part that no thread has claimed yet; a part is ``part_rows`` rows
    "done",  # parts that are finished
    "n_parts",
    "part_rows",
    "bitmap",  # (N, bitmap_bytes) bits; 0 where the pattern is dense
    "bitmap_bytes",
    "values",
    "row_offsets",  # (N+1,) int64; 0 where the pattern is dense
    "scales",  # (N, n_groups) float32
    "n_groups",
    "group_index",  # int32: the group of each 64 columns, or of each column
    "n_rows",
    "n_columns",
    "x",  # 64 columns of every row of x, then the next 64
    "y",  # (M, y_stride) float32
    "y_stride",
    "bias",  # (N,) float32 or 0
    "row_factors",  # (N,) float32 or 0: what each output is multiplied by
    "lora_B",  # (N, rank)
    "u",  # (M, rank) float32: scaling * (lora_A x)
    "rank",
    "first_kernel",  # the kernel that computes u, and its job; 0 without adapters
    "first_job",
    "out",  # (rows, out_stride) decoded weights
    "out_stride",
    "first_row",  # the row of the matrix that stands first in ``out``
    "n_inputs",  # rows of x
    "x_stride",  # bytes from one row of x to the next
    "packed",  # (n_panels, pairs of columns, rows of a panel) pairs of bfloat16: x, then u
    "panel_bytes",  # from one panel to the next
    "n_panels",
    "workspace",  # ``workspace_bytes`` for each thread
    "workspace_bytes",
    "next_workspace",  # first workspace that no thread has claimed yet
)
SLOT = {name: index for index, name in enumerate(FIELDS)}
N_SLOTS = 48


def new_job(**fields: int) -> array[int]:
    """Return a job with the given fields set and all others 0."""
    job = array("q", bytes(8 * N_SLOTS))
    for name, value in fields.items():
        job[SLOT[name]] = value
    return job


def address(job: array[int]) -> int:
    """Return where a job lies in memory."""
    return job.buffer_info()[0]
