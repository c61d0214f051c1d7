"""The code paths: which instructions each needs, and which ones this machine has.

Invariant: a path is used only if the processor reports every feature of it and the system saves its registers (LLVM
asks cpuid and xgetbv). ``plain`` needs nothing and is always there.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

PATH_VARIABLE = "SALR_CPU_PATH"
_AVX2 = ("avx", "avx2", "fma", "f16c", "popcnt", "bmi", "bmi2")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vbmi2")


@dataclass(frozen=True)
class CodePath:
    """One way to run the kernels: its name, what ``salr doctor`` calls it, its LLVM features, its vector width."""

    name: str
    title: str
    features: tuple[str, ...] = ()
    lanes: int = 0

    @property
    def has_bf16_products(self) -> bool:
        """Whether pairs of bfloat16 can be multiplied and added to float32 in one instruction."""
        return "avx512bf16" in self.features

    @property
    def target(self) -> str:
        """Return the features as LLVM wants them: "+avx2,+fma"."""
        return ",".join(f"+{feature}" for feature in self.features)


PATHS = {
    path.name: path
    for path in (
        CodePath("avx512bf16", "AVX-512 VBMI2 and BF16", (*_AVX512, "avx512bf16"), 16),
        CodePath("avx512", "AVX-512 VBMI2", _AVX512, 16),
        CodePath("avx2", "AVX2", _AVX2, 8),
        CodePath("plain", "plain numba"),
    )
}


@functools.cache
def usable() -> tuple[CodePath, ...]:
    """Return the paths that this machine can run, the fastest first."""
    found = _host_features()
    return tuple(path for path in PATHS.values() if found.issuperset(path.features))


def chosen() -> CodePath:
    """Return the path in use: the one SALR_CPU_PATH names if this machine can run it, else the fastest."""
    wanted = os.environ.get(PATH_VARIABLE)
    return next((path for path in usable() if path.name == wanted), usable()[0])


def _host_features() -> frozenset[str]:
    try:
        import llvmlite.binding as llvm

        return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)
    except (ImportError, RuntimeError):
        return frozenset()
