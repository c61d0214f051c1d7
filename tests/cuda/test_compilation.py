"""Every kernel compiles for every architecture it is meant for; no GPU is needed, and nothing is loaded."""

from __future__ import annotations

import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("cupy", reason="CuPy is not installed")

from salr.cuda import compilation
from salr.cuda.decoded import TILES_OF_ROWS
from salr.cuda.fused import SHORT_TILE, SHORTEST_TILE, TILES
from salr.cuda.skinny import TILES as SKINNY_TILES

ELF = b"\x7fELF"
ENDS = (TILES[0], TILES[-1])  # the fewest rows and the most; bitmaps are compiled in every shape


def check_all_compile(jobs):
    """Compile each (file, definitions, architecture), on all processors."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        binaries = pool.map(lambda job: compilation.cubin(job[0], tuple(dict(job[1]).items()), job[2]), jobs)
        assert all(binary.startswith(ELF) for binary in binaries)


@pytest.mark.parametrize("file", compilation.TARGETS)
def test_a_kernel_compiles_for_its_targets(file):
    check_all_compile((file, (), target) for target in compilation.TARGETS[file])


@pytest.mark.parametrize("encoding", compilation.ENCODINGS)
def test_the_fused_kernel_compiles_on_hopper(encoding):
    from salr.cuda.device_layout import definitions

    tiles = (*TILES, SHORT_TILE, SHORTEST_TILE) if encoding == "bitmap16" else ENDS
    in_float16 = ((tile, 1) for tile in tiles[1:2] if encoding == "bitmap16")
    fixed, both = definitions(encoding, torch.bfloat16), (*((tile, 0) for tile in tiles), *in_float16)
    chosen = ((*fixed, ("HALF", half), *tile.definitions) for tile, half in both)
    check_all_compile(("fused_linear.cu", each, "sm_90a") for each in chosen)


@pytest.mark.parametrize("encoding", compilation.ENCODINGS)
def test_the_decoding_kernel_compiles_for_each_encoding(encoding):
    from salr.cuda.device_layout import definitions

    dtypes = (torch.bfloat16, torch.float16) if encoding == "bitmap16" else (torch.bfloat16,)
    tiles = TILES_OF_ROWS if encoding == "bitmap16" else (8, 32)  # the others need less of everything
    chosen = (
        definitions(encoding, dtype, NT=nt, GROUPS=TILES_OF_ROWS[nt]) for nt, dtype in itertools.product(tiles, dtypes)
    )
    check_all_compile(("decoded_linear.cu", each, "sm_90a") for each in chosen)


@pytest.mark.parametrize("encoding", compilation.ENCODINGS)
def test_an_expansion_compiles_with_lora_b_in_shared_memory_and_elsewhere(encoding):
    from salr.cuda.device_layout import definitions

    shapes = ({"BLOCKS_PER_SM": 1, "B_IN_SHARED": 1}, {"BLOCKS_PER_SM": 2, "B_IN_SHARED": 0})
    chosen = [definitions(encoding, torch.float16, **shape) for shape in shapes]
    check_all_compile(("expand.cu", each, target) for each in chosen for target in ("sm_86", "sm_90a"))


def test_the_launch_before_compiles_for_few_and_many_rows():
    chosen = [
        (("ROW_WARPS", rows), ("K_WARPS", k), ("RANK_TILES", ranks)) for rows, k, ranks in ((1, 16, 2), (2, 8, 4))
    ]
    check_all_compile(("tiles_of_x.cu", each, "sm_90a") for each in chosen)


@pytest.mark.parametrize("encoding", ["dense8", "dense4"])
def test_the_skinny_kernel_compiles_for_quantized_weights(encoding):
    from salr.cuda.device_layout import definitions

    chosen = definitions(encoding, torch.float16, **asdict(SKINNY_TILES[-1]))
    assert compilation.cubin("skinny_linear.cu", chosen, "sm_90a").startswith(ELF)


def test_the_fused_kernel_compiles_for_older_gpus():
    check_all_compile(("fused_linear.cu", tile.definitions, "sm_80") for tile in ENDS)


def test_every_kernel_file_has_its_targets():
    assert set(compilation.TARGETS) == {path.name for path in compilation.KERNELS.glob("*.cu")}


def test_threads_that_compile_the_same_kernel_do_not_meet(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compilation, "cubin", lambda *_: time.sleep(0.01) or ELF)
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(lambda _: compilation._cached("tiles_of_x.cu", (), "sm_90a"), range(16)))
    assert [path.read_bytes() for path in found] == [ELF]
    assert list(tmp_path.iterdir()) == list(found)


def test_a_kernel_that_does_not_compile_says_where(monkeypatch):
    from cupy.cuda.compiler import CompileException

    monkeypatch.setattr(compilation, "source", lambda file: "no such type x;")
    with pytest.raises(CompileException, match="identifier"):
        compilation.cubin("fused_linear.cu", (), "sm_90")
