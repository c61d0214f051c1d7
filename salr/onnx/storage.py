"""Where an exported graph's tensors lie on the disk: in the .salr file beside it, or in a file of their own.

Invariant: a tensor whose bytes the .salr file holds is never written again; every other large one is appended, 64-byte
aligned, to ``weights.bin`` or ``adapters.bin``; what is small stays in the graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from ..formats import validation
from ..formats.dtypes import byte_view
from ..formats.errors import OutputError
from ..formats.reader import SalrFile
from .sources import Source

WEIGHTS_FILE, ADAPTERS_FILE, PACKED_FILE = "weights.bin", "adapters.bin", "model.salr"
_ALIGNMENT, _INLINE_BYTES = 64, 1024

IR_TYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16,
    torch.uint8: ir.DataType.UINT8, torch.int8: ir.DataType.INT8, torch.uint64: ir.DataType.UINT64,
    torch.int64: ir.DataType.INT64, torch.int32: ir.DataType.INT32, torch.bool: ir.DataType.BOOL,
    torch.float64: ir.DataType.DOUBLE,
}  # fmt: skip


class Storage:
    """The files of one exported directory.

    Args:
        folder: the directory, where ``PACKED_FILE`` is a copy of ``file``.
        file: whose tensors need no second copy; None where the directory has no .salr file.
    """

    def __init__(self, folder: Path, file: SalrFile | None) -> None:
        self._folder, self._file = folder, file
        digests = {} if file is None else file.manifest.checksums
        self._known = {digest: name for name, digest in digests.items()}
        #: digest of the tensors that were written -> file, offset
        self._written: dict[tuple[str, str], int] = {}

    def place(self, name: str, source: Source) -> Any:
        """Return the tensor ``name`` for the graph (``onnx_ir``), written where it has to be.

        Raises:
            OutputError: the disk is full, or the directory cannot be written.
        """
        tensor = source.read().detach().contiguous()
        raw = byte_view(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
        dtype, shape = IR_TYPES[tensor.dtype], ir.Shape(tuple(tensor.shape))
        digest = validation.digest(raw)
        if self._file is not None and digest in self._known:
            stored = self._file.tensors[self._known[digest]]
            location, offset = PACKED_FILE, stored.begin
        elif len(raw) <= _INLINE_BYTES:
            return _inline(name, tensor, dtype, bytes(raw))
        else:
            location = ADAPTERS_FILE if _is_adapter(name) else WEIGHTS_FILE
            offset = self._append(location, raw, digest)
        return ir.ExternalTensor(location, offset, len(raw), dtype, shape=shape, name=name, base_dir=self._folder)

    def _append(self, location: str, raw: memoryview, digest: str) -> int:
        """Write a tensor, unless one of the same bytes is there already; return its offset."""
        if (location, digest) not in self._written:
            path = self._folder / location
            try:
                with path.open("ab") as output:
                    output.write(bytes(-output.tell() % _ALIGNMENT))
                    self._written[location, digest] = output.tell()
                    output.write(raw)
            except OSError as error:
                raise OutputError(f"writing failed ({error.strerror})", path=path, fix="free disk space") from error
        return self._written[location, digest]


def _inline(name: str, tensor: torch.Tensor, dtype: ir.DataType, raw: bytes) -> Any:
    import onnx

    proto = onnx.helper.make_tensor(name, int(dtype), tuple(tensor.shape), raw, raw=True)
    return ir.serde.deserialize_tensor(proto)


def _is_adapter(name: str) -> bool:
    return name.rpartition(".")[2] in ("lora_A", "lora_B", "adapter_A", "adapter_B")
