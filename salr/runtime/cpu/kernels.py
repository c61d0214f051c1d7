"""The kernels as LLVM text: a product with up to 16 rows of x, and the decoding of rows into a dense workspace.

Invariant: a kernel is ``void kernel(ptr job)``. A row's sum is always taken in the same order, whichever thread takes
it. Columns go in words of 64, the last one filled up with zeros of x.
"""

from __future__ import annotations

from dataclasses import dataclass

from .assembly import Assembly, Variable
from .decoding import WORD, Source, decode_bf16_pairs, decode_int8_pairs, decoder
from .parts import claimed_rows, field, n_words, pointer, run_first
from .paths import CodePath
from .rows import Matrix, in_pairs, in_scaled_pairs, row_source, scaled, scales_of, store_word, word_bits

MAX_ACCUMULATORS = 16


@dataclass(frozen=True)
class Product:
    """A product kernel: rows of x, x's element type ("float" or "bf16"), and lora_B's encoding ("" for none)."""

    n_inputs: int
    x_type: str
    rank_encoding: str = ""


def product_text(path: CodePath, matrix: Matrix, product: Product) -> str:
    """Return the kernel y = x W^T * row_factors + u lora_B^T + bias."""
    code = Assembly()
    run_first(code)
    n_together = rows_together(path, product)
    with claimed_rows(code, n_together) as first:
        last = code.add(field(code, "n_rows"), -1)
        rows = [code.smaller(code.add(first, i), last) for i in range(n_together)]
        _product_of_rows(code, path, matrix, product, rows)
    code.do("ret void")
    return code.module("void @kernel(ptr %job)")


def expand_text(path: CodePath, matrix: Matrix) -> str:
    """Return the kernel that decodes rows, scaled, into ``out`` as float32, whole words of columns."""
    code = Assembly()
    with claimed_rows(code, 1) as index:
        row = code.add(index, field(code, "first_row"))
        out = code.at(pointer(code, "out"), code.multiply(index, field(code, "out_stride")))
        source = row_source(code, matrix, row)
        with code.loop(0, n_words(code)) as word:
            bits = word_bits(code, matrix, [row], word)[0]
            at = code.at(out, code.multiply(word, WORD * 4))
            store_word(code, path, matrix, (row, word), (bits, source), "float", at)
    code.do("ret void")
    return code.module("void @kernel(ptr %job)")


def rows_together(path: CodePath, product: Product) -> int:
    """Return how many rows of the matrix one pass decodes, so that each part of x is loaded once for all of them.

    One row at a time streams best; more pay only where x is larger than the weights that it meets.
    """
    limit = MAX_ACCUMULATORS if path.lanes == 16 else MAX_ACCUMULATORS // 2
    return 2 if 1 < product.n_inputs <= limit // 2 else 1


def _product_of_rows(code: Assembly, path: CodePath, matrix: Matrix, product: Product, rows: list[str]) -> None:
    n_chains = 4 if len(rows) * product.n_inputs <= 2 else 2 if len(rows) * product.n_inputs <= 4 else 1
    sums = [
        [[code.variable(f"<{path.lanes} x float>", "zeroinitializer") for _ in range(n_chains)] for _ in rows]
        for _ in range(product.n_inputs)
    ]
    sources = [row_source(code, matrix, row) for row in rows]
    if in_scaled_pairs(matrix, product.x_type):
        n_together = matrix.words_scaled_together
        whole = code.let(f"and i64 {n_words(code)}, {-n_together}")
        with code.loop(0, whole, n_together) as word:
            _product_in_scaled_pairs(code, path, matrix, product, (rows, word), n_together, sources, sums)
        with code.loop(whole, n_words(code)) as word:
            _product_in_scaled_pairs(code, path, matrix, product, (rows, word), 1, sources, sums)
    else:
        with code.loop(0, n_words(code)) as word:
            bits = word_bits(code, matrix, rows, word)
            if product.n_inputs == 1 and matrix.words_scaled_together:
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
        decode_bf16_pairs(code, mask, source) if pairs else scaled(code, path, matrix, (row, word), mask, source)
        for row, mask, source in zip(rows, bits, sources, strict=True)
    ]
    base = code.at(pointer(code, "x"), code.multiply(word, WORD * x_bytes * product.n_inputs))
    for step, weights in enumerate(zip(*decoded, strict=True)):
        for m, chains in enumerate(sums):
            x = code.at(base, m * WORD * x_bytes + step * step_bytes)
            for r, weight in enumerate(weights):
                code.accumulate(chains[r][step % len(chains[r])], weight, x, path.lanes, pairs)


