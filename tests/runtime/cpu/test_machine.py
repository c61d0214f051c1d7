"""Code paths are chosen by what the machine has; compiled code is kept, and never trusted unchecked."""

from __future__ import annotations

import subprocess
import sys

import pytest

from salr.runtime.cpu import machine, paths
from salr.runtime.cpu.kernels import Matrix, Product, product_text

FAST = [path for path in paths.usable() if path.lanes]
needs_fast_path = pytest.mark.skipif(not FAST, reason="this processor has neither AVX2 nor AVX-512")


def test_a_path_needs_every_one_of_its_features(monkeypatch):
    paths.usable.cache_clear()
    everything = frozenset(paths.PATHS["avx512bf16"].features)
    for features, names in (
        (everything, ["avx512bf16", "avx512", "avx2", "plain"]),
        (everything - {"avx512bf16"}, ["avx512", "avx2", "plain"]),
        (everything - {"avx512vbmi2"}, ["avx2", "plain"]),
        (everything - {"f16c"}, ["plain"]),
        (frozenset(), ["plain"]),
    ):
        monkeypatch.setattr(paths, "_host_features", lambda found=features: found)
        assert [path.name for path in paths.usable()] == names
        paths.usable.cache_clear()


def test_the_environment_can_ask_for_a_slower_path_but_not_for_an_unknown_one(monkeypatch):
    monkeypatch.setenv(paths.PATH_VARIABLE, "plain")
    assert paths.chosen().name == "plain"
    monkeypatch.setenv(paths.PATH_VARIABLE, "avx9000")
    assert paths.chosen() == paths.usable()[0]


def object_of(path: paths.CodePath, n_inputs: int) -> str:
    return product_text(path, Matrix("fp32", True), Product(n_inputs, "float"))


def compile_again(text: str, path: paths.CodePath) -> None:
    machine._engines.clear()
    assert machine.address_of(text, path.target)


@needs_fast_path
def test_compiled_code_is_kept_and_used_by_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv("SALR_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "_engines", {})
    text = object_of(FAST[0], 1)
    machine.address_of(text, FAST[0].target)
    assert len(list((tmp_path / "cpu").iterdir())) == 1
    monkeypatch.setattr(machine, "_compile", lambda *_: pytest.fail("compiled although it was kept"))
    compile_again(text, FAST[0])


@needs_fast_path
def test_a_damaged_object_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("SALR_CACHE", str(tmp_path))
    monkeypatch.setattr(machine, "_engines", {})
    text = object_of(FAST[0], 2)
    machine.address_of(text, FAST[0].target)
    (kept,) = (tmp_path / "cpu").iterdir()
    sound = kept.read_bytes()
    for damaged in (sound[:100], sound[:200] + bytes([sound[200] ^ 1]) + sound[201:], b""):
        kept.write_bytes(damaged)
        compile_again(text, FAST[0])
        assert kept.read_bytes() == sound


@needs_fast_path
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("SALR_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(machine, "_engines", {})
    assert machine.address_of(object_of(FAST[0], 3), FAST[0].target)


@needs_fast_path
def test_llvm_text_that_is_wrong_is_an_error_and_not_a_crash(monkeypatch):
    with pytest.raises(RuntimeError, match="LLVM IR parsing error"):
        machine.address_of("define void @kernel() {", FAST[0].target)


def test_the_backend_is_imported_without_numba_or_llvm():
    code = "import sys, salr.runtime.cpu; sys.exit(bool({'numba', 'llvmlite', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", "import salr\n" + code], check=False).returncode == 0
