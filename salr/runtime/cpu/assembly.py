"""Text of one LLVM function, written instruction by instruction.

Invariant: every value is in SSA form; what changes in a loop lives in a ``Variable`` (an alloca that LLVM's
optimizer turns into a register). Addresses are of type ptr, offsets are in bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Variable:
    """A place for one value of ``kind`` that may change."""

    kind: str
    address: str


class Assembly:
    """The body of one function and the intrinsics and constants that it needs."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._places: list[str] = []
        self._outside: dict[str, str] = {}
        self._n_names = 0

    def let(self, instruction: str) -> str:
        """Append an instruction that has a result, and return the result's name."""
        name = self._name("v")
        self.lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        """Append an instruction without a result."""
        self.lines.append(f"  {instruction}")

    def call(self, function: str, returns: str, *arguments: str) -> str:
        """Call an intrinsic with typed arguments (``"i64 %x"``) and return its result."""
        kinds = ", ".join(argument.rsplit(" ", 1)[0] for argument in arguments)
        self._outside[function] = f"declare {returns} @{function}({kinds})"
        return self.let(f"call {returns} @{function}({', '.join(arguments)})")

    def constant(self, name: str, data: bytes, align: int = 64) -> str:
        """Return the address of constant bytes."""
        escaped = "".join(f"\\{byte:02x}" for byte in data)
        self._outside[name] = f'@{name} = internal constant [{len(data)} x i8] c"{escaped}", align {align}'
        return f"@{name}"

    def variable(self, kind: str, start: str) -> Variable:
        """Return a new place that holds ``start``."""
        place = Variable(kind, self._name("p"))
        self._places.append(f"  {place.address} = alloca {kind}, align 64")
        self.set(place, start)
        return place

    def get(self, place: Variable) -> str:
        """Return the present value of a place."""
        return self.let(f"load {place.kind}, ptr {place.address}")

    def set(self, place: Variable, value: str) -> None:
        """Change the value of a place."""
        self.do(f"store {place.kind} {value}, ptr {place.address}")

    def at(self, base: str, offset: str | int) -> str:
        """Return the address ``offset`` bytes after ``base``."""
        return self.let(f"getelementptr i8, ptr {base}, i64 {offset}")

    def load(self, kind: str, address: str, align: int = 1) -> str:
        """Load a value; ``align`` in bytes is what is known of the address."""
        return self.let(f"load {kind}, ptr {address}, align {align}")

    def store(self, kind: str, value: str, address: str, align: int = 1) -> None:
        """Store a value."""
        self.do(f"store {kind} {value}, ptr {address}, align {align}")

    def add(self, left: str | int, right: str | int) -> str:
        """Return the sum of two i64."""
        return self.let(f"add i64 {left}, {right}")

    def multiply(self, left: str | int, right: str | int) -> str:
        """Return the product of two i64."""
        return self.let(f"mul i64 {left}, {right}")

    def smaller(self, left: str | int, right: str | int) -> str:
        """Return the smaller of two signed i64."""
        return self.call("llvm.smin.i64", "i64", f"i64 {left}", f"i64 {right}")

    def splat(self, kind: str, n_lanes: int, value: str) -> str:
        """Return a vector with ``value`` in every lane."""
        first = self.let(f"insertelement <{n_lanes} x {kind}> poison, {kind} {value}, i32 0")
        return self.shuffle(f"<{n_lanes} x {kind}>", first, [0] * n_lanes)

    def shuffle(self, kind: str, vector: str, lanes: Sequence[int]) -> str:
        """Return the named lanes of one vector of ``kind``."""
        order = ", ".join(f"i32 {lane}" for lane in lanes)
        return self.let(f"shufflevector {kind} {vector}, {kind} poison, <{len(lanes)} x i32> <{order}>")

    def transposed(self, kind: str, vectors: Sequence[str]) -> list[str]:
        """Return vector i's lane j in vector j's lane i, for as many vectors as ``kind`` has lanes."""
        turned, n = list(vectors), len(vectors)
        step = 1
        while step < n:  # swap one bit of the vector's number with the same bit of the lane's
            for i in (i for i in range(n) if not i & step):
                pair = turned[i], turned[i | step]
                even = [n + (j ^ step) if j & step else j for j in range(n)]
                odd = [n + j if j & step else j | step for j in range(n)]
                turned[i], turned[i | step] = (self.mixed(kind, pair, order) for order in (even, odd))
            step *= 2
        return turned

    def mixed(self, kind: str, pair: tuple[str, str], lanes: Sequence[int]) -> str:
        """Return the named lanes of two vectors of ``kind``."""
        order = ", ".join(f"i32 {lane}" for lane in lanes)
        return self.let(f"shufflevector {kind} {pair[0]}, {kind} {pair[1]}, <{len(lanes)} x i32> <{order}>")

    def load_masked(self, kind: str, address: str, mask: str) -> str:
        """Load the lanes of a vector that ``mask`` (as many i1) names, 0 for the others; nothing else is read."""
        lanes, short = _lanes_and_name(kind)
        arguments = f"ptr {address}", "i32 1", f"<{lanes} x i1> {mask}", f"{kind} zeroinitializer"
        return self.call(f"llvm.masked.load.{short}.p0", kind, *arguments)

    def store_masked(self, kind: str, value: str, address: str, mask: str) -> None:
        """Store the lanes of a vector that ``mask`` (as many i1) names; nothing else is written."""
        lanes, short = _lanes_and_name(kind)
        name = f"llvm.masked.store.{short}.p0"
        self._outside[name] = f"declare void @{name}({kind}, ptr, i32, <{lanes} x i1>)"
        self.do(f"call void @{name}({kind} {value}, ptr {address}, i32 1, <{lanes} x i1> {mask})")

    def gather(self, lanes: int, places: str) -> str:
        """Load a float32 from each of a vector of addresses."""
        kind, bits = f"<{lanes} x float>", f"<{lanes} x i1>"
        every = self.let(f"xor {bits} zeroinitializer, splat (i1 true)")
        name = f"llvm.masked.gather.v{lanes}f32.v{lanes}p0"
        return self.call(name, kind, f"<{lanes} x ptr> {places}", "i32 4", f"{bits} {every}", f"{kind} zeroinitializer")

    def widened(self, half: str, lanes: int) -> str:
        """Return bfloat16 values (as i16) in float32 lanes: the high half of each."""
        wide = self.let(f"zext <{lanes} x i16> {half} to <{lanes} x i32>")
        high = self.let(f"shl <{lanes} x i32> {wide}, splat (i32 16)")
        return self.let(f"bitcast <{lanes} x i32> {high} to <{lanes} x float>")

    def accumulate(self, total: Variable, weights: str, x: str, lanes: int, in_pairs: bool) -> None:
        """Add the products of weights and the values at ``x`` to the lanes of ``total``."""
        kind = total.kind
        if in_pairs:  # <32 x i16> of bfloat16 against as many: two products a lane
            pairs = "<32 x bfloat>"
            left = self.let(f"bitcast <32 x i16> {weights} to {pairs}")
            arguments = f"{kind} {self.get(total)}", f"{pairs} {left}", f"{pairs} {self.load(pairs, x)}"
            self.set(total, self.call("llvm.x86.avx512bf16.dpbf16ps.512", kind, *arguments))
        else:
            arguments = f"{kind} {weights}", f"{kind} {self.load(kind, x)}", f"{kind} {self.get(total)}"
            self.set(total, self.call(f"llvm.fma.v{lanes}f32", kind, *arguments))

    def sum_of_lanes(self, lanes: int, vector: str) -> str:
        """Return the sum of a float32 vector, by halves."""
        while lanes > 1:
            kind, half = f"<{lanes} x float>", f"<{lanes // 2} x float>"
            low = self.shuffle(kind, vector, range(lanes // 2))
            high = self.shuffle(kind, vector, range(lanes // 2, lanes))
            vector, lanes = self.let(f"fadd {half} {low}, {high}"), lanes // 2
        return self.let(f"extractelement <1 x float> {vector}, i32 0")

    def count_ones(self, mask: str, lanes: int) -> str:
        """Return the number of set bits of a mask of ``lanes`` bits as i64."""
        count = self.call(f"llvm.ctpop.i{lanes}", f"i{lanes}", f"i{lanes} {mask}")
        return count if lanes == 64 else self.let(f"zext i{lanes} {count} to i64")

    def prefetch(self, address: str) -> None:
        """Ask for a cache line for the second-level cache."""
        self._outside["llvm.prefetch.p0"] = "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)"
        self.do(f"call void @llvm.prefetch.p0(ptr {address}, i32 0, i32 2, i32 1)")

    def pause(self) -> None:
        """Tell the processor that this is a waiting loop."""
        self._outside["llvm.x86.sse2.pause"] = "declare void @llvm.x86.sse2.pause()"
        self.do("call void @llvm.x86.sse2.pause()")

    @contextmanager
    def loop(self, start: str | int, stop: str | int, step: int = 1) -> Iterator[str]:
        """Repeat the lines of the ``with`` body for an i64 index from ``start`` to ``stop``, exclusive."""
        index = self.variable("i64", str(start))
        with self.while_true() as leave:
            i = self.get(index)
            leave(self.let(f"icmp sge i64 {i}, {stop}"))
            yield i
            self.set(index, self.add(i, step))

    @contextmanager
    def while_true(self) -> Iterator[Leave]:
        """Repeat the lines of the ``with`` body until the function that is handed out gets a true i1."""
        begin, end = self._label(), self._label()
        self.do(f"br label %{begin}")
        self.lines.append(f"{begin}:")
        yield Leave(self, end)
        self.do(f"br label %{begin}")
        self.lines.append(f"{end}:")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Run the lines of the ``with`` body only if the i1 is true."""
        inside, end = self._label(), self._label()
        self.do(f"br i1 {condition}, label %{inside}, label %{end}")
        self.lines.append(f"{inside}:")
        yield
        self.do(f"br label %{end}")
        self.lines.append(f"{end}:")

    def module(self, signature: str) -> str:
        """Return the text of a module with this one function."""
        head = [*self._outside.values(), f"define {signature} {{", *self._places]
        return "\n".join([*head, *self.lines, "}", ""])

    def _name(self, letter: str) -> str:
        self._n_names += 1
        return f"%{letter}{self._n_names}"

    def _label(self) -> str:
        return self._name("l")[1:]


@dataclass(frozen=True)
class Leave:
    """What ends a ``while_true`` loop."""

    code: Assembly
    end: str

    def __call__(self, condition: str) -> None:
        """Leave the loop here if the i1 is true."""
        further = self.code._label()
        self.code.do(f"br i1 {condition}, label %{self.end}, label %{further}")
        self.code.lines.append(f"{further}:")


def _lanes_and_name(kind: str) -> tuple[int, str]:
    """Return the lanes of a vector type and what intrinsics call it: 16 and "v16f32" for "<16 x float>"."""
    lanes, element = kind.strip("<>").split(" x ")
    return int(lanes), f"v{lanes}{ {'float': 'f32', 'bfloat': 'bf16'}[element] }"
