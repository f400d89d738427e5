"""Values along a response, by sampling on from places in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlsys.registry import Count
from rlsys.roles import Branch
from rlsys.segments import Rounds, Strategy, continued, prefix_of
from rlsys.types import RolloutGroup, ScoredGroup, Segment


@dataclass
class Chain(Strategy):
    """Responses cut into segments, with a Monte-Carlo value at every cut::

        cuts c_0 < c_1 < ... of a response y      (partition)
        V(c) = mean score of `continuations` samples from x + y_{<c},      a truncated one counts `unfinished`
        V(T) = score of y
        segments [c_j, c_{j+1}) with the values V(c_j) and V(c_{j+1})

    Guo et al. 2025 (SPO-chain), as in the authors' code: 9 continuations for a model of 1B, unfinished = 0. Responses
    that begin alike share the value of what they share. Before the first cut there is no value. Kazemnejad et al. 2024
    (VinePPO, arXiv:2410.01679) is the same with a cut at every step of reasoning.
    """

    name = "chain"
    paper = (
        "Guo et al. 2025, Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large "
        "Language Models, arXiv:2505.23564"
    )
    branches = True
    uses_partition = True

    continuations: Count = 9
    unfinished: float = 0.0

    def branch(self, rounds: Rounds) -> list[Branch]:
        if len(rounds) > 1:
            return []
        [group] = rounds[0]
        found: dict[bytes, Branch] = {}
        for rollout in group.rollouts:
            if rollout.origin != "policy":
                continue
            for cut in self.cut(rollout):
                prefix = rollout.token_ids[:cut]
                if prefix.tobytes() not in found:
                    prompt = continued(group.prompt, f"{rollout.sample}.{cut}", prefix)
                    found[prefix.tobytes()] = Branch(prompt, self.continuations, self.max_new_tokens - cut)
        return list(found.values())

    def to_score(self, rounds: Rounds) -> list[RolloutGroup]:
        return [group for groups in rounds for group in groups]

    def assemble(self, rounds: Rounds, scored: Sequence[ScoredGroup]) -> ScoredGroup:
        whole = scored[0]
        values = {prefix_of(part.prompt).tobytes(): self._value(part) for part in scored[1:]}
        rollouts = []
        for rollout, reward in zip(whole.rollouts, whole.rewards, strict=True):
            if rollout.origin == "policy" and len(rollout.token_ids):
                length = len(rollout.token_ids)
                cuts = self.cut(rollout)
                ends: list[float | None] = [values[rollout.token_ids[:cut].tobytes()] for cut in cuts]
                ends.append(reward.score if reward.status == "ok" else None)
                places = [*cuts, length]
                segments = [Segment(places[j], places[j + 1], ends[j], ends[j + 1]) for j in range(len(cuts))]
                if not cuts or cuts[0] > 0:
                    segments.insert(0, Segment(0, places[0], None, ends[0]))
                rollout = replace(rollout, segments=tuple(segments))
            rollouts.append(rollout)
        return replace(whole, group=replace(whole.group, rollouts=tuple(rollouts)))

    def _value(self, group: ScoredGroup) -> float | None:
        """None when no continuation was scored."""
        found = [
            self.unfinished if rollout.status == "truncated" else reward.score
            for rollout, reward in zip(group.rollouts, group.rewards, strict=True)
            if reward.status == "ok"
        ]
        return sum(found) / len(found) if found else None

    def expected_tokens(self, samples: int) -> float:
        """With a cut at every tenth token, for want of a better guess; continuations are half as long on average."""
        cuts = max(1.0, self.max_new_tokens / 10)
        return samples * self.max_new_tokens * (1 + cuts * self.continuations / 2)
