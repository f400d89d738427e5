"""What rows begin with in common: siblings of a tree, continuations, samples of one prompt.

Rows in lexicographic order are next to the one that they share most with, so a row adds to a prefix tree just what it
does not share with the row before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A prefix tree has a dense mask over its tokens: it is the faster way where these are at most this share of all
# (benchmarks/shared_prefix.py), and as long as the square of their number is not too much memory.
SHARED_PAYS = 0.4
LARGEST_TREE = 16_384


@dataclass(frozen=True, slots=True)
class SharedOrder:
    """`order` lists the rows; `fresh[i]` is how many tokens row `order[i]` does not share with the row before, all of
    them where it has another prompt (`starts[i]`).
    """

    order: list[int]
    fresh: list[int]
    starts: list[bool]


def shared_order(ids: np.ndarray, prompt_lengths: np.ndarray, lengths: np.ndarray) -> SharedOrder:
    """`ids` int64 [B, L], rows padded on the right; lengths int64 [B], of prompts and of whole rows."""
    keys = ids.astype(">i8")
    order = sorted(range(len(ids)), key=lambda b: keys[b, : lengths[b]].tobytes())
    fresh, starts = [], []
    for place, b in enumerate(order):
        common = _common(ids, lengths, order[place - 1], b) if place else 0
        start = common < prompt_lengths[b]
        starts.append(start)
        fresh.append(int(lengths[b]) if start else int(lengths[b]) - common)
    return SharedOrder(order, fresh, starts)


def worth_sharing(shared: SharedOrder, lengths: np.ndarray, budget: int) -> bool:
    """Whether micro-batches of `budget` tokens are better prefix trees than plain rows."""
    return budget <= LARGEST_TREE and sum(shared.fresh) < SHARED_PAYS * int(lengths.sum())


def _common(ids: np.ndarray, lengths: np.ndarray, a: int, b: int) -> int:
    """Tokens that two rows begin with alike."""
    most = int(min(lengths[a], lengths[b]))
    different = np.flatnonzero(ids[a, :most] != ids[b, :most])
    return int(different[0]) if different.size else most


def split_shared(shared: SharedOrder, lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """As `rlsys.batches.splits.split`, with rows that share much in one micro-batch.

    The rows of a prompt go to one rank. A micro-batch costs its prefix trees times the largest of them.
    """
    runs: list[list[int]] = []  # places in the order, a run for every prompt
    for place, start in enumerate(shared.starts):
        if start:
            runs.append([])
        runs[-1].append(place)
    weights = [sum(shared.fresh[place] for place in run) for run in runs]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for number in sorted(range(len(runs)), key=lambda i: (-weights[i], i)):
        rank = totals.index(min(totals))
        shares[rank] += runs[number]
        totals[rank] += weights[number]
    out = [_fill(share, shared, lengths, budget) for share in shares]
    steps = max(len(micro) for micro in out)
    return [micro + [[] for _ in range(steps - len(micro))] for micro in out]


def _fill(places: Sequence[int], shared: SharedOrder, lengths: Sequence[int], budget: int) -> list[list[int]]:
    out: list[list[int]] = []
    trees: list[int] = []  # nodes of each tree of the micro-batch
    for place in places:
        row = shared.order[place]
        new_tree = not out or shared.starts[place]
        after = [*trees, lengths[row]] if new_tree else [*trees[:-1], trees[-1] + shared.fresh[place]]
        if out and len(after) * max(after) <= budget:
            out[-1].append(row)
            trees = after
        else:
            out.append([row])
            trees = [lengths[row]]
    return out


@dataclass(frozen=True, slots=True)
class Forest:
    """Prefix trees of some rows, one per prompt, padded to N nodes. Node 0 is the root, and every node is a token.

    `ids`, `positions` int64 [G, N]; `mask` bool [G, N, N], True where a node sees another: itself and those above it.
    Of the U different response tokens: `before` int64 [U], the place in [G * N] of the node above each, and `targets`
    int64 [U], its id. `index` int64 [number of response tokens], the place in U of each row's tokens, in order of rows.
    """

    ids: np.ndarray
    positions: np.ndarray
    mask: np.ndarray
    before: np.ndarray
    targets: np.ndarray
    index: np.ndarray


def forest(ids: np.ndarray, prompt_lengths: np.ndarray, response_lengths: np.ndarray) -> Forest:
    """`ids` int64 [B, L], padded on the right; lengths int64 [B]."""
    lengths = prompt_lengths + response_lengths
    shared = shared_order(ids, prompt_lengths, lengths)
    tree, sizes = -1, []
    paths: dict[int, tuple[int, np.ndarray, int]] = {}  # row -> tree, its nodes, how many of them are not its own
    last = np.zeros(0, np.int64)
    for row, fresh, start in zip(shared.order, shared.fresh, shared.starts, strict=True):
        length = int(lengths[row])
        if start:
            tree += 1
            sizes.append(0)
        kept = length - fresh
        path = np.concatenate([last[:kept], np.arange(sizes[tree], sizes[tree] + fresh)])
        sizes[tree] += fresh
        paths[row] = (tree, path, kept)
        last = path
    count, width = len(sizes), max(sizes)
    node_ids = np.zeros((count, width), np.int64)
    positions = np.zeros((count, width), np.int64)
    mask = np.zeros((count, width, width), bool)
    mask[:, np.arange(width), np.arange(width)] = True  # padding sees itself, so that no row of scores is empty
    above = np.zeros((count, width), np.int64)
    wanted = []
    for row in range(len(ids)):
        number, path, kept = paths[row]
        own, length = path[kept:], len(path)
        node_ids[number, own] = ids[row, kept:length]
        positions[number, own] = np.arange(kept, length)
        mask[number][np.ix_(own, path)] = np.tri(len(own), length, k=kept, dtype=bool)
        above[number, path[1:]] = path[:-1]
        wanted.append(number * width + path[int(prompt_lengths[row]) :])
    unique, index = np.unique(np.concatenate(wanted), return_inverse=True)
    before = unique // width * width + above.reshape(-1)[unique]
    return Forest(node_ids, positions, mask, before, node_ids.reshape(-1)[unique], index.reshape(-1))
