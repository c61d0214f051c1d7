"""The CPU backend: packed weights times few or many rows of x, by AVX-512, AVX2 or plain numba.

``paths`` knows what the machine can run; ``assembly``, ``decoding``, ``parts``, ``rows``, ``kernels`` and
``panel_kernels`` write LLVM text, ``machine`` compiles and caches it, ``team`` runs it on threads; ``prepared`` is a
layer made ready; ``few_rows``, ``panels`` (many rows of bfloat16) and ``tiles`` (many rows of anything else) are the
ways to multiply, ``plain`` the way without special instructions, and ``layer`` chooses between them.

SALR_CPU_PATH names another path than the fastest ("avx512bf16", "avx512", "avx2", "plain"); SALR_CACHE is the folder
for compiled kernels, salr in the user's cache folder unless set.
"""

from .layer import apply as apply
from .layer import description as description
from .layer import linear as linear
from .layer import reason_unusable as reason_unusable
from .prepared import Prepared as Prepared
from .prepared import prepare as prepare
