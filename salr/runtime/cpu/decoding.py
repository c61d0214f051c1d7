"""How packed weights become vectors: the bits of 64 columns and the values that follow, in registers.

Invariant: a load of values begins no later than where the kept values of its matrix end and takes at most 64 bytes.
The file keeps at least 64 zero bytes after the last value, so nothing past the tensor is read (a prefetch may point
past it; it reads nothing and cannot fail).

A decoder takes the mask of 64 columns and yields their weights, one vector after the other, so that a caller may use
each before the next is decoded. It moves its ``position`` past the values it used: an address for all encodings but
nf4, whose values are half a byte; there it counts nibbles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ...formats.values import NF4_CODE_BOOK
from .assembly import Assembly, Variable
from .paths import CodePath

WORD = 64  # columns of the bitmap that are read at once
PREFETCH_BYTES = (
    8192  # how far ahead values are asked for: 4096 to 16384 measure alike, without it M = 1 is a quarter slower
)
VALUE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1}
ABSENT = 0x80  # as an index of pshufb it gives 0; as the top byte of a lane number it marks a removed weight


@dataclass(frozen=True)
class Source:
    """Where one row's values come from: ``values`` is the tensor's address, ``position`` moves along the row."""

    values: str
    position: Variable


Decoder = Callable[[Assembly, str, Source], Iterator[str]]


def decoder(path: CodePath, encoding: str) -> Decoder:
    """Return what decodes 64 columns into vectors of ``path.lanes`` float32, unscaled."""
    return {8: _EIGHT_LANES, 16: _SIXTEEN_LANES}[path.lanes][encoding]


def decode_bf16_pairs(code: Assembly, bits: str, source: Source) -> Iterator[str]:
    """Decode 64 columns of bf16 values into two <32 x i16>: vpexpandw."""
    for part in range(2):
        mask = _mask(code, bits, part, 32)
        yield _expand(code, "i16", 32, _values(code, "<32 x i16>", mask, 32, source, 2), mask)


def decode_int8_pairs(code: Assembly, bits: str, source: Source) -> Iterator[str]:
    """Decode 64 columns of int8 values into two <32 x i16> of bfloat16, unscaled: exact, they have 8 bits."""
    quarters = [code.let(f"bitcast <16 x float> {wide} to <32 x i16>") for wide in _wide_int8(code, bits, source)]
    for low, high in (quarters[:2], quarters[2:]):
        yield code.mixed("<32 x i16>", (low, high), range(1, 64, 2))  # the upper halves: the lower ones are 0


def start(code: Assembly, encoding: str, values: str, first: str) -> Source:
    """Return the source of a row whose first kept value is element ``first`` of the tensor."""
    if encoding == "nf4":
        return Source(values, code.variable("i64", first))
    return Source(values, code.variable("ptr", code.at(values, code.multiply(first, VALUE_BYTES[encoding]))))


def _mask(code: Assembly, bits: str, part: int, lanes: int) -> str:
    """Return the bits of one of the 64 / ``lanes`` parts of a word."""
    return bits if lanes == WORD else code.let(f"trunc i64 {code.let(f'lshr i64 {bits}, {part * lanes}')} to i{lanes}")


def _values(code: Assembly, kind: str, mask: str, lanes: int, source: Source, value_bytes: int) -> str:
    """Load as many bytes as ``kind`` has at the position, and move it past the values that the mask uses.

    For AVX-512 the load is volatile so that LLVM does not fold it into the expand instruction, whose form with a memory
    operand takes up to 2.5 times as long on Zen 4.
    """
    at = code.get(source.position)
    code.prefetch(code.at(at, PREFETCH_BYTES))
    values = code.let(f"load {'volatile ' if lanes > 8 else ''}{kind}, ptr {at}, align 1")
    code.set(source.position, code.at(at, code.multiply(code.count_ones(mask, lanes), value_bytes)))
    return values


# --- AVX-512: the expand instructions ---------------------------------------------------------------------------------


def _expand(code: Assembly, kind: str, lanes: int, values: str, mask: str) -> str:
    """Return a vector with consecutive values in the lanes that the mask names and 0 in the others."""
    vector = f"<{lanes} x {kind}>"
    bits = code.let(f"bitcast i{lanes} {mask} to <{lanes} x i1>")
    name = f"llvm.x86.avx512.mask.expand.v{lanes}{kind.replace('float', 'f32')}"
    return code.call(name, vector, f"{vector} {values}", f"{vector} zeroinitializer", f"<{lanes} x i1> {bits}")


def _quarters(code: Assembly, kind: str, lanes: int, vector: str) -> Iterator[str]:
    """Yield a vector's parts of 16 lanes."""
    for first in range(0, lanes, 16):
        yield code.shuffle(f"<{lanes} x {kind}>", vector, range(first, first + 16))


