"""Emulated kernels with AddressSanitizer: nothing is read or written outside the tensors of a launch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.emulated import MORE_FLAGS
from tests.cuda.matrices import DEVICE
from tests.sanitizer import preloaded

pytestmark = [pytest.mark.fuzz, pytest.mark.skipif(DEVICE != "cpu", reason="there is a GPU, and nothing is emulated")]
FOLDER = Path(__file__).parent
#: not of the stack, which threads of a kernel change
FLAGS = "-fsanitize=address -g --param=asan-stack=0 -fno-sanitize-address-use-after-scope"
PRODUCTS = ("test_linear.py", "test_decoded.py", "test_stacking.py", "test_device_layout.py", "test_operations.py")
BROKEN = """
import pathlib, sys, pytest
from tests.cuda.test_emulated import RIGHT, run
run(pytest.MonkeyPatch(), pathlib.Path(sys.argv[1]), RIGHT + sys.argv[2])
"""


def sanitized(*arguments):
    environment = os.environ | preloaded() | {MORE_FLAGS: FLAGS}
    environment["ASAN_OPTIONS"] += ":detect_stack_use_after_return=0"
    environment.pop("SALR_FUZZ", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False)


def test_products_read_and_write_nothing_outside_their_tensors():
    files = [FOLDER / name for name in PRODUCTS]
    done = sanitized("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-k", "not compile", *files)
    assert done.returncode == 0 and " passed" in done.stdout, (done.stdout + done.stderr)[-3000:]


@pytest.mark.parametrize("access", ["to[32 + lane] = 0;", "to[0] += widen(((const u16*)from)[256 + lane]);"])
def test_the_sanitizer_sees_an_access_outside_a_tensor(access, tmp_path):
    done = sanitized("-c", BROKEN, tmp_path, access)
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr, (done.stdout + done.stderr)[-3000:]
