"""What only a process of its own shows: signals, a full disk, and what an import loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import salr

MAGNITUDE = ("--method", "magnitude")

ROOT = Path(__file__).parents[2]

INTERRUPTED = """
import os, signal, sys, time
from salr.formats.writer import SalrWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start with SIGINT ignored
stream = SalrWriter.stream
sent = []
def interrupted(self, name):
    if "layers.1" in name and not sent:
        sent.append(name)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
    return stream(self, name)
SalrWriter.stream = interrupted
from salr.cli import main
sys.exit(main())
"""
LIMITED = """
import resource, sys
from salr.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
sys.exit(main())
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_an_interrupt_exits_with_130_and_leaves_no_output(llama, tmp_path):
    done = run(INTERRUPTED, "convert", *MAGNITUDE, llama, tmp_path / "out.salr", "--quiet", "--workers", 2)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("salr: interrupted; nothing stands under the output's name")
    assert not (tmp_path / "out.salr").exists()


def test_a_disk_that_fills_up_while_converting_is_one_line_and_the_same_command_goes_on(llama, packed, tmp_path):
    arguments = ("convert", *MAGNITUDE, "--rank", 8, llama, tmp_path / "out.salr")
    done = run(LIMITED, 100_000, *arguments, "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"salr: {tmp_path / 'out.salr'}: writing failed (File too large); free disk space")
    assert done.stderr.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["out.salr.partial"]
    salr.convert(llama, tmp_path / "out.salr", salr.ConvertOptions(salr.ModuleOptions(0.5, 8), method="magnitude"))
    assert (tmp_path / "out.salr").read_bytes() == packed.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["out.salr"]


@pytest.mark.parametrize("limit", [100_000, 5], ids=["in the weights", "in an asset"])
def test_a_disk_that_fills_up_while_unpacking_is_one_line_and_leaves_nothing(packed, tmp_path, limit):
    done = run(LIMITED, limit, "unpack", packed, tmp_path / "out", "--quiet")
    assert (done.returncode, done.stdout) == (1, "")
    assert "File too large" in done.stderr and done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_python_cli_py_works_from_the_checkout():
    done = subprocess.run([sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(
        command in done.stdout for command in ("convert", "inspect", "verify", "unpack")
    )


def test_importing_the_package_and_its_help_loads_nothing_heavy():
    code = """
import sys, salr, salr.cli
sys.argv = ["salr", "--help"]
assert salr.cli.main() == 0
print(sorted({"torch", "cupy", "numba", "onnx", "transformers", "peft", "safetensors.torch"} & set(sys.modules)))
"""
    done = run(code)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("module", ["converter.pipeline", "formats.reader"])
def test_a_module_imported_under_the_wrong_name_fails(module):
    done = run(f"import {module}")
    assert done.returncode != 0 and ("relative import" in done.stderr or "import salr.formats" in done.stderr)