def _wide_bf16(code: Assembly, bits: str, source: Source) -> Iterator[str]:
    for pairs in decode_bf16_pairs(code, bits, source):
        for half in _quarters(code, "i16", 32, pairs):
            yield code.widened(half, 16)


def _wide_fp16(code: Assembly, bits: str, source: Source) -> Iterator[str]:
    for pairs in decode_bf16_pairs(code, bits, source):
        for half in _quarters(code, "i16", 32, pairs):
            yield code.let(f"fpext <16 x half> {code.let(f'bitcast <16 x i16> {half} to <16 x half>')} to <16 x float>")


def _wide_fp32(code: Assembly, bits: str, source: Source) -> Iterator[str]:
    for part in range(4):
        mask = _mask(code, bits, part, 16)
        yield _expand(code, "float", 16, _values(code, "<16 x float>", mask, 16, source, 4), mask)


def _wide_int8(code: Assembly, bits: str, source: Source) -> Iterator[str]:
    small = _expand(code, "i8", 64, _values(code, "<64 x i8>", bits, 64, source, 1), bits)
    for quarter in _quarters(code, "i8", 64, small):
        yield code.let(f"sitofp <16 x i32> {code.let(f'sext <16 x i8> {quarter} to <16 x i32>')} to <16 x float>")


def _wide_nf4(code: Assembly, bits: str, source: Source) -> Iterator[str]:
    codes = _expand(code, "i8", 64, _nibbles(code, bits, source, 64), bits)
    book = code.load("<16 x float>", code.constant("code_book", NF4_CODE_BOOK.tobytes()), 64)
    for part, quarter in enumerate(_quarters(code, "i8", 64, codes)):
        lanes = code.let(f"zext <16 x i8> {quarter} to <16 x i32>")
        name = "llvm.x86.avx512.permvar.sf.512"
        found = code.call(name, "<16 x float>", f"<16 x float> {book}", f"<16 x i32> {lanes}")
        kept = code.let(f"bitcast i16 {_mask(code, bits, part, 16)} to <16 x i1>")
        yield code.let(f"select <16 x i1> {kept}, <16 x float> {found}, <16 x float> zeroinitializer")


def _nibbles(code: Assembly, mask: str, source: Source, lanes: int) -> str:
    """Return the next ``lanes`` nibbles as bytes.

    A row may start in the middle of a byte. So each pair is taken from two bytes, b and the one after it, as a 16-bit
    number that is shifted by 4 where the row started with a high nibble.
    """
    position = code.get(source.position)
    at = code.at(source.values, code.let(f"lshr i64 {position}, 1"))
    code.prefetch(code.at(at, PREFETCH_BYTES))
    n = lanes // 2
    kind = f"<{n} x i16>"
    byte, after = (code.let(f"zext <{n} x i8> {code.load(f'<{n} x i8>', code.at(at, i))} to {kind}") for i in range(2))
    both = code.let(f"or {kind} {byte}, {code.let(f'shl {kind} {after}, splat (i16 8)')}")
    odd = code.let(f"trunc i64 {code.let(f'shl i64 {position}, 2')} to i16")
    shift = code.splat("i16", n, code.let(f"and i16 {odd}, 4"))
    pair = code.let(f"and {kind} {code.let(f'lshr {kind} {both}, {shift}')}, splat (i16 255)")
    spread = code.let(f"or {kind} {pair}, {code.let(f'shl {kind} {pair}, splat (i16 4)')}")
    single = code.let(f"and {kind} {spread}, splat (i16 3855)")  # 0x0f0f: one nibble a byte
    code.set(source.position, code.add(position, code.count_ones(mask, lanes)))
    return code.let(f"bitcast {kind} {single} to <{lanes} x i8>")


# --- AVX2: byte shuffles and lane permutations, chosen by a table with a line for each byte of the bitmap -------------


def _by_bytes(decode: Callable[[Assembly, str, Source], str]) -> Decoder:
    """Return the decoder that takes the eight bytes of a word one by one."""

    def whole_word(code: Assembly, bits: str, source: Source) -> Iterator[str]:
        for part in range(8):
            yield decode(code, _mask(code, bits, part, 8), source)

    return whole_word


def _places() -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return (256, 8): how many kept weights stand before column j of byte m, -1 where column j was removed."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    return np.where(bits, np.cumsum(bits, 1) - 1, -1)


