"""The four aggregations, against loops, and the law that the cut of the batch does not matter."""

from __future__ import annotations

from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.losses import Aggregation, aggregations
from rlsys.losses.aggregations.sequence_mean_token_mean import SequenceMeanTokenMean
from rlsys.losses.aggregations.sequence_mean_token_sum import SequenceMeanTokenSum
from rlsys.losses.aggregations.sequence_mean_token_sum_norm import SequenceMeanTokenSumNorm
from rlsys.losses.aggregations.token_mean import TokenMean
from rlsys.registry import discover

AGGREGATIONS = discover(aggregations, Aggregation)
every_aggregation = pytest.mark.parametrize("cls", AGGREGATIONS.values(), ids=AGGREGATIONS.keys())
SEED = st.integers(0, 2**20)


def random_batch(seed: int, rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses and mask; some rows are fully masked."""
    rng = np.random.default_rng(seed)
    mask = (rng.random((rows, width)) > 0.4) & (rng.random((rows, 1)) > 0.2)
    return rng.normal(size=(rows, width)), mask


def loss(part: Aggregation, losses: np.ndarray, mask: np.ndarray) -> float:
    return float((part(torch.tensor(mask)).numpy() * losses).sum())


RULES = [
    (TokenMean(), lambda rows: fmean(x for row in rows for x in row)),
    (SequenceMeanTokenMean(), lambda rows: fmean(fmean(row) for row in rows)),
    (SequenceMeanTokenSum(), lambda rows: fmean(sum(row) for row in rows)),
    (SequenceMeanTokenSumNorm(length=7), lambda rows: fmean(sum(row) / 7 for row in rows)),
]


@pytest.mark.parametrize(("part", "rule"), RULES, ids=[part.name for part, _ in RULES])
@settings(max_examples=40, deadline=None)
@given(seed=SEED, rows=st.integers(1, 6), width=st.integers(1, 6))
def test_rules(part: Aggregation, rule, seed: int, rows: int, width: int) -> None:  # type: ignore[no-untyped-def]
    losses, mask = random_batch(seed, rows, width)
    lists = [losses[b][mask[b]].tolist() for b in range(rows) if mask[b].any()]
    assert loss(part, losses, mask) == pytest.approx(rule(lists) if lists else 0.0, rel=1e-5, abs=1e-6)


def test_by_hand() -> None:
    """Rows of 1, 3 and 0 trained tokens, with losses 4 and 1, 2, 3."""
    losses = np.array([[4.0, 9.0, 9.0], [1.0, 2.0, 3.0], [9.0, 9.0, 9.0]])
    mask = np.array([[True, False, False], [True, True, True], [False, False, False]])
    assert loss(TokenMean(), losses, mask) == pytest.approx(10 / 4)
    assert loss(SequenceMeanTokenMean(), losses, mask) == pytest.approx((4 + 2) / 2)
    assert loss(SequenceMeanTokenSum(), losses, mask) == pytest.approx((4 + 6) / 2)
    assert loss(SequenceMeanTokenSumNorm(length=5), losses, mask) == pytest.approx((4 / 5 + 6 / 5) / 2)


@every_aggregation
@settings(max_examples=25, deadline=None)
@given(seed=SEED, rows=st.integers(1, 6), order=st.randoms(use_true_random=False))
def test_rows_can_be_permuted_padded_and_joined_by_masked_ones(cls, seed, rows, order) -> None:  # type: ignore[no-untyped-def]
    losses, mask = random_batch(seed, rows, 4)
    expected = loss(cls(), losses, mask)
    permutation = list(range(rows))
    order.shuffle(permutation)
    assert loss(cls(), losses[permutation], mask[permutation]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    wide = np.pad(mask, ((0, 2), (0, 3)))
    assert loss(cls(), np.pad(losses, ((0, 2), (0, 3)), constant_values=5), wide) == pytest.approx(
        expected, rel=1e-5, abs=1e-6
    )


@every_aggregation
def test_weights_are_float32_zero_where_masked_and_finite_without_tokens(cls) -> None:  # type: ignore[no-untyped-def]
    _, mask = random_batch(0, 5, 6)
    weights = cls()(torch.tensor(mask))
    assert weights.dtype == torch.float32
    assert (weights.numpy()[~mask] == 0).all()
    assert (weights.numpy()[mask] > 0).all()
    assert (cls()(torch.zeros(3, 4, dtype=torch.bool)) == 0).all()
    assert cls()(torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 4)
