"""Some groups sampled hotter or colder, to hold the entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlsys.curricula import Choice, Curriculum, Seen
from rlsys.registry import Count, NonNegative, Positive
from rlsys.types import Progress


@dataclass
class EntropyTarget(Curriculum):
    """Prompts in order, and one in every `ratio` of them once more, at a temperature that depends on the entropy::

        T = high   when the entropy of the policy is below `target`,   else low
        entropy = mean(-log pi)     over the sampled tokens of the last step

    Wang et al. 2025 (AEPO): high = 1.2, low = 0.8, target = 0.5 (nats), ratio = 4. What becomes of the explored groups
    is up to the adjustment `explored-successes`.
    """

    name = "entropy-target"
    paper = (
        "Wang et al. 2025, Arbitrary Entropy Policy Optimization: Entropy Is Controllable in Reinforcement Finetuning, "
        "arXiv:2510.08141"
    )
    explores = True

    target: NonNegative = 0.5
    high: Positive = 1.2
    low: Positive = 0.8
    ratio: Count = 4
    entropy: float | None = field(default=None, init=False)

    def choose(self, indices: Sequence[int], progress: Progress) -> list[Choice]:
        block = self.ratio + 1  # the last of each block sees the first one's prompt again
        out = []
        for index in indices:
            first, place = divmod(index, block)
            if place < self.ratio:
                out.append(self.in_order(first * self.ratio + place))
                continue
            again = self.in_order(first * self.ratio)
            hot = self.entropy is not None and self.entropy < self.target
            out.append(replace(again, epoch=f"{again.epoch}-explored", temperature=self.high if hot else self.low))
        return out

    def observe(self, seen: Sequence[Seen], metrics: Mapping[str, float]) -> dict[str, float]:
        if "learner/entropy_estimate" in metrics:
            self.entropy = metrics["learner/entropy_estimate"]
        hot = [one.choice.temperature for one in seen if one.choice.temperature is not None]
        found = {"curriculum/explored": len(hot) / len(seen)} if seen else {}
        if hot:
            found["curriculum/temperature"] = sum(hot) / len(hot)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"entropy": self.entropy}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.entropy = state["entropy"]
