"""Machine code of LLVM text for this processor, kept in a cache folder.

Invariant: code is compiled for exactly the features of its path, never for more, so that a path can be tested on any
machine that has at least these. A cached object is used only if its name (a digest of text, target, features and
LLVM's version) and the digest of its own bytes agree.
"""

from __future__ import annotations

import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import xxhash

from ..caching import cache_folder

DIGEST_BYTES = 16
_lock = threading.Lock()
_engines: dict[str, tuple[Any, int]] = {}


def address_of(text: str, features: str) -> int:
    """Return the address of function ``kernel`` in LLVM ``text``, compiled for ``features`` ("+avx2,+fma").

    Raises:
        RuntimeError: LLVM rejects the text.
    """
    key = _key(text, features)
    with _lock:
        if key not in _engines:
            _engines[key] = _load(_cached(key) or _compile(text, features, key))
        return _engines[key][1]


def _target(features: str) -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu="x86-64", features=features, opt=3, jit=True)


def _compile(text: str, features: str, key: str) -> bytes:
    import llvmlite.binding as llvm

    machine = _target(features)
    module = llvm.parse_assembly(text)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    module.verify()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = options.slp_vectorization = False
    options.loop_unrolling = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(module, passes)
    code: bytes = machine.emit_object(module)
    _keep(key, code)
    return code


def _load(code: bytes) -> tuple[Any, int]:
    """Link an object into this process; the engine must stay alive as long as its code."""
    import llvmlite.binding as llvm

    machine = _target("")
    empty = llvm.parse_assembly("")
    empty.triple = machine.triple
    engine = llvm.create_mcjit_compiler(empty, machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine, int(engine.get_function_address("kernel"))


def _key(text: str, features: str) -> str:
    import llvmlite
    import llvmlite.binding as llvm

    parts = (text, features, llvmlite.__version__, str(llvm.llvm_version_info), sys.platform)
    return xxhash.xxh3_128_hexdigest("\0".join(parts).encode())


def _cached(key: str) -> bytes | None:
    try:
        data = (cache_folder("cpu") / f"{key}.o").read_bytes()
    except OSError:
        return None
    code = data[DIGEST_BYTES:]
    return code if data[:DIGEST_BYTES] == xxhash.xxh3_128_digest(code) else None


def _keep(key: str, code: bytes) -> None:
    """Write an object beside its final name and rename it; a folder that cannot be written to means no cache."""
    try:
        folder = cache_folder("cpu")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            file.write(xxhash.xxh3_128_digest(code) + code)
        Path(file.name).replace(folder / f"{key}.o")
    except OSError:
        return
