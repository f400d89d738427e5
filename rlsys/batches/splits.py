"""Which rows go together: into minibatches (optimizer steps), over ranks, and into micro-batches (forward passes)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Packing = Literal["padded", "packed"]


def minibatches(group: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows of each of at most `count` minibatches; groups stay whole and in order, and differ by at most one in number.

    `group` is int64 [B], the group number of each row. With fewer groups than `count` there are as many as groups.
    """
    numbers = list(dict.fromkeys(group.tolist()))
    chunks = np.array_split(np.array(numbers, dtype=np.int64), min(count, len(numbers)) or 1)
    return [np.flatnonzero(np.isin(group, chunk)) for chunk in chunks if len(chunk)]


def cost(lengths: Sequence[int], packing: Packing) -> int:
    """Tokens that a forward pass over rows of these lengths computes: with padding to the longest, or without."""
    if packing == "padded":
        return len(lengths) * max(lengths, default=0)
    return sum(lengths)


def split(lengths: Sequence[int], ranks: int, micro_batch_tokens: int, packing: Packing) -> list[list[list[int]]]:
    """Rows of every micro-batch of every rank: `split(...)[rank][k]` is a list of row numbers.

    Rows are dealt longest first, each to the rank with the fewest tokens so far, so two ranks differ by at most the
    longest row. Every rank has the same number of micro-batches, the last ones possibly empty, because collective
    operations need all ranks; the k-th ones of two ranks are about equally expensive. A micro-batch costs at most
    `micro_batch_tokens` (prompt and response, padding included), except that a longer row has one to itself.

    `lengths` counts prompt and response tokens of each row. Raises ValueError for ranks or a budget below 1.
    """
    if ranks < 1 or micro_batch_tokens < 1:
        raise ValueError(f"ranks ({ranks}) and micro_batch_tokens ({micro_batch_tokens}) must be at least 1")
    longest_first = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for row in longest_first:
        rank = totals.index(min(totals))
        shares[rank].append(row)
        totals[rank] += lengths[row]
    fill = _fill_in_order if packing == "padded" else _first_fit
    out = [fill(share, lengths, micro_batch_tokens) for share in shares]
    steps = max(len(micro) for micro in out)
    return [micro + [[] for _ in range(steps - len(micro))] for micro in out]


def _fill_in_order(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows come longest first, so neighbours have like length and the first of a micro-batch sets its width."""
    out: list[list[int]] = []
    for row in rows:
        if out and (len(out[-1]) + 1) * lengths[out[-1][0]] <= budget:
            out[-1].append(row)
        else:
            out.append([row])
    return out


def _first_fit(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """First-fit decreasing: each row into the first micro-batch that still has room."""
    out: list[list[int]] = []
    used: list[int] = []
    for row in rows:
        place = next((i for i, tokens in enumerate(used) if tokens + lengths[row] <= budget), None)
        if place is None:
            out.append([row])
            used.append(lengths[row])
        else:
            out[place].append(row)
            used[place] += lengths[row]
    return out
