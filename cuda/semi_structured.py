"""Products of 2:4 weights with many rows of x on sparse tensor cores, by cuSPARSELt through torch.

Invariant: adapters cost no extra pass over y. Two ranks of B stand in four columns beside W's, (b0, b1, 0, 0), which is
2:4 itself, and A's rows stand as their columns do, so that u comes out spread. The compressed copy takes 1.125 bytes a
weight beside the slabs: it is made only where ``ENVIRONMENT_VARIABLE`` asks for it.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch

from .compilation import function
from .device_layout import SlabWeight, definitions
from .expanded import ExpandedProduct
from .launching import Launch, stream_of, uncaptured
from .low_rank import Fragments, Matrices, matrices_of

ENVIRONMENT_VARIABLE = "SALR_SPARSE_TENSOR_CORES"
#: the fewest rows of x for which the compressed copy is multiplied
LEAST_ROWS = 256
_ROW_MULTIPLE = 16
_ANY_ALGORITHM = (0, 1, -1)  # torch's own defaults


def many_rows(weight: SlabWeight, adapters: Fragments | Matrices | None, bias: torch.Tensor | None) -> ExpandedProduct:
    """Return the product for many rows of x: on sparse tensor cores where they are here, fit and are asked for."""
    wanted = weight.pattern == "2:4" and os.environ.get(ENVIRONMENT_VARIABLE) == "1"
    fits = wanted and torch.backends.cusparselt.is_available() and not weight.n_rows % _ROW_MULTIPLE
    return (SemiStructuredProduct if fits else ExpandedProduct)(weight, adapters, bias)


class SemiStructuredProduct(ExpandedProduct):
    """y = x W^T + adapters + bias for a 2:4 weight, which is compressed when it first meets so many rows of x."""

    def __init__(self, weight: SlabWeight, adapters: Fragments | Matrices | None, bias: torch.Tensor | None) -> None:
        super().__init__(weight, adapters, bias)
        self._algorithms: dict[int, tuple[int, int, int]] = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product (M, N) of x (M, K)."""
        if x.shape[0] < LEAST_ROWS:
            return super().__call__(x)
        columns = self.weight.padded_columns - x.shape[1] if self.adapters is None else 0
        missing = -x.shape[0] % _ROW_MULTIPLE
        rows = torch.nn.functional.pad(x, (0, columns, 0, missing)) if missing or columns else x
        if self.adapters is not None:
            rows = self._beside_spread(rows)
        algorithm, split_k, mode = self._algorithm(rows)
        y: torch.Tensor = torch._cslt_sparse_mm(
            self._compressed, rows.T, self._bias, transpose_result=True, alg_id=algorithm, split_k=split_k,
            split_k_mode=mode,
        )  # fmt: skip
        return y[: x.shape[0]]

    def _matrices(self) -> Matrices | None:
        """The adapters as matrices."""
        own = self.adapters
        return matrices_of(own, self.weight.n_rows) if isinstance(own, Fragments) else own

    @functools.cached_property
    def _beside_spread(self) -> Beside:
        """What puts u beside x, two zeros after each two of it."""
        with uncaptured(self.weight.slabs.device):
            own = self._matrices()
            assert own is not None
            return Beside(_spread(own.scaled_A, 0))

    @functools.cached_property
    def _compressed(self) -> torch.Tensor:
        """[W | B, spread] as cuSPARSELt stores it."""
        with uncaptured(self.weight.slabs.device):
            dense, own = ExpandedProduct(self.weight, None, None).decode(), self._matrices()
            whole = dense if own is None else torch.cat([dense, _spread(own.lora_B, 1)], 1)
            return torch._cslt_compress(whole)

    def _algorithm(self, rows: torch.Tensor) -> tuple[int, int, int]:
        """Return what is fastest for about so many rows; while a graph is captured nothing is tried out."""
        size = rows.shape[0].bit_length()
        if size not in self._algorithms:
            if torch.cuda.is_current_stream_capturing():
                return _ANY_ALGORITHM
            search = torch._C._cusparselt.mm_search  # type: ignore[attr-defined]
            algorithm, split_k, mode, *_ = search(self._compressed, rows.T, self._bias, None, None, True)
            self._algorithms[size] = algorithm, split_k, mode
        return self._algorithms[size]


class Beside:
    """[x | 0 | x A^T] (M, K padded + ranks) for x (M, K) and A (ranks, K padded); all are multiples of 8."""

    def __init__(self, a: torch.Tensor) -> None:
        self._a, (ranks, self._columns) = a.T, a.shape
        self._wide_columns, self._chunks = self._columns + ranks, self._columns // 8
        self._from, self._to, self._chunks_of_x = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return x (M, K), contiguous, beside its product."""
        wide = x.new_empty(x.shape[0], self._wide_columns)
        self._from.value, self._to.value, self._chunks_of_x.value = x.data_ptr(), wide.data_ptr(), x.shape[1] // 8
        self._launch.over(x.shape[0], -(-self._chunks // 256))(stream_of(x))
        torch.mm(x, self._a[: x.shape[1]], out=wide[:, self._columns :])
        return wide

    @functools.cached_property
    def _launch(self) -> Launch:
        sizes = map(ctypes.c_int, (self._chunks, self._wide_columns))
        handle = function("beside.cu", "copy_rows", definitions("dense16", torch.bfloat16), self._a.device.index)
        arguments = [self._from, self._to, self._chunks_of_x, *sizes]
        return Launch(handle, (1, 1, 1), 256, 0, arguments, is_dependent=False)


def _spread(matrix: torch.Tensor, dim: int) -> torch.Tensor:
    """Return a matrix with two slices of zeros after each two along a dimension, of even length."""
    pairs = matrix.view(*matrix.shape[:dim], -1, 2, *matrix.shape[dim + 1 :])
    return torch.cat([pairs, torch.zeros_like(pairs)], dim + 1).flatten(dim, dim + 1)
