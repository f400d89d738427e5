"""Prompts that a value model finds neither too easy nor too hard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rlsys.curricula import Choice, Curriculum, Seen, runs
from rlsys.registry import Count, UnitInterval
from rlsys.types import Progress


@dataclass
class PredictedDifficulty(Curriculum):
    """Of `pool` candidates for every draw, in order, those whose predicted score is nearest to `target`::

        the m of k * m candidates with the smallest |V(x) - target|      V: critic, at the end of the prompt

    Gao et al. 2025 (PCL): pool = 4, target = 0.5. Candidates are judged when a step ends, by the critic as of then, for
    as many draws as the bound on staleness lets be under way; what is drawn beyond that, in place of dropped groups,
    comes in order.
    """

    name = "predicted-difficulty"
    paper = "Gao et al. 2025, Prompt Curriculum Learning for Efficient LLM Post-Training, arXiv:2510.01135"
    needs_values = True

    pool: Count = 4
    target: UnitInterval = 0.5
    # not part of the memory: judged anew when a run resumes
    predicted: dict[int, float] = field(default_factory=dict, init=False, repr=False)
    before: dict[int, float] = field(default_factory=dict, init=False, repr=False)  # of the last few steps, to compare

    def candidates(self, indices: Sequence[int]) -> list[int]:
        places = range(indices[0] * self.pool, (indices[-1] + 1) * self.pool)
        return list(dict.fromkeys(self.rows.at(place)[0] for place in places))

    def judged(self, values: Mapping[int, float]) -> None:
        self.predicted = dict(values)
        latest = (self.before | self.predicted).items()
        self.before = dict(list(latest)[-8 * len(values) :])

    def choose(self, indices: Sequence[int], progress: Progress) -> list[Choice]:
        out: list[Choice] = []
        for run in runs(indices):
            candidates = self.candidates(run)
            while len(candidates) < len(run):  # fewer rows than draws: each once more
                candidates += candidates
            distance = [abs(self.predicted.get(row, float("inf")) - self.target) for row in candidates]
            best = sorted(range(len(candidates)), key=lambda i: distance[i])[: len(run)]  # of equals the first
            out += [Choice(candidates[i], f"d{index}") for i, index in zip(sorted(best), run, strict=True)]
        return out

    def observe(self, seen: Sequence[Seen], metrics: Mapping[str, float]) -> dict[str, float]:
        pairs = [
            (self.before[one.choice.row], one.mean)
            for one in seen
            if one.choice.row in self.before and one.mean is not None
        ]
        if not pairs:
            return {}
        return {
            "curriculum/predicted": sum(value for value, _ in pairs) / len(pairs),
            "curriculum/prediction_error": sum(abs(value - mean) for value, mean in pairs) / len(pairs),
        }
