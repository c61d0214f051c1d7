"""Run in a process of its own: python kernels.py LIBRARY. Every path of the kernels against float64."""

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
from salr.formats.values import ENCODINGS  # noqa: E402

import salr.onnx  # noqa: E402

SHAPES = [(1, 1, 32), (17, 45, 32), (64, 1000, 1000), (130, 520, 64), (70, 700, 128), (9, 77, 20)]
N_INPUTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33, 300)


def main(library: str) -> None:
    """Fail where a product is off by more than rounding."""
    chosen = ctypes.CDLL(library).salr_kernels
    chosen.restype = ctypes.c_char_p
    order = ["scalar", "avx2", "avx512", "avx512vnni"]
    assert order.index(chosen().decode()) <= order.index(os.environ["SALR_ONNX_KERNELS"])
    for encoding in ENCODINGS:
        compare(library, encoding)


def compare(library: str, encoding: str) -> None:
    """Fail where a product with weights of ``encoding`` is off by more than rounding."""
    make_packed = conftest.make_packed.__wrapped__()
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
            options.add_session_config_entry(
                "session.intra_op.allow_spinning", "0"
            )  # other work may need the processor
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
            x = np.random.default_rng(0).standard_normal((max(N_INPUTS), n_columns), np.float32)
            x = x.astype(np.float16) if half else x
            expected, sizes = x.astype(np.float64) @ weight.T, np.abs(x.astype(np.float32)) @ size.T
            for n_inputs in N_INPUTS:
                difference = session.run(None, {"x": x[-n_inputs:]})[0] - expected[-n_inputs:]
                error = np.abs(difference).max() / max(sizes[-n_inputs:].max(), 1e-30)
                assert error < (6e-4 if half else 1e-6), (
                    encoding,
                    n_rows,
                    n_columns,
                    sparse,
                    rank,
                    half,
                    n_inputs,
                    error,
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
