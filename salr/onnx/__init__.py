"""ONNX: export of whole models, the operator ``salr.SparseLinear`` for graphs of one's own, and its native kernel.

Nothing of onnx or torch is loaded before the first use of a name; ``get_library_path`` needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import export_onnx as export_onnx
    from .library import get_library_path as get_library_path
    from .node import SparseLinearNode as SparseLinearNode
    from .node import sparse_linear_node as sparse_linear_node

_PUBLIC = {
    "SparseLinearNode": ".node",
    "export_onnx": ".export",
    "get_library_path": ".library",
    "sparse_linear_node": ".node",
}
__all__ = ["SparseLinearNode", "export_onnx", "get_library_path", "sparse_linear_node"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'salr.onnx' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name], __name__), name)
