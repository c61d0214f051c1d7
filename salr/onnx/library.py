"""The native library for ONNX Runtime's CPU provider: found where it was shipped, or compiled at first use.

Invariant: what is compiled depends on the sources, the flags, the compiler and the processor's architecture alone, and
is kept under their digest; a library is complete under its name or not there. Neither onnx nor torch is needed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..runtime.caching import cache_folder
from .errors import LibraryError

SOURCES = Path(__file__).parent / "native"
_SUFFIX = {"darwin": ".dylib"}.get(sys.platform, ".so")
LIBRARY_NAME = f"libsalr_onnx{_SUFFIX}"

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512vbmi2")
#: flags of the sources that are called only where the processor has what they enable
_OWN_FLAGS = {
    "product_avx2.cpp": _AVX2,
    "product_avx512.cpp": (*_AVX2, *_AVX512),
    "few_inputs_avx512.cpp": (*_AVX2, *_AVX512),
    "few_inputs_vnni.cpp": (*_AVX2, *_AVX512, "-mavx512vnni"),
}
_NEEDED = "a C++17 compiler (g++ or clang++) on Linux or macOS"
_FIX = "install one or name it in CXX; graphs run without the library too, by their function bodies"


def get_library_path() -> Path:
    """Return the library to register: ``options.register_custom_ops_library(str(get_library_path()))``.

    The installed package holds it where its wheel was built with a compiler; else the first call on a machine compiles
    it (about ten seconds).
    SALR_CACHE is the folder that keeps it; CXX names the compiler.

    Raises:
        LibraryError: there is no compiler, or it fails.
    """
    shipped = SOURCES / LIBRARY_NAME
    if shipped.is_file():
        return shipped
    compiler = find_compiler()
    library = _cached(compiler)
    if not library.is_file():
        compile_library(library, compiler)
    return library


def put_library(folder: Path) -> Path:
    """Put the library into ``folder``, for a package that ships it, and return it; the user's cache is only read.

    Raises:
        LibraryError: there is no compiler, or it fails.
    """
    compiler, library = find_compiler(), folder / LIBRARY_NAME
    cached = _cached(compiler)
    if cached.is_file():
        shutil.copyfile(cached, library)
    else:
        compile_library(library, compiler)
    return library


def find_compiler() -> str:
    """Return the compiler's command.

    Raises:
        LibraryError: there is none, or the system is one that the library is not written for.
    """
    if sys.platform == "win32":
        raise LibraryError("the native library is not built on Windows", needed=_NEEDED, fix=_FIX)
    named = os.environ.get("CXX")
    found = next((path for path in map(shutil.which, [named] if named else _COMPILERS) if path), None)
    if found is None:
        raise LibraryError(f"no compiler {named or ' or '.join(_COMPILERS)}", needed=_NEEDED, fix=_FIX)
    return found


def compile_library(library: Path, compiler: str, extra: Sequence[str] = ()) -> None:
    """Compile the library to ``library`` with ``extra`` flags for compiling and linking.

    Raises:
        LibraryError: the compiler fails, or the folder cannot be written.
    """
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as folder:
            built = Path(folder) / LIBRARY_NAME
            objects = _compile_sources(compiler, Path(folder), extra)
            _run([[compiler, *extra, "-shared", "-o", str(built), *objects]])
            built.replace(library)
    except OSError as error:
        raise LibraryError(
            f"it cannot be built ({error.strerror})", path=library, fix="set SALR_CACHE to a folder that can be written"
        ) from error


def _compile_sources(compiler: str, folder: Path, extra: Sequence[str]) -> list[str]:
    """Compile every source that this architecture has, all at once; return the objects."""
    commands, objects = [], []
    for source in _sources():
        objects.append(str(folder / f"{source.stem}.o"))
        own = _OWN_FLAGS.get(source.name, ())
        commands.append([compiler, *_flags(), *own, *extra, "-c", str(source), "-o", objects[-1]])
    _run(commands)
    return objects


def _run(commands: list[list[str]]) -> None:
    """Run commands side by side.

    Raises:
        LibraryError: one fails; its last line says why.
    """
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
    failed = [(process.communicate()[1], process.returncode) for process in started]
    for output, status in failed:
        if status:
            lines = output.decode(errors="replace").strip().splitlines() or [f"exit status {status}"]
            error = next((line for line in lines if "error" in line), lines[-1])
            raise LibraryError(f"the compiler failed ({error[:200]})", needed=_NEEDED, fix=_FIX)


def _is_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def _flags() -> tuple[str, ...]:
    return (*_FLAGS, "-DSALR_X86") if _is_x86() else _FLAGS


def _sources() -> list[Path]:
    return [path for path in sorted(SOURCES.glob("*.cpp")) if _is_x86() or path.name not in _OWN_FLAGS]


def _cached(compiler: str) -> Path:
    return cache_folder("onnx") / _key(compiler) / LIBRARY_NAME


def _key(compiler: str) -> str:
    """Return a digest of everything that the library depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [version, platform.machine().encode(), *(flag.encode() for flag in _flags())]
    parts += [path.read_bytes() for path in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")])]
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]
