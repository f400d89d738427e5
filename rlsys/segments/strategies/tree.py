"""Responses that branch again and again."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from rlsys.errors import ConfigError
from rlsys.registry import Count
from rlsys.roles import Branch, Sampling
from rlsys.segments import Partition, Pieces, Rounds, Strategy, continued, prefix_of
from rlsys.types import Reward, Rollout, RolloutGroup, ScoredGroup, Segment, VersionSpan


@dataclass
class _Node:
    """The end of an edge of the tree: one sampled piece, after everything that led to it."""

    rollout: Rollout
    path: str
    value: float | None = None
    children: tuple[_Node, ...] = ()
    reward: Reward | None = None  # of a leaf


@dataclass
class Tree(Strategy):
    """Every unfinished piece goes on in several ways::

        level l: breadth_l samples of `segment_tokens` tokens after each unfinished piece; the last level to the end
        V(leaf) = score, a truncated one `unfinished`;      V(node) = mean of its children's values
        segment: an edge, with the values of the node that it leaves and of the one that it leads to

    Guo et al. 2025 (SPO-tree), as in the authors' code: breadth 6-6-6 and 600 tokens for long answers, unfinished = 0.
    Each leaf is one rollout, from the prompt to its end; an edge that several share is marked as theirs in the first.
    """

    name = "tree"
    paper = (
        "Guo et al. 2025, Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large "
        "Language Models, arXiv:2505.23564"
    )
    branches = True

    breadth: tuple[Annotated[int, Field(gt=0)], ...] = (6, 6, 6)
    segment_tokens: Count = 100
    unfinished: float = 0.0

    def bind(self, partition: Partition, max_new_tokens: int, pieces: Pieces | None = None) -> None:
        super().bind(partition, max_new_tokens, pieces)
        if not self.breadth:
            raise ConfigError("algorithm.rollout.breadth: empty; give the samples of each level, such as [6, 6, 6]")
        if (len(self.breadth) - 1) * self.segment_tokens >= max_new_tokens:
            raise ConfigError(
                f"algorithm.rollout: {len(self.breadth)} levels of {self.segment_tokens} tokens leave none of "
                f"rollout.max_new_tokens ({max_new_tokens}) for the last: lower segment_tokens, or have fewer levels"
            )

    def first(self, sampling: Sampling) -> Sampling:
        return replace(sampling, n=self.breadth[0], max_new_tokens=self._limit(0, 0))

    def branch(self, rounds: Rounds) -> list[Branch]:
        level = len(rounds)
        if level == len(self.breadth):
            return []
        out = []
        for group in rounds[-1]:
            path = _path(group, rounds)
            for rollout in group.rollouts:
                prefix = np.concatenate([prefix_of(group.prompt), rollout.token_ids])
                if rollout.finish_reason == "length" and len(prefix) < self.max_new_tokens:
                    prompt = continued(rounds[0][0].prompt, f"{path}{rollout.sample}.", prefix)
                    out.append(Branch(prompt, self.breadth[level], self._limit(level, len(prefix))))
        return out

    def _limit(self, level: int, used: int) -> int:
        """Tokens of a piece on this level."""
        left = self.max_new_tokens - used
        return left if level == len(self.breadth) - 1 else min(left, self.segment_tokens)

    def to_score(self, rounds: Rounds) -> list[RolloutGroup]:
        """Leaves only."""
        inner = {_path(group, rounds) for groups in rounds[1:] for group in groups}
        out = []
        for groups in rounds:
            for group in groups:
                path = _path(group, rounds)
                leaves = tuple(r for r in group.rollouts if f"{path}{r.sample}." not in inner)
                if leaves:
                    out.append(replace(group, rollouts=leaves))
        return out

    def assemble(self, rounds: Rounds, scored: Sequence[ScoredGroup]) -> ScoredGroup:
        groups = {_path(group, rounds): group for level in rounds for group in level}
        rewards = {
            f"{_path(part.group, rounds)}{rollout.sample}.": reward
            for part in scored
            for rollout, reward in zip(part.rollouts, part.rewards, strict=True)
        }
        top = self._nodes("", groups, rewards)
        rollouts: list[Rollout] = []
        found: list[Reward] = []
        self._walk(rounds[0][0], top, [], rollouts, found)
        return ScoredGroup(replace(rounds[0][0], rollouts=tuple(rollouts)), tuple(found))

    def _nodes(self, path: str, groups: dict[str, RolloutGroup], rewards: dict[str, Reward]) -> tuple[_Node, ...]:
        out = []
        for rollout in groups[path].rollouts:
            node = _Node(rollout, f"{path}{rollout.sample}.")
            if node.path in groups:
                node.children = self._nodes(node.path, groups, rewards)
                node.value = _mean([child.value for child in node.children])
            else:
                node.reward = rewards[node.path]
                if node.reward.status == "ok":
                    node.value = self.unfinished if rollout.status == "truncated" else node.reward.score
            out.append(node)
        return tuple(out)

    def _walk(
        self,
        root: RolloutGroup,
        siblings: tuple[_Node, ...],
        above: list[tuple[_Node, Segment]],
        rollouts: list[Rollout],
        rewards: list[Reward],
    ) -> None:
        """One rollout for every leaf below, in order; an edge is `first` in the first of them alone."""
        values = [node.value for node in siblings]
        parent, known = _mean(values), [value for value in values if value is not None]
        spread = statistics.pstdev(known) if known else None
        start = above[-1][1].end if above else 0
        for node in siblings:
            edge = Segment(start, start + len(node.rollout.token_ids), parent, node.value, spread, first=True)
            if node.children:
                self._walk(root, node.children, [*above, (node, edge)], rollouts, rewards)
            else:
                assert node.reward is not None
                edges = [*above, (node, edge)]
                branches_at = next(segment.start for _, segment in edges if segment.first)
                # In this order a leaf has the most in common with the one before it.
                parent_of = (len(rollouts) - 1, branches_at) if branches_at else None
                rollouts.append(_joined(root, edges, len(rollouts), parent_of))
                rewards.append(node.reward)
            # From the second leaf on, what lies above them has been seen.
            above = [(n, s._replace(first=False)) for n, s in above]

    def expected_tokens(self, samples: int) -> float:
        pieces, total = 1, 0.0
        for level, breadth in enumerate(self.breadth):
            pieces *= breadth
            total += pieces * self._limit(level, level * self.segment_tokens)
        return total


def _path(group: RolloutGroup, rounds: Rounds) -> str:
    """ "" for the prompt's own group, "3.0." for what goes on after sample 0 of what goes on after sample 3."""
    return group.prompt.id[len(rounds[0][0].prompt.id) :].lstrip("/")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _joined(
    root: RolloutGroup, edges: Sequence[tuple[_Node, Segment]], sample: int, parent: tuple[int, int] | None
) -> Rollout:
    """The pieces along a path as one rollout."""
    pieces = [node.rollout for node, _ in edges]
    spans: list[VersionSpan] = []
    for piece, (_, edge) in zip(pieces, edges, strict=True):
        for version, start, end in piece.version_spans:
            if spans and spans[-1].version == version:
                spans[-1] = spans[-1]._replace(end=end + edge.start)
            else:
                spans.append(VersionSpan(version, start + edge.start, end + edge.start))
    return replace(
        pieces[-1],  # whose text is that of the whole response
        prompt_id=root.prompt.id,
        sample=sample,
        token_ids=np.concatenate([piece.token_ids for piece in pieces]),
        action_mask=np.concatenate([piece.action_mask for piece in pieces]),
        behavior_logprobs=np.concatenate([piece.behavior_logprobs for piece in pieces]),
        version_spans=tuple(spans),
        segments=tuple(edge for _, edge in edges),
        parent=parent,
    )
