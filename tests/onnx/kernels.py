"""Run in a process of its own: python kernels.py LIBRARY ENCODING. Every path of the kernels against float64."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]

import conftest  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402

import salr.onnx  # noqa: E402

SHAPES = [(1, 1, 32), (17, 45, 32), (64, 1000, 1000), (130, 520, 64), (9, 77, 20)]
N_INPUTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 300)


def main(library: str, encoding: str) -> None:
    """Fail where a product is off by more than rounding."""
    make_packed = conftest.make_packed.__wrapped__()
    chosen = ctypes.CDLL(library).salr_kernels
    chosen.restype = ctypes.c_char_p
    order = ["scalar", "avx2", "avx512"]
    assert order.index(chosen().decode()) <= order.index(os.environ["SALR_ONNX_KERNELS"])
    for (n_rows, n_columns, group_size), sparse, rank in itertools.product(SHAPES, (True, False), (0, 5, 16)):
        tensors, adapters = make_packed(n_rows, n_columns, encoding, sparse=sparse, rank=rank, group_size=group_size)
        weight = (tensors.dense() + (0 if adapters is None else adapters.product())).astype(np.float64)
        size = np.abs(tensors.dense())
        if adapters is not None:
            size = size + np.abs(adapters.lora_B * adapters.scaling) @ np.abs(adapters.lora_A)
        for half in (False, True) if rank == 5 else (False,):
            elem_type = onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT
            model = salr.onnx.sparse_linear_node(tensors, adapters).model(elem_type=elem_type)
            options = onnxruntime.SessionOptions()
            options.register_custom_ops_library(library)
            options.intra_op_num_threads = 2
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
            for n_inputs in N_INPUTS:
                x = np.random.default_rng(n_inputs).standard_normal((n_inputs, n_columns), np.float32)
                x = x.astype(np.float16) if half else x
                found, expected = session.run(None, {"x": x})[0], x.astype(np.float64) @ weight.T
                error = np.abs(found - expected).max() / max((np.abs(x) @ size.T).max(), 1e-30)
                assert error < (6e-4 if half else 1e-6), (n_rows, n_columns, sparse, rank, half, n_inputs, error)


if __name__ == "__main__":
    main(*sys.argv[1:])
