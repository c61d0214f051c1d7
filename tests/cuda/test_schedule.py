"""How kernels divide their work: all of it, once, in neighbouring thread blocks."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
from hypothesis import given
from salr.cuda.schedule import Work, schedule, sharers
from salr.cuda.skinny import shares

SIZES = st.integers(1, 40)


@st.composite
def works(draw):
    has_adapters = draw(st.booleans())
    return Work(
        n_a=draw(SIZES) if has_adapters else 0, a_bytes=draw(st.floats(1, 1e5)), n_row_blocks=draw(SIZES),
        rounds_w=draw(SIZES), w_bytes=draw(st.floats(1, 1e5)), rounds_b=draw(st.integers(1, 4)) if has_adapters else 0,
        b_bytes=draw(st.floats(1, 1e5)),
    )  # fmt: skip


@given(works(), st.integers(1, 200), st.integers(1, 32))
def test_each_stage_and_round_belongs_to_one_thread_block(work, n_blocks, splits):
    n_blocks = min(n_blocks, work.n_row_blocks * work.rounds_w)
    splits = min(splits, work.n_a, n_blocks)
    chosen = schedule(work, n_blocks, splits)
    rounds = work.rounds_w + work.rounds_b
    assert (chosen[1:, 0] == chosen[:-1, 1]).all() and (chosen[1:, 2] == chosen[:-1, 3]).all()
    assert chosen[0, 2] == 0 and chosen[-1, 3] == rounds * work.n_row_blocks
    assert chosen[0, 0] == 0 and chosen[-1, 1] == work.n_a
    assert (chosen[:, 3] > chosen[:, 2]).all() and (chosen[splits:, 0] == chosen[splits:, 1]).all()
    begins = chosen[:, 2] % rounds  # B's rounds are never cut off from the first of W
    assert ((begins == 0) | (begins > work.rounds_b)).all()


@given(works(), st.integers(1, 200))
def test_sharers_of_a_row_block_are_those_with_rounds_of_it(work, n_blocks):
    n_blocks = min(n_blocks, work.n_row_blocks * work.rounds_w)
    chosen = schedule(work, n_blocks, min(4, work.n_a, n_blocks))
    rounds = work.rounds_w + work.rounds_b
    for row_block, (first, last) in enumerate(sharers(chosen, work).tolist()):
        begin, end = row_block * rounds, (row_block + 1) * rounds
        having = [b for b, (_, _, start, stop) in enumerate(chosen.tolist()) if start < end and stop > begin]
        assert having == list(range(first, last + 1))


@given(st.integers(1, 10**6), st.integers(1, 200))
def test_each_item_of_a_skinny_product_belongs_to_one_thread_block(n_items, n_blocks):
    n_blocks = min(n_blocks, n_items)
    found = shares(n_items, n_blocks)

    def first_of(block):  # as skinny.cuh has it
        late = max(block - found["first_late"], 0)
        return block * found["share"] + min(block, found["more"]) - late * found["fewer"]

    starts = [first_of(block) for block in range(n_blocks + 1)]
    assert starts[0] == 0 and starts[-1] == n_items
    assert all(start < end for start, end in itertools.pairwise(starts))