def _byte_table(value_bytes: int, lane_bytes: int) -> bytes:
    """Return 256 shuffles that put value j into the top ``value_bytes`` bytes of its lane, and 0 into all others."""
    place = _places()[:, :, None]
    byte = np.arange(lane_bytes) - (lane_bytes - value_bytes)
    return np.where((place >= 0) & (byte >= 0), place * value_bytes + byte, ABSENT).astype(np.uint8).tobytes()


def _line(code: Assembly, table: str, mask: str, line_bytes: int) -> str:
    return code.at(table, code.multiply(code.let(f"zext i8 {mask} to i64"), line_bytes))


def _shuffled(code: Assembly, mask: str, source: Source, value_bytes: int) -> str:
    """Return 8 lanes of 32 bits, each value in the top bytes of its lane: vpshufb on a copy in each half."""
    table = code.constant(f"top_{value_bytes}_of_4", _byte_table(value_bytes, 4))
    kind, n_copies = {1: ("i64", 4), 2: ("i128", 2)}[value_bytes]
    copies = code.splat(kind, n_copies, _values(code, kind, mask, 8, source, value_bytes))
    both = code.let(f"bitcast <{n_copies} x {kind}> {copies} to <32 x i8>")
    line = code.load("<32 x i8>", _line(code, table, mask, 32), 32)
    return code.call("llvm.x86.avx2.pshuf.b", "<32 x i8>", f"<32 x i8> {both}", f"<32 x i8> {line}")


def _eight_bf16(code: Assembly, mask: str, source: Source) -> str:
    return code.let(f"bitcast <32 x i8> {_shuffled(code, mask, source, 2)} to <8 x float>")


def _eight_int8(code: Assembly, mask: str, source: Source) -> str:
    lanes = code.let(f"bitcast <32 x i8> {_shuffled(code, mask, source, 1)} to <8 x i32>")
    return code.let(f"sitofp <8 x i32> {code.let(f'ashr <8 x i32> {lanes}, splat (i32 24)')} to <8 x float>")


def _eight_fp16(code: Assembly, mask: str, source: Source) -> str:
    table = code.constant("top_2_of_2", _byte_table(2, 2))
    values = _values(code, "<16 x i8>", mask, 8, source, 2)
    line = code.load("<16 x i8>", _line(code, table, mask, 16), 16)
    half = code.call("llvm.x86.ssse3.pshuf.b.128", "<16 x i8>", f"<16 x i8> {values}", f"<16 x i8> {line}")
    return code.let(f"fpext <8 x half> {code.let(f'bitcast <16 x i8> {half} to <8 x half>')} to <8 x float>")


def _eight_fp32(code: Assembly, mask: str, source: Source) -> str:
    return _placed(code, mask, _values(code, "<8 x float>", mask, 8, source, 4))


def _eight_nf4(code: Assembly, mask: str, source: Source) -> str:
    codes = code.let(f"zext <8 x i8> {_nibbles(code, mask, source, 8)} to <8 x i32>")
    address = code.constant("code_book", NF4_CODE_BOOK.tobytes())
    low, high = (_permuted(code, code.load("<8 x float>", code.at(address, i), 32), codes) for i in (0, 32))
    upper = code.let(f"icmp ugt <8 x i32> {codes}, splat (i32 7)")
    return _placed(code, mask, code.let(f"select <8 x i1> {upper}, <8 x float> {high}, <8 x float> {low}"))


def _placed(code: Assembly, mask: str, values: str) -> str:
    """Move 8 consecutive float32 to their columns, 0 elsewhere."""
    table = code.constant("places", _places().astype(np.int32).tobytes())
    line = code.load("<8 x i32>", _line(code, table, mask, 32), 32)
    absent = code.let(f"icmp slt <8 x i32> {line}, zeroinitializer")
    found = _permuted(code, values, line)
    return code.let(f"select <8 x i1> {absent}, <8 x float> zeroinitializer, <8 x float> {found}")


def _permuted(code: Assembly, values: str, lanes: str) -> str:
    return code.call("llvm.x86.avx2.permps", "<8 x float>", f"<8 x float> {values}", f"<8 x i32> {lanes}")


_SIXTEEN_LANES: dict[str, Decoder] = {
    "bf16": _wide_bf16,
    "fp16": _wide_fp16,
    "fp32": _wide_fp32,
    "int8": _wide_int8,
    "nf4": _wide_nf4,
}
_EIGHT_LANES: dict[str, Decoder] = {
    "bf16": _by_bytes(_eight_bf16),
    "fp16": _by_bytes(_eight_fp16),
    "fp32": _by_bytes(_eight_fp32),
    "int8": _by_bytes(_eight_int8),
    "nf4": _by_bytes(_eight_nf4),
}
