"""The kernels of ``panels`` as LLVM text: x rearranged into panels, and a product with all panels of x.

Invariant: a panel is some vectors of 16 rows of x, turned so that a vector holds one pair of columns of all 16 rows.
Decoded weights stay in the order in which they are decoded: a pair of a row's columns is broadcast against the panel,
so each weight that is decoded meets all rows of x without being rearranged. Sums are float32, in registers for a block
of columns and in the thread's workspace between blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

from .assembly import Assembly, Variable
from .decoding import WORD, Source
from .job import SLOT
from .parts import claimed_parts, field, n_words, pointer, run_first
from .paths import CodePath
from .rows import Matrix, row_source, store_word, word_bits

LANES = 16
ACCUMULATORS = 24
PART_ROWS = 48  # rows of the matrix that a thread claims at once: whole groups of every panel, whole vectors of y
BLOCK_WORDS = 64  # words of 64 columns that are decoded before they are multiplied
WORD_BYTES = 2 * WORD
VECTOR_BYTES = 64
PACKED_COLUMNS = 2 * LANES  # columns of x that are turned at once
UNROLLED = 4  # pairs of columns
SUMS = f"<{LANES} x float>"
PAIRS = "<32 x bfloat>"


@dataclass(frozen=True)
class Panel:
    """The shape of the product in registers: vectors of 16 rows of x against ``n_rows`` rows of the matrix."""

    n_vectors: int

    @property
    def n_rows(self) -> int:
        """Return how many rows of the matrix are multiplied at once."""
        return ACCUMULATORS // self.n_vectors

    @property
    def n_bytes(self) -> int:
        """Return the bytes of one pair of columns, or of one row of sums."""
        return self.n_vectors * VECTOR_BYTES


def workspace_bytes(panel: Panel, n_panels: int) -> int:
    """Return the bytes that a thread needs: decoded weights, where each row's values go on, sums."""
    return PART_ROWS * (BLOCK_WORDS * WORD_BYTES + n_panels * panel.n_bytes) + PART_ROWS * 8


