"""One row of a packed matrix in a kernel: its mask bits, its values, its scales.

Invariant: columns go in words of 64; the bits of the last one past the last column are 0, and so are the weights there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .assembly import Assembly
from .decoding import WORD, Source, decode_bf16_pairs, decoder, start
from .parts import field, pointer
from .paths import CodePath


@dataclass(frozen=True)
class Matrix:
    """How a kernel's matrix is stored: encoding, whether it has a bitmap, and what one scale is for.

    ``scale_of`` is "" (no scales), "two words" (128 columns from a multiple of 128 on share one), "word" or "column".
    """

    encoding: str
    has_bitmap: bool
    scale_of: str = ""

    @property
    def words_scaled_together(self) -> int:
        """Return how many words share a scale for certain, 0 if not even the columns of one do."""
        return {"two words": 2, "word": 1}.get(self.scale_of, 0)


def in_pairs(matrix: Matrix, other_type: str) -> bool:
    """Tell whether bfloat16 weights meet bfloat16 x or output, and so are never widened."""
    return matrix.encoding == "bf16" and other_type == "bf16"


def in_scaled_pairs(matrix: Matrix, x_type: str) -> bool:
    """Tell whether whole numbers, which bfloat16 holds exactly, meet bfloat16 x and their sums are scaled."""
    return matrix.encoding == "int8" and matrix.words_scaled_together > 0 and x_type == "bf16"


def row_source(code: Assembly, matrix: Matrix, row: str) -> Source:
    """Return where a row's values start."""
    if matrix.has_bitmap:
        first = code.load("i64", code.at(pointer(code, "row_offsets"), code.multiply(row, 8)), 8)
    else:
        first = code.multiply(row, field(code, "n_columns"))
    return start(code, matrix.encoding, pointer(code, "values"), first)


def word_bits(code: Assembly, matrix: Matrix, rows: list[str], word: str) -> list[str]:
    """Return the 64 mask bits of a word for each row; a row's last word is read so that it ends where the row ends."""
    if not matrix.has_bitmap:
        left = code.add(field(code, "n_columns"), code.multiply(word, -WORD))
        unused = code.let(f"sub i64 {WORD}, {code.smaller(left, WORD)}")
        return [code.let(f"lshr i64 -1, {unused}")] * len(rows)
    width = field(code, "bitmap_bytes")
    wanted = code.multiply(word, 8)
    offset = code.smaller(wanted, code.add(width, -8))
    shift = code.multiply(code.let(f"sub i64 {wanted}, {offset}"), 8)
    base = code.at(pointer(code, "bitmap"), offset)
    loaded = [code.load("i64", code.at(base, code.multiply(row, width))) for row in rows]
    return [code.let(f"lshr i64 {bits}, {shift}") for bits in loaded]


def scales_of(code: Assembly, path: CodePath, matrix: Matrix, place: tuple[str, str]) -> list[str]:
    """Return vectors with the scales of a row's word, one for all its columns or one for each of its vectors."""
    row, word = place
    lanes = path.lanes
    scales = code.at(pointer(code, "scales"), code.multiply(row, code.multiply(field(code, "n_groups"), 4)))
    index = pointer(code, "group_index")
    if matrix.words_scaled_together:
        group = code.let(f"zext i32 {code.load('i32', code.at(index, code.multiply(word, 4)), 4)} to i64")
        return [code.splat("float", lanes, code.load("float", code.at(scales, code.multiply(group, 4)), 4))]
    gathered = []
    for first in range(0, WORD, lanes):
        columns = code.at(index, code.add(code.multiply(word, 4 * WORD), 4 * first))
        groups = code.load(f"<{lanes} x i32>", columns, 4)
        gathered.append(code.gather(lanes, code.let(f"getelementptr float, ptr {scales}, <{lanes} x i32> {groups}")))
    return gathered


def scaled(
    code: Assembly, path: CodePath, matrix: Matrix, place: tuple[str, str], bits: str, source: Source
) -> Iterator[str]:
    """Yield the weights of a row's word as float32 vectors, multiplied by their scales."""
    scales = scales_of(code, path, matrix, place) if matrix.scale_of else []
    for i, weights in enumerate(decoder(path, matrix.encoding)(code, bits, source)):
        yield code.let(f"fmul <{path.lanes} x float> {weights}, {scales[i % len(scales)]}") if scales else weights


def store_word(
    code: Assembly,
    path: CodePath,
    matrix: Matrix,
    place: tuple[str, str],
    packed: tuple[str, Source],
    out_type: str,
    at: str,
) -> None:
    """Store the 64 weights of a row's word, scaled, as "float" or "bf16"."""
    if in_pairs(matrix, out_type):
        for part, pairs in enumerate(decode_bf16_pairs(code, *packed)):
            code.store("<32 x i16>", pairs, code.at(at, 64 * part))
        return
    kind, out_bytes = f"<{path.lanes} x float>", 2 if out_type == "bf16" else 4
    for i, weights in enumerate(scaled(code, path, matrix, place, *packed)):
        to = code.at(at, i * path.lanes * out_bytes)
        if out_type == "bf16":
            short = f"<{path.lanes} x bfloat>"
            code.store(short, code.let(f"fptrunc {kind} {weights} to {short}"), to)
        else:
            code.store(kind, weights, to)