def _product_in_scaled_pairs(
    code: Assembly,
    path: CodePath,
    matrix: Matrix,
    product: Product,
    place: tuple[list[str], str],
    n_together: int,
    sources: list[Source],
    sums: list[list[list[Variable]]],
) -> None:
    """Add the products of some words that share a scale: whole numbers first, then their sum times the scale."""
    rows, word = place
    kind, word_bytes = f"<{path.lanes} x float>", WORD * 2
    weights: list[list[str]] = [[] for _ in rows]
    for i in range(n_together):
        for row, mask, source in zip(weights, word_bits(code, matrix, rows, code.add(word, i)), sources, strict=True):
            row += decode_int8_pairs(code, mask, source)
    scales = [scales_of(code, path, matrix, (row, word))[0] for row in rows]
    base = code.at(pointer(code, "x"), code.multiply(word, word_bytes * product.n_inputs))
    for m, chains in enumerate(sums):
        parts = [code.variable(kind, "zeroinitializer") for _ in rows]
        for step, pair in enumerate(zip(*weights, strict=True)):
            at = code.at(base, (step // 2 * product.n_inputs + m) * word_bytes + step % 2 * 64)
            for part, weight in zip(parts, pair, strict=True):
                code.accumulate(part, weight, at, path.lanes, True)
        for part, scale, chain in zip(parts, scales, chains, strict=True):
            arguments = f"{kind} {code.get(part)}", f"{kind} {scale}", f"{kind} {code.get(chain[0])}"
            code.set(chain[0], code.call(f"llvm.fma.v{path.lanes}f32", kind, *arguments))


def _scaled_dot(
    code: Assembly,
    path: CodePath,
    matrix: Matrix,
    place: tuple[str, str],
    packed: tuple[str, Source],
    total: Variable,
) -> None:
    """Add one row's word times x (M = 1), scaled once: cheaper than to scale each vector of weights."""
    kind, x = f"<{path.lanes} x float>", code.at(pointer(code, "x"), code.multiply(place[1], WORD * 4))
    part = code.variable(kind, "zeroinitializer")
    for i, weights in enumerate(decoder(path, matrix.encoding)(code, *packed)):
        code.accumulate(part, weights, code.at(x, 4 * i * path.lanes), path.lanes, False)
    scale = scales_of(code, path, matrix, place)[0]
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
    y = code.at(pointer(code, "y"), code.multiply(row, 4))
    stride = code.multiply(field(code, "y_stride"), 4)
    factor = _optional(code, "row_factors", row, "1.0")
    bias = _optional(code, "bias", row, "0.0")
    for m, total in enumerate(sums):
        scaled = code.let(f"fmul float {code.sum_of_lanes(path.lanes, code.get(total))}, {factor}")
        code.store("float", code.let(f"fadd float {scaled}, {bias}"), code.at(y, code.multiply(stride, m)), 4)


def _optional(code: Assembly, name: str, row: str, default: str) -> str:
    """Return entry ``row`` of a float32 vector of the job, or the default where there is none."""
    place = code.variable("float", default)
    vector = pointer(code, name)
    with code.when(code.let(f"icmp ne ptr {vector}, null")):
        code.set(place, code.load("float", code.at(vector, code.multiply(row, 4)), 4))
    return code.get(place)


def _add_low_rank(code: Assembly, path: CodePath, product: Product, row: str, sums: list[Variable]) -> None:
    rank, lanes = field(code, "rank"), path.lanes
    value_bytes = 2 if product.rank_encoding == "bf16" else 4
    b_row = code.at(pointer(code, "lora_B"), code.multiply(row, code.multiply(rank, value_bytes)))
    u = pointer(code, "u")
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
