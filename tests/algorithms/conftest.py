"""Batches made of plain numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from rlsys.types import RolloutBatch

MakeBatch = Callable[..., RolloutBatch]


def _make(
    scores: list[list[float]], lengths: list[int] | int = 3, seed: int = 0, reference: bool = True
) -> RolloutBatch:
    """One group per list of scores (NaN: unscored), one token id per prompt, random log-probs."""
    flat = np.array([score for group in scores for score in group], dtype=np.float32)
    rows = len(flat)
    rng = np.random.default_rng(seed)
    response_lengths = np.full(rows, lengths) if isinstance(lengths, int) else np.array(lengths)
    width = int(response_lengths.max())
    inside = np.arange(width) < response_lengths[:, None]
    behavior = np.where(inside, -rng.random((rows, width)), 0).astype(np.float32)
    return RolloutBatch(
        input_ids_BL=np.ones((rows, width + 1), dtype=np.int64),
        prompt_lengths_B=np.ones(rows, dtype=np.int64),
        response_lengths_B=response_lengths.astype(np.int64),
        mask_BT=inside & ~np.isnan(flat)[:, None],
        behavior_logprobs_BT=behavior,
        versions_BT=np.where(inside, 0, -1).astype(np.int32),
        scores_B=flat,
        scored_B=~np.isnan(flat),
        group_B=np.array([g for g, group in enumerate(scores) for _ in group], dtype=np.int64),
        names_B=tuple(f"p{g}#{i}" for g, group in enumerate(scores) for i in range(len(group))),
        reference_logprobs_BT=np.where(inside, behavior - 0.5, 0).astype(np.float32) if reference else None,
    )


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    return _make
