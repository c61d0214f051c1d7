"""Mutated files: whatever bytes come, opening, checking and decoding raise nothing but SalrError.

Nor do they hang, or allocate more than twice the file to check it.
"""

from __future__ import annotations

import copy
import json
import random
import signal
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from salr.formats.container import Container
from salr.formats.errors import SalrError
from salr.formats.manifest import parse_module
from salr.formats.naming import module_specs
from salr.formats.reader import SalrFile
from salr.formats.validation import header_digest

JUNK = [
    0,
    -1,
    1,
    3,
    2**31,
    2**63,
    10**400,
    1.5,
    float("nan"),
    1e300,
    "",
    "x",
    "residual",
    "U8",
    None,
    True,
    [],
    {},
    [1],
    "\ud800",
]
#: Python objects made from the header and manifest of a file of a few kilobytes
JSON_BYTES = 500_000
DTYPES = ["U8", "I8", "BF16", "F16", "F32", "U64", "I64", "BOOL", "F64", "F8_E4M3", "F4", "C64", "X9"]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut_or_splice(data: bytes, rng: random.Random) -> bytes:
    begin, end = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    return rng.choice([data[:begin], data[:begin] + data[end:], data + data[begin:end], data[:end] + data[begin:]])


def leaves(value, path=()):
    """Yield the path of every value in nested JSON."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        if isinstance(inner, (dict, list)):
            yield from leaves(inner, (*path, key))


def junk_in(value, rng: random.Random) -> None:
    """Replace or remove one value of nested JSON."""
    *parents, last = rng.choice(list(leaves(value)))
    for key in parents:
        value = value[key]
    if rng.random() < 0.2:
        value.pop(last)
    else:
        value[last] = copy.deepcopy(rng.choice(JUNK))


def sealed_junk(draft, rng: random.Random, path: Path) -> bytes:
    """Change manifest values or tensor bytes and recompute every digest, so that the rules themselves are reached."""
    draft = copy.deepcopy(draft)
    if rng.random() < 0.5:
        name = rng.choice(sorted(draft.tensors))
        data = draft.array(name)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(data.size)] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
        draft.put(name, data)
    else:
        junk_in(draft.manifest, rng)
        draft.manifest_bytes = json.dumps(draft.manifest).encode()
    return draft.write(path).read_bytes()


def sealed_header(data: bytes, rng: random.Random) -> bytes:
    """Change one entry of the header and recompute its digest."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    change = rng.choice(["dtype", "shape", "swap"])
    if change == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif change == "shape":
        entry["shape"] = rng.choice([entry["shape"][::-1], [*entry["shape"], 1], [], [0], [2**63], entry["shape"][1:]])
    else:
        other = header[rng.choice([name for name in header if name != "__metadata__"])]
        entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    stored = header["__metadata__"]["salr_header_xxh3"]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    text = text.replace(stored.encode(), header_digest(text, stored).encode())
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def mutated(data: bytes, draft, rng: random.Random, path: Path) -> bytes:
    kind = rng.randrange(10)
    if kind < 2:
        return flip_bits(data, rng)
    if kind == 2:
        return cut_or_splice(data, rng)
    return sealed_header(data, rng) if kind < 6 else sealed_junk(draft, rng, path)


def check_everything(path: Path) -> SalrFile | None:
    """Open and check all of a file; return it where it is sound."""
    try:
        file = SalrFile(path)
    except SalrError:
        return None
    return file if all(problem is None for _, problem in file.check_all()) else None


def decode_everything(path: Path) -> bool:
    """Decode and slice all modules of a file, checked or not; tell whether that was possible."""
    try:
        file = SalrFile(path)
    except SalrError:
        return False
    decoded = True
    for name in file.modules:
        try:
            file.dense(name, adapters=True)
            file.slice(name, rows=slice(0, 1))
        except SalrError:
            decoded = False
    return decoded


@contextmanager
def limited(n_bytes: int, *, traced: bool = True):
    """Fail where the block runs for 10 seconds, or allocates more than twice ``n_bytes`` besides what JSON takes.

    Allocations are looked at where ``traced``, which makes it several times slower.
    """

    def too_long(number, frame):
        raise TimeoutError("reading hangs")

    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, 10)
    if traced:
        tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert peak <= 2 * n_bytes + JSON_BYTES, f"{peak} bytes were allocated to check {n_bytes}"


def run(golden: Path, draft, seeds: range, traced_every: int) -> int:
    """Return how many mutated files were refused or found damaged; raise what is no SalrError, with its seed."""
    data, refused = golden.read_bytes(), 0
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        path = Path(folder) / "fuzzed.salr"
        for seed in seeds:
            path.write_bytes(mutated(data, draft, random.Random(seed), Path(folder) / "draft.salr"))
            try:
                with limited(path.stat().st_size, traced=seed % traced_every == 0):
                    sound = check_everything(path) is not None
                refused += not (decode_everything(path) and sound)
            except Exception as error:
                error.add_note(f"the mutated file of seed {seed}") if hasattr(error, "add_note") else None
                raise
    return refused


def test_the_unchanged_file_is_sound(golden):
    assert check_everything(golden) is not None and decode_everything(golden)
    assert Container(golden).n_bytes > 10_000


def test_2000_mutated_files_raise_nothing_but_salr_errors(golden, draft):
    assert run(golden, draft, range(2000), 10) > 1000


def test_checking_a_large_file_allocates_less_than_twice_its_size(golden, draft, tmp_path):
    module = "layers.0.mlp.gate"
    draft.module(module).update(shape=[1000, 4000], source_shape=[4000, 1000], nnz=4_000_000)
    draft.module(module)["adapters"] = []
    entry = parse_module(draft.module(module), module, "")
    for name in [name for name in draft.tensors if name.startswith(f"{module}.lora")]:
        draft.drop(name)
    (spec,) = module_specs(module, entry)
    draft.put(spec.name, np.zeros(spec.n_bytes, np.uint8), dtype=spec.dtype, shape=spec.shape)
    path = draft.write(tmp_path / "large.salr")
    tracemalloc.start()
    assert check_everything(path) is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * path.stat().st_size


@pytest.mark.parametrize("claimed", [2**24, 2**40, 2**62, 2**63 - 1, 10**30])
def test_a_header_that_claims_more_than_there_is_allocates_nothing(golden, tmp_path, claimed):
    data = golden.read_bytes()
    path = tmp_path / "absurd.salr"
    path.write_bytes(min(claimed, 2**64 - 1).to_bytes(8, "little") + data[8:])
    with limited(len(data)), pytest.raises(SalrError, match="not a readable safetensors file"):
        SalrFile(path)


@pytest.mark.fuzz
def test_20000_mutated_files_raise_nothing_but_salr_errors(golden, draft):
    assert run(golden, draft, range(2000, 22_000), 2) > 10_000
