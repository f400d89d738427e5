"""Laws of the split over minibatches, ranks and micro-batches."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.batches import cost, minibatches, split
from rlsys.batches.splits import Packing

LENGTHS = st.lists(st.integers(1, 200), max_size=60)
RANKS = st.integers(1, 5)
BUDGET = st.integers(1, 600)
PACKING = st.sampled_from(["padded", "packed"])


def tokens(rows: list[int], lengths: list[int], packing: Packing) -> int:
    """What a forward pass over the rows computes, counted cell by cell."""
    if packing == "packed":
        return sum(lengths[row] for row in rows)
    return sum(1 for _ in rows for _ in range(max(lengths[row] for row in rows)))


@given(lengths=LENGTHS, ranks=RANKS, budget=BUDGET, packing=PACKING)
def test_split(lengths: list[int], ranks: int, budget: int, packing: Packing) -> None:
    out = split(lengths, ranks, budget, packing)
    assert len(out) == ranks
    rows = [row for rank in out for micro in rank for row in micro]
    assert sorted(rows) == list(range(len(lengths))), "every row exactly once"
    assert len({len(rank) for rank in out}) == 1, "collective operations need every rank"
    assert any(rank[-1] for rank in out if rank) or not lengths, "no micro-batch is empty on all ranks"
    for rank in out:
        for micro in rank:
            assert len(micro) <= 1 or tokens(micro, lengths, packing) <= budget
            assert cost([lengths[row] for row in micro], packing) == (tokens(micro, lengths, packing) if micro else 0)
    totals = [sum(lengths[row] for micro in rank for row in micro) for rank in out]
    assert max(totals) - min(totals) <= max(lengths, default=0), "balanced to within one row"


@given(lengths=LENGTHS, ranks=RANKS, packing=PACKING)
def test_everything_fits_into_one_micro_batch_when_the_budget_allows(
    lengths: list[int], ranks: int, packing: Packing
) -> None:
    budget = len(lengths) * max(lengths, default=1) or 1
    assert all(len(rank) == bool(lengths) for rank in split(lengths, ranks, budget, packing))


@given(lengths=st.lists(st.integers(2, 200), min_size=1), ranks=RANKS, packing=PACKING)
def test_rows_over_budget_have_a_micro_batch_each(lengths: list[int], ranks: int, packing: Packing) -> None:
    micro = [micro for rank in split(lengths, ranks, 1, packing) for micro in rank if micro]
    assert sorted(micro) == [[row] for row in range(len(lengths))]


def test_by_hand() -> None:
    """8 goes to rank 0; 7 and 5 to rank 1; 3 and 2 to rank 0. Two rows of 8 or 7 would need 16 or 14 tokens."""
    assert split([5, 8, 3, 7, 2], ranks=2, micro_batch_tokens=12, packing="padded") == [[[1], [2, 4]], [[3], [0]]]
    assert split([5, 8, 3, 7, 2], ranks=2, micro_batch_tokens=12, packing="packed") == [[[1, 2], [4]], [[3, 0], []]]


def test_bad_arguments() -> None:
    for ranks, budget in ((0, 10), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            split([1], ranks, budget, "padded")


@given(sizes=st.lists(st.integers(1, 5), max_size=12), count=st.integers(1, 8))
def test_minibatches_keep_groups_whole(sizes: list[int], count: int) -> None:
    group = np.repeat(np.arange(len(sizes)), sizes)
    parts = minibatches(group, count)
    assert len(parts) == min(count, len(sizes))
    assert [row for part in parts for row in part] == list(range(len(group))), "every row once, in order"
    owners = Counter(number for part in parts for number in set(group[part]))
    assert all(times == 1 for times in owners.values())
    groups = [len(set(group[part])) for part in parts]
    assert max(groups, default=0) - min(groups, default=0) <= 1


def test_minibatches_of_interleaved_groups() -> None:
    parts = minibatches(np.array([5, 2, 5, 2, 9]), 2)
    assert [part.tolist() for part in parts] == [[0, 1, 2, 3], [4]]
