"""Mutated files: whatever bytes come, opening, checking and decoding raise nothing but SalrError."""

from __future__ import annotations

import copy
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from salr.formats.container import Container
from salr.formats.errors import SalrError
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


def read_everything(path: Path) -> bool:
    """Open, check and decode all of a file; tell whether it was sound."""
    try:
        file = SalrFile(path)
    except SalrError:
        return False
    sound = all(problem is None for _, problem in file.check_all())
    for name in file.modules:
        try:
            file.dense(name, adapters=True)
            file.slice(name, rows=slice(0, 1))
        except SalrError:
            sound = False
    return sound


def run(golden: Path, draft, seeds: range) -> int:
    """Return how many mutated files were refused or found damaged; raise what is no SalrError, with its seed."""
    data, refused = golden.read_bytes(), 0
    with tempfile.TemporaryDirectory() as folder, np.errstate(all="ignore"):
        path = Path(folder) / "fuzzed.salr"
        for seed in seeds:
            path.write_bytes(mutated(data, draft, random.Random(seed), Path(folder) / "draft.salr"))
            try:
                refused += not read_everything(path)
            except Exception as error:
                error.add_note(f"the mutated file of seed {seed}") if hasattr(error, "add_note") else None
                raise
    return refused


def test_the_unchanged_file_is_sound(golden):
    assert read_everything(golden)
    assert Container(golden).n_bytes > 10_000


def test_300_mutated_files_raise_nothing_but_salr_errors(golden, draft):
    assert run(golden, draft, range(300)) > 150


@pytest.mark.fuzz
def test_20000_mutated_files_raise_nothing_but_salr_errors(golden, draft):
    assert run(golden, draft, range(1000, 21_000)) > 10_000
