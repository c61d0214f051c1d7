"""The package as it is built: a wheel holds the native library where there is a compiler, and says so in its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from salr.onnx.library import LIBRARY_NAME

ROOT = Path(__file__).parents[2]
SHIPPED = f"salr/onnx/native/{LIBRARY_NAME}"
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
BUILD = "import sys; from setuptools.build_meta import build_wheel; print('built', build_wheel(sys.argv[1]))"
USE = """
import ctypes, sys
sys.path.insert(0, sys.argv[1])
import onnxruntime, salr.onnx
path = salr.onnx.get_library_path()
onnxruntime.SessionOptions().register_custom_ops_library(str(path))
ctypes.CDLL(str(path)).salr_kernels
print(path)
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, str]]:
    """Return a function that builds a wheel of a copy of this tree and returns it with what the build said."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("salr", "converter", "formats", "cuda"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "cli.py"):
        shutil.copyfile(ROOT / name, tree / name)

    def run(folder: Path, **environment: str) -> tuple[Path, str]:
        result = subprocess.run(
            [sys.executable, "-c", BUILD, str(folder)], cwd=tree, env=os.environ | environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        return folder / result.stdout.splitlines()[-1].removeprefix("built "), result.stdout + result.stderr

    return run


def test_a_wheel_holds_the_library_and_needs_no_compiler_afterwards(build, library, tmp_path):
    wheel, said = build(tmp_path)
    assert wheel.name.endswith(f"-py3-none-{PLATFORM}.whl") and "no native library" not in said
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    environment = os.environ | {"PATH": "", "SALR_CACHE": str(tmp_path / "cache"), "CXX": "none"}
    command = [sys.executable, "-c", USE, str(tmp_path / "installed")]
    used = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert used.returncode == 0, used.stderr[-3000:]
    assert Path(used.stdout.strip()) == tmp_path / "installed" / SHIPPED
    assert not (tmp_path / "cache").exists()


def test_without_a_compiler_the_wheel_is_for_every_platform_and_says_what_is_missing(build, tmp_path):
    wheel, said = build(tmp_path, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "holds no native library for ONNX Runtime: no compiler no-such-compiler" in said
    names = zipfile.ZipFile(wheel).namelist()
    assert SHIPPED not in names and "salr/onnx/native/op.cpp" in names


def test_a_library_for_a_package_is_compiled_where_the_cache_has_none(library, tmp_path, monkeypatch):
    """And where it has one, that one is copied; the compiler is a stand-in that only writes what it is asked for."""
    from salr.onnx.library import put_library

    (tmp_path / "out").mkdir()
    assert put_library(tmp_path / "out").read_bytes() == library.read_bytes()
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && echo compiled > "$2"; shift; done\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert put_library(tmp_path / "out").read_text() == "compiled\n"
