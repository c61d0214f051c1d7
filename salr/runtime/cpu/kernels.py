"""The kernels as LLVM text: a product with up to 16 rows of x, and the decoding of rows into a dense workspace.

Invariant: a kernel is ``void kernel(ptr job)``. Any number of threads may run it on one job at once: each claims parts
of the rows until none is left, so a thread that comes late, or never, costs time but no result. A row's sum is always
taken in the same order, whichever thread takes it. Columns go in words of 64, the last one filled up with zeros of x;
bits past the last column are 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .assembly import Assembly, Variable
from .decoding import WORD, Source, decode_bf16_pairs, decoder, start
from .job import SLOT
from .paths import CodePath

MAX_ACCUMULATORS = 16


@dataclass(frozen=True)
class Matrix:
    """How a kernel's matrix is stored: encoding, whether it has a bitmap, and what one scale is for.

    ``scale_of`` is "" (no scales), "word" (64 columns share one) or "column".
    """

    encoding: str
    has_bitmap: bool
    scale_of: str = ""


@dataclass(frozen=True)
class Product:
    """A product kernel: rows of x, x's element type ("float" or "bf16"), and lora_B's encoding ("" for none)."""

    n_inputs: int
    x_type: str
    rank_encoding: str = ""


def product_text(path: CodePath, matrix: Matrix, product: Product) -> str:
    """Return the kernel y = x W^T * row_factors + u lora_B^T + bias."""
    code = Assembly()
    _run_first(code)
    n_together = rows_together(path, product)
    with _claimed_rows(code, n_together) as first:
        last = code.add(_field(code, "n_rows"), -1)
        rows = [code.smaller(code.add(first, i), last) for i in range(n_together)]
        _product_of_rows(code, path, matrix, product, rows)
    code.do("ret void")
    return code.module("void @kernel(ptr %job)")


def expand_text(path: CodePath, matrix: Matrix, out_type: str) -> str:
    """Return the kernel that decodes rows, scaled, into ``out`` as "float" or "bf16", whole words of columns."""
    code = Assembly()
    out_bytes = 2 if out_type == "bf16" else 4
    with _claimed_rows(code, 1) as index:
        row = code.add(index, _field(code, "first_row"))
        out = code.at(_pointer(code, "out"), code.multiply(index, _field(code, "out_stride")))
        source = _row_source(code, matrix, row)
        with code.loop(0, _n_words(code)) as word:
            bits = _word_bits(code, matrix, [row], word)[0]
            at = code.at(out, code.multiply(word, WORD * out_bytes))
            if in_pairs(matrix, out_type):
                for part, pairs in enumerate(decode_bf16_pairs(code, bits, source)):
                    code.store("<32 x i16>", pairs, code.at(at, 64 * part))
            else:
                _store_scaled(code, path, matrix, (row, word), (bits, source), out_type, at)
    code.do("ret void")
    return code.module("void @kernel(ptr %job)")


def rows_together(path: CodePath, product: Product) -> int:
    """Return how many rows of the matrix one pass decodes, so that each part of x is loaded once for all of them.

    One row at a time streams best; more pay only where x is larger than the weights that it meets.
    """
    limit = MAX_ACCUMULATORS if path.lanes == 16 else MAX_ACCUMULATORS // 2
    return 2 if 1 < product.n_inputs <= limit // 2 else 1


def in_pairs(matrix: Matrix, other_type: str) -> bool:
    """Tell whether bfloat16 weights meet bfloat16 x or output, and so are never widened."""
    return matrix.encoding == "bf16" and other_type == "bf16"


# --- jobs and parts ---------------------------------------------------------------------------------------------------


def _field(code: Assembly, name: str) -> str:
    return code.load("i64", code.at("%job", 8 * SLOT[name]), 8)


def _pointer(code: Assembly, name: str) -> str:
    return code.load("ptr", code.at("%job", 8 * SLOT[name]), 8)


def _n_words(code: Assembly) -> str:
    return code.let(f"lshr i64 {code.add(_field(code, 'n_columns'), WORD - 1)}, 6")


@contextmanager
def _claimed_rows(code: Assembly, n_together: int) -> Iterator[str]:
    """Run the body for the first of every ``n_together`` rows, part by part as this thread claims them."""
    n_parts, part_rows, n_rows = (_field(code, name) for name in ("n_parts", "part_rows", "n_rows"))
    with code.while_true() as leave:
        part = code.let("atomicrmw add ptr %job, i64 1 acq_rel")
        leave(code.let(f"icmp sge i64 {part}, {n_parts}"))
        begin = code.multiply(part, part_rows)
        with code.loop(begin, code.smaller(code.add(begin, part_rows), n_rows), n_together) as row:
            yield row
        code.let(f"atomicrmw add ptr {code.at('%job', 8 * SLOT['done'])}, i64 1 release")


def _run_first(code: Assembly) -> None:
    """Help with the kernel that computes u, then wait until every thread has finished its parts of it."""
    kernel, job = _pointer(code, "first_kernel"), _pointer(code, "first_job")
    with code.when(code.let(f"icmp ne ptr {kernel}, null")):
        code.do(f"call void {kernel}(ptr {job})")
        wanted = code.load("i64", code.at(job, 8 * SLOT["n_parts"]), 8)
        done = code.at(job, 8 * SLOT["done"])
        with code.while_true() as leave:
            count = code.let(f"load atomic i64, ptr {done} acquire, align 8")
            leave(code.let(f"icmp sge i64 {count}, {wanted}"))
            code.pause()


# --- one row ----------------------------------------------------------------------------------------------------------


def _row_source(code: Assembly, matrix: Matrix, row: str) -> Source:
    if matrix.has_bitmap:
        first = code.load("i64", code.at(_pointer(code, "row_offsets"), code.multiply(row, 8)), 8)
    else:
        first = code.multiply(row, _field(code, "n_columns"))
    return start(code, matrix.encoding, _pointer(code, "values"), first)


def _word_bits(code: Assembly, matrix: Matrix, rows: list[str], word: str) -> list[str]:
    """Return the 64 mask bits of a word for each row; a row's last word is read so that it ends where the row ends."""
    if not matrix.has_bitmap:
        left = code.add(_field(code, "n_columns"), code.multiply(word, -WORD))
        unused = code.let(f"sub i64 {WORD}, {code.smaller(left, WORD)}")
        return [code.let(f"lshr i64 -1, {unused}")] * len(rows)
    width = _field(code, "bitmap_bytes")
    wanted = code.multiply(word, 8)
    offset = code.smaller(wanted, code.add(width, -8))
    shift = code.multiply(code.let(f"sub i64 {wanted}, {offset}"), 8)
    base = code.at(_pointer(code, "bitmap"), offset)
    loaded = [code.load("i64", code.at(base, code.multiply(row, width))) for row in rows]
    return [code.let(f"lshr i64 {bits}, {shift}") for bits in loaded]


