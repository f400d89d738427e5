"""Risk measures over bundles of questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import group_statistics, to_tokens
from rlsys.metrics import Last, Mean, Metric
from rlsys.registry import Count, NonNegative, UnitInterval


@dataclass
class MixedVaRBundles(Estimator):
    """Bundles of questions are sat like exam papers, and the weaker papers weigh more::

        bundle: `questions` prompts;   paper g: the g-th response to each of them;   R = sum of its scores
        q_a: running a-quantile of R, started at the empirical one;   q_a <- q_a + rate * (a - mean 1[R < q_a])
        g = ((R - q_low)^+ - (R - q_high)^+) / (high - low)           the middle of the distribution
        h = -(q_low - R)^+ / low                                      its lower tail
        A_paper = (tail * h + g) / (1 + tail) / (std of R in the bundle + 1e-6)
        A_i = A_paper * d_i / sum_j d_j,   d_i = r_i - mean(r of the question);   A_paper / questions where the sum is 0

    Ren et al. 2025 (RiskPO), as in the authors' code: low = 0.2, high = 0.8, tail = 1.5, questions = 5, rate = 0.1. The
    smallest group of a bundle says how many papers it has; further responses are not trained on, nor is a prompt
    without a scored response. The last bundle of a batch may be smaller. Quantiles are updated before they are used.
    """

    name = "mixed-var-bundles"
    paper = "Ren et al. 2025, RiskPO: Risk-based Policy Optimization via Verifiable Reward, arXiv:2510.00911"
    unverified = "whether the quantiles are updated before or after their use in a step"

    questions: Count = 5
    low: UnitInterval = 0.2
    high: UnitInterval = 0.8
    tail: NonNegative = 1.5
    rate: NonNegative = 0.1
    quantiles: tuple[float, float] | None = field(default=None, init=False)

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        papers, rows, bundle_of = self._papers(inputs)
        advantages = torch.zeros(len(inputs.scores), dtype=torch.float64)
        kept = torch.zeros(len(inputs.scores), dtype=torch.bool)
        if not len(papers):
            return Advantages(to_tokens(advantages, inputs.mask), mask=inputs.mask & kept[:, None])
        low, high = self._track(papers)
        middle = ((papers - low).clamp(min=0) - (papers - high).clamp(min=0)) / (self.high - self.low + 1e-6)
        bottom = -(low - papers).clamp(min=0) / (self.low + 1e-6)
        value = (self.tail * bottom + middle) / (1 + self.tail)
        for number in bundle_of.unique().tolist():
            inside = bundle_of == number
            if int(inside.sum()) > 1:  # a single paper has no deviation to be divided by
                deviation = papers[inside].std()
                value[inside] = value[inside] / (deviation + 1e-6) if deviation > 0 else 0.0
        _, means, _ = group_statistics(inputs.scores, inputs.group, inputs.scored)
        for paper, its_rows in zip(value, rows, strict=True):
            credit = inputs.scores[its_rows].double() - means[its_rows]
            total = credit.sum()
            share = credit / total if total.abs() > 1e-6 else torch.full_like(credit, 1 / len(credit))
            advantages[its_rows] = paper * share
            kept[its_rows] = True
        mask = inputs.mask & kept[:, None]
        metrics: dict[str, Metric] = {
            "riskpo/quantile_low": Last(low),
            "riskpo/quantile_high": Last(high),
            "riskpo/paper_score": Mean(float(papers.sum()), float(len(papers))),
        }
        return Advantages(to_tokens(advantages, mask), metrics=metrics, mask=mask)

    def _papers(self, inputs: AdvantageInputs) -> tuple[Tensor, list[Tensor], Tensor]:
        """Scores of the papers, the rows in each, and its bundle."""
        answered = []
        for g in inputs.group.unique().tolist():
            rows = torch.nonzero((inputs.group == g) & inputs.scored)[:, 0]
            if len(rows):
                answered.append(rows)
        rows_of, bundle_of = [], []
        for start in range(0, len(answered), self.questions):
            bundle = answered[start : start + self.questions]
            for g in range(min(map(len, bundle))):
                rows_of.append(torch.stack([rows[g] for rows in bundle]))
                bundle_of.append(start)
        scores = [inputs.scores[rows].double().sum() for rows in rows_of]
        papers = torch.stack(scores) if scores else torch.zeros(0, dtype=torch.float64)
        return papers, rows_of, torch.tensor(bundle_of, dtype=torch.long)

    def _track(self, papers: Tensor) -> tuple[float, float]:
        levels = (self.low, self.high)
        if self.quantiles is None:
            found = [float(torch.quantile(papers, level)) for level in levels]
        else:
            found = [
                quantile + self.rate * (level - float((papers < quantile).double().mean()))
                for quantile, level in zip(self.quantiles, levels, strict=True)
            ]
        self.quantiles = (found[0], found[1])
        return self.quantiles

    def state_dict(self) -> dict[str, Any]:
        return {"quantiles": None if self.quantiles is None else list(self.quantiles)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = state["quantiles"]
        self.quantiles = None if saved is None else (saved[0], saved[1])