def pack_text(panel: Panel) -> str:
    """Return the kernel that turns ``x`` (``n_inputs``, ``n_columns`` in 32s) into panels; a part is 16 rows of x."""
    code = Assembly()
    run_first(code)
    with claimed_parts(code) as (begin, end), code.loop(begin, end) as vector:
        last = code.add(field(code, "n_inputs"), -1)
        rows = [code.smaller(code.add(code.multiply(vector, LANES), i), last) for i in range(LANES)]
        x, stride = pointer(code, "x"), field(code, "x_stride")
        places = [code.at(x, code.multiply(row, stride)) for row in rows]
        index, inside = (code.let(f"{op} i64 {vector}, {panel.n_vectors}") for op in ("udiv", "urem"))
        to = code.at(pointer(code, "packed"), code.multiply(index, field(code, "panel_bytes")))
        to = code.at(to, code.multiply(inside, VECTOR_BYTES))
        with code.loop(0, field(code, "n_columns"), PACKED_COLUMNS) as column:
            loaded = [code.load(SUMS, code.at(place, code.multiply(column, 2))) for place in places]
            at = code.at(to, code.multiply(column, panel.n_bytes // 2))
            for i, turned in enumerate(code.transposed(SUMS, loaded)):
                code.store(SUMS, turned, code.at(at, i * panel.n_bytes))
    code.do("ret void")
    return code.module("void @kernel(ptr %job)")


def panel_text(path: CodePath, matrix: Matrix, panel: Panel) -> str:
    """Return the kernel out = (x W^T + u lora_B^T + bias) * row_factors, all panels of x, out bfloat16."""
    code = Assembly()
    run_first(code)
    thread = code.let(f"atomicrmw add ptr {code.at('%job', 8 * SLOT['next_workspace'])}, i64 1 acq_rel")
    decoded = code.at(pointer(code, "workspace"), code.multiply(thread, field(code, "workspace_bytes")))
    positions = code.at(decoded, PART_ROWS * BLOCK_WORDS * WORD_BYTES)
    space = Space(decoded, positions, code.at(positions, PART_ROWS * 8))
    total_words = n_words(code)
    with claimed_parts(code) as rows:
        kind = _start_rows(code, matrix, panel, rows, space)
        with code.loop(0, total_words, BLOCK_WORDS) as word:
            words = word, code.smaller(code.add(word, BLOCK_WORDS), total_words)
            _decode(code, path, matrix, panel, rows, words, space, kind)
            n_pairs = code.multiply(code.let(f"sub i64 {words[1]}, {word}"), WORD // 2)
            _multiply(code, panel, rows, space, code.multiply(word, WORD // 2), n_pairs)
        with code.loop(0, field(code, "rank"), BLOCK_WORDS * WORD) as column:
            columns = column, code.smaller(code.add(column, BLOCK_WORDS * WORD), field(code, "rank"))
            _copy_lora_B(code, panel, rows, columns, space)
            first = code.add(code.multiply(total_words, WORD // 2), code.let(f"lshr i64 {column}, 1"))
            n_pairs = code.let(f"lshr i64 {code.let(f'sub i64 {columns[1]}, {column}')}, 1")
            _multiply(code, panel, rows, space, first, n_pairs)
        _store(code, panel, rows, space)
    code.do("ret void")
    return code.module("void @kernel(ptr %job)")


@dataclass(frozen=True)
class Space:
    """Addresses in a thread's workspace.

    ``decoded`` is (groups of rows, words, rows of a group, 64) bfloat16, ``positions`` one number a row, ``sums``
    (panels, rows, panel's vectors) float32.
    """

    decoded: str
    positions: str
    sums: str


Span = tuple[str, str]  # first and end, exclusive


def _start_rows(code: Assembly, matrix: Matrix, panel: Panel, rows: Span, space: Space) -> str:
    """Note where each row's values start, set its sums to its bias, and return the type of a position."""
    bias = pointer(code, "bias")
    with code.loop(*rows) as row:
        inside = code.let(f"sub i64 {row}, {rows[0]}")
        position = row_source(code, matrix, row).position
        code.store(position.kind, code.get(position), code.at(space.positions, code.multiply(inside, 8)), 8)
        value = code.variable("float", "0.0")
        with code.when(code.let(f"icmp ne ptr {bias}, null")):
            code.set(value, code.load("float", code.at(bias, code.multiply(row, 4)), 4))
        every = code.splat("float", LANES, code.get(value))
        with code.loop(0, field(code, "n_panels")) as index:
            at = _sums_at(code, panel, space, index, inside)
            for i in range(panel.n_vectors):
                code.store(SUMS, every, code.at(at, i * VECTOR_BYTES))
    return position.kind


def _sums_at(code: Assembly, panel: Panel, space: Space, index: str, row: str) -> str:
    place = code.add(code.multiply(index, PART_ROWS), row)
    return code.at(space.sums, code.multiply(place, panel.n_bytes))


def _decoded_at(code: Assembly, panel: Panel, rows: Span, row: str, space: Space) -> str:
    """Return where a row's first decoded word stands; the next one follows after those of the row's group."""
    inside = code.let(f"sub i64 {row}, {rows[0]}")
    group, place = (code.let(f"{op} i64 {inside}, {panel.n_rows}") for op in ("udiv", "urem"))
    start = code.at(space.decoded, code.multiply(group, BLOCK_WORDS * panel.n_rows * WORD_BYTES))
    return code.at(start, code.multiply(place, WORD_BYTES))


def _decode(
    code: Assembly, path: CodePath, matrix: Matrix, panel: Panel, rows: Span, words: Span, space: Space, kind: str
) -> None:
    with code.loop(*rows) as row:
        kept = code.at(space.positions, code.multiply(code.let(f"sub i64 {row}, {rows[0]}"), 8))
        source = Source(pointer(code, "values"), code.variable(kind, code.load(kind, kept, 8)))
        to = _decoded_at(code, panel, rows, row, space)
        with code.loop(*words) as word:
            bits = word_bits(code, matrix, [row], word)[0]
            step = code.multiply(code.let(f"sub i64 {word}, {words[0]}"), panel.n_rows * WORD_BYTES)
            store_word(code, path, matrix, (row, word), (bits, source), "bf16", code.at(to, step))
        code.store(kind, code.get(source.position), kept, 8)


def _copy_lora_B(code: Assembly, panel: Panel, rows: Span, columns: Span, space: Space) -> None:
    """Put some columns of lora_B, a multiple of 16, where decoded weights stand."""
    half = f"<{LANES} x i16>"
    with code.loop(*rows) as row:
        place = code.add(code.multiply(row, field(code, "rank")), columns[0])
        source = code.at(pointer(code, "lora_B"), code.multiply(place, 2))
        to = _decoded_at(code, panel, rows, row, space)
        with code.loop(0, code.let(f"sub i64 {columns[1]}, {columns[0]}"), LANES) as column:
            inside = code.multiply(code.let(f"and i64 {column}, {WORD - 1}"), 2)
            word = code.multiply(code.let(f"lshr i64 {column}, 6"), panel.n_rows * WORD_BYTES)
            values = code.load(half, code.at(source, code.multiply(column, 2)), 2)
            code.store(half, values, code.at(to, code.add(word, inside)))


def _multiply(code: Assembly, panel: Panel, rows: Span, space: Space, first_pair: str, n_pairs: str) -> None:
    """Add the products of the decoded columns to all sums; ``first_pair`` is where they stand in x."""
    n_rows = code.let(f"sub i64 {rows[1]}, {rows[0]}")
    with code.loop(0, field(code, "n_panels")) as index:
        x = code.at(pointer(code, "packed"), code.multiply(index, field(code, "panel_bytes")))
        x = code.at(x, code.multiply(first_pair, panel.n_bytes))
        with code.loop(0, n_rows, panel.n_rows) as row:
            weights = code.at(space.decoded, code.multiply(row, BLOCK_WORDS * WORD_BYTES))
            _multiply_group(code, panel, (x, weights), n_pairs, _sums_at(code, panel, space, index, row))


def _multiply_group(code: Assembly, panel: Panel, factors: Span, n_pairs: str, at: str) -> None:
    x, weights = factors
    places = [code.at(at, i * VECTOR_BYTES) for i in range(panel.n_rows * panel.n_vectors)]
    sums = [code.variable(SUMS, code.load(SUMS, place)) for place in places]
    with code.loop(0, n_pairs, UNROLLED) as pair:
        word, inside = code.let(f"lshr i64 {pair}, 5"), code.let(f"and i64 {pair}, 31")
        w = code.at(weights, code.multiply(word, panel.n_rows * WORD_BYTES))
        w = code.at(w, code.multiply(inside, 4))
        for step in range(UNROLLED):
            at_x = code.at(x, code.multiply(code.add(pair, step), panel.n_bytes))
            vectors = [code.load(PAIRS, code.at(at_x, i * VECTOR_BYTES)) for i in range(panel.n_vectors)]
            for r in range(panel.n_rows):
                _add_products(
                    code,
                    sums[r * panel.n_vectors :],
                    vectors,
                    code.load("i32", code.at(w, r * WORD_BYTES + 4 * step), 4),
                )
    for place, total in zip(places, sums, strict=True):
        code.store(SUMS, code.get(total), place)


def _add_products(code: Assembly, sums: list[Variable], vectors: list[str], pair: str) -> None:
    every = code.let(f"bitcast <{LANES} x i32> {code.splat('i32', LANES, pair)} to {PAIRS}")
    for total, vector in zip(sums, vectors, strict=False):
        arguments = f"{SUMS} {code.get(total)}", f"{PAIRS} {vector}", f"{PAIRS} {every}"
        code.set(total, code.call("llvm.x86.avx512bf16.dpbf16ps.512", SUMS, *arguments))


def _store(code: Assembly, panel: Panel, rows: Span, space: Space) -> None:
    """Write a part's outputs: 16 rows of the matrix for each row of x at a time."""
    n_rows = code.let(f"sub i64 {rows[1]}, {rows[0]}")
    stride, n_inputs = field(code, "out_stride"), field(code, "n_inputs")
    with code.loop(0, n_rows, LANES) as row:
        left = code.smaller(code.let(f"sub i64 {n_rows}, {row}"), LANES)
        narrow = code.let(f"trunc i64 {code.let(f'sub i64 {LANES}, {left}')} to i16")
        mask = code.let(f"bitcast i16 {code.let(f'lshr i16 -1, {narrow}')} to <{LANES} x i1>")
        column = code.add(rows[0], row)
        factors = _factors(code, column, mask)
        with code.loop(0, field(code, "n_panels")) as index, code.loop(0, panel.n_vectors) as vector:
            at = code.at(_sums_at(code, panel, space, index, row), code.multiply(vector, VECTOR_BYTES))
            loaded = [code.load(SUMS, code.at(at, i * panel.n_bytes)) for i in range(LANES)]
            first = code.multiply(code.add(code.multiply(index, panel.n_vectors), vector), LANES)
            out = code.at(code.at(pointer(code, "out"), code.multiply(first, stride)), code.multiply(column, 2))
            for i, turned in enumerate(code.transposed(SUMS, loaded)):
                with code.when(code.let(f"icmp slt i64 {code.add(first, i)}, {n_inputs}")):
                    scaled = code.let(f"fmul {SUMS} {turned}, {factors}")
                    short = code.let(f"fptrunc {SUMS} {scaled} to <{LANES} x bfloat>")
                    code.store_masked(f"<{LANES} x bfloat>", short, code.at(out, code.multiply(stride, i)), mask)


def _factors(code: Assembly, column: str, mask: str) -> str:
    """Return ``row_factors`` from a row of the matrix on, 1 where there are none."""
    factors, place = pointer(code, "row_factors"), code.variable(SUMS, "splat (float 1.0)")
    with code.when(code.let(f"icmp ne ptr {factors}, null")):
        code.set(place, code.load_masked(SUMS, code.at(factors, code.multiply(column, 4)), mask))
    return code.get(place)