def _scales(code: Assembly, path: CodePath, matrix: Matrix, place: tuple[str, str]) -> list[str]:
    """Return vectors with the scales of a row's word, one for all its columns or one for each of its vectors."""
    row, word = place
    lanes = path.lanes
    scales = code.at(_pointer(code, "scales"), code.multiply(row, code.multiply(_field(code, "n_groups"), 4)))
    index = _pointer(code, "group_index")
    if matrix.scale_of == "word":
        group = code.let(f"zext i32 {code.load('i32', code.at(index, code.multiply(word, 4)), 4)} to i64")
        return [code.splat("float", lanes, code.load("float", code.at(scales, code.multiply(group, 4)), 4))]
    gathered = []
    for first in range(0, WORD, lanes):
        columns = code.at(index, code.add(code.multiply(word, 4 * WORD), 4 * first))
        groups = code.load(f"<{lanes} x i32>", columns, 4)
        gathered.append(code.gather(lanes, code.let(f"getelementptr float, ptr {scales}, <{lanes} x i32> {groups}")))
    return gathered


def _scaled(
    code: Assembly, path: CodePath, matrix: Matrix, place: tuple[str, str], bits: str, source: Source
) -> Iterator[str]:
    """Yield the weights of a row's word as float32 vectors, multiplied by their scales."""
    scales = _scales(code, path, matrix, place) if matrix.scale_of else []
    for i, weights in enumerate(decoder(path, matrix.encoding)(code, bits, source)):
        yield code.let(f"fmul <{path.lanes} x float> {weights}, {scales[i % len(scales)]}") if scales else weights


def _store_scaled(
    code: Assembly,
    path: CodePath,
    matrix: Matrix,
    place: tuple[str, str],
    packed: tuple[str, Source],
    out_type: str,
    at: str,
) -> None:
    kind, out_bytes = f"<{path.lanes} x float>", 2 if out_type == "bf16" else 4
    for i, weights in enumerate(_scaled(code, path, matrix, place, *packed)):
        to = code.at(at, i * path.lanes * out_bytes)
        if out_type == "bf16":
            short = f"<{path.lanes} x bfloat>"
            code.store(short, code.let(f"fptrunc {kind} {weights} to {short}"), to)
        else:
            code.store(kind, weights, to)


# --- the product ------------------------------------------------------------------------------------------------------


def _product_of_rows(code: Assembly, path: CodePath, matrix: Matrix, product: Product, rows: list[str]) -> None:
    n_chains = 4 if len(rows) * product.n_inputs <= 2 else 2 if len(rows) * product.n_inputs <= 4 else 1
    sums = [
        [[code.variable(f"<{path.lanes} x float>", "zeroinitializer") for _ in range(n_chains)] for _ in rows]
        for _ in range(product.n_inputs)
    ]
    sources = [_row_source(code, matrix, row) for row in rows]
    with code.loop(0, _n_words(code)) as word:
        bits = _word_bits(code, matrix, rows, word)
        if product.n_inputs == 1 and matrix.scale_of == "word":
            _scaled_dot(code, path, matrix, (rows[0], word), (bits[0], sources[0]), sums[0][0][0])
        else:
            _product_of_word(code, path, matrix, product, (rows, word), bits, sources, sums)
    for r, row in enumerate(rows):
        _finish_row(code, path, product, row, [_added(code, chains[r]) for chains in sums])


def _product_of_word(
    code: Assembly,
    path: CodePath,
    matrix: Matrix,
    product: Product,
    place: tuple[list[str], str],
    bits: list[str],
    sources: list[Source],
    sums: list[list[list[Variable]]],
) -> None:
    rows, word = place
    pairs = in_pairs(matrix, product.x_type)
    x_bytes, step_bytes = (2, 64) if pairs else (4, 4 * path.lanes)
    decoded = [
        decode_bf16_pairs(code, mask, source) if pairs else _scaled(code, path, matrix, (row, word), mask, source)
        for row, mask, source in zip(rows, bits, sources, strict=True)
    ]
    base = code.at(_pointer(code, "x"), code.multiply(word, WORD * x_bytes * product.n_inputs))
    for step, weights in enumerate(zip(*decoded, strict=True)):
        for m, chains in enumerate(sums):
            x = code.at(base, m * WORD * x_bytes + step * step_bytes)
            for r, weight in enumerate(weights):
                code.accumulate(chains[r][step % len(chains[r])], weight, x, path.lanes, pairs)


def _scaled_dot(
    code: Assembly,
    path: CodePath,
    matrix: Matrix,
    place: tuple[str, str],
    packed: tuple[str, Source],
    total: Variable,
) -> None:
    """Add one row's word times x (M = 1), scaled once: cheaper than to scale each vector of weights."""
    kind, x = f"<{path.lanes} x float>", code.at(_pointer(code, "x"), code.multiply(place[1], WORD * 4))
    part = code.variable(kind, "zeroinitializer")
    for i, weights in enumerate(decoder(path, matrix.encoding)(code, *packed)):
        code.accumulate(part, weights, code.at(x, 4 * i * path.lanes), path.lanes, False)
    scale = _scales(code, path, matrix, place)[0]
    arguments = f"{kind} {code.get(part)}", f"{kind} {scale}", f"{kind} {code.get(total)}"
    code.set(total, code.call(f"llvm.fma.v{path.lanes}f32", kind, *arguments))


def _added(code: Assembly, chains: list[Variable]) -> Variable:
    """Return the first of some sums with all the others added to it."""
    for chain in chains[1:]:
        code.set(chains[0], code.let(f"fadd {chains[0].kind} {code.get(chains[0])}, {code.get(chain)}"))
    return chains[0]


def _finish_row(code: Assembly, path: CodePath, product: Product, row: str, sums: list[Variable]) -> None:
    """Add lora_B's part, sum the lanes, apply factor and bias, and store one output for each row of x."""
    if product.rank_encoding:
        _add_low_rank(code, path, product, row, sums)
    y = code.at(_pointer(code, "y"), code.multiply(row, 4))
    stride = code.multiply(_field(code, "y_stride"), 4)
    factor = _optional(code, "row_factors", row, "1.0")
    bias = _optional(code, "bias", row, "0.0")
    for m, total in enumerate(sums):
        scaled = code.let(f"fmul float {code.sum_of_lanes(path.lanes, code.get(total))}, {factor}")
        code.store("float", code.let(f"fadd float {scaled}, {bias}"), code.at(y, code.multiply(stride, m)), 4)


def _optional(code: Assembly, name: str, row: str, default: str) -> str:
    """Return entry ``row`` of a float32 vector of the job, or the default where there is none."""
    place = code.variable("float", default)
    vector = _pointer(code, name)
    with code.when(code.let(f"icmp ne ptr {vector}, null")):
        code.set(place, code.load("float", code.at(vector, code.multiply(row, 4)), 4))
    return code.get(place)


def _add_low_rank(code: Assembly, path: CodePath, product: Product, row: str, sums: list[Variable]) -> None:
    rank, lanes = _field(code, "rank"), path.lanes
    value_bytes = 2 if product.rank_encoding == "bf16" else 4
    b_row = code.at(_pointer(code, "lora_B"), code.multiply(row, code.multiply(rank, value_bytes)))
    u = _pointer(code, "u")
    with code.loop(0, rank, lanes) as column:
        at = code.at(b_row, code.multiply(column, value_bytes))
        weights = (
            code.widened(code.load(f"<{lanes} x i16>", at, 2), lanes)
            if value_bytes == 2
            else code.load(f"<{lanes} x float>", at, 4)
        )
        for m, total in enumerate(sums):
            inner = code.add(code.multiply(rank, m), column)
            code.accumulate(total, weights, code.at(u, code.multiply(inner, 4)), lanes, False)
