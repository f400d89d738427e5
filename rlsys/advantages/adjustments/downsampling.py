"""Training on fewer responses and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.metrics import Last, Mean, Metric
from rlsys.registry import Count, NonNegative, UnitInterval


def largest_variance(values: Tensor, size: int) -> Tensor:
    """The places of `size` of `values` [n] whose variance is largest: the k largest and the smallest of the rest.

    For a fixed k no other choice spreads further, so it is enough to try every k.
    """
    order = torch.argsort(values, stable=True)
    ranked = values[order].double()
    n = len(ranked)
    zero = torch.zeros(1, dtype=torch.float64)
    sums, squares = torch.cat([zero, ranked.cumsum(0)]), torch.cat([zero, ranked.square().cumsum(0)])
    top = torch.arange(size + 1)  # how many of the largest
    low = size - top
    total = sums[low] + sums[n] - sums[n - top]
    square = squares[low] + squares[n] - squares[n - top]
    best = int((square / size - (total / size).square()).argmax())
    return torch.cat([order[: size - best], order[n - best :]]) if best else order[:size]


@dataclass
class DualDownsampling(Adjustment):
    """Train on the responses that differ most, and in them on the tokens that matter most::

        responses: the share `rows` of the batch with the largest variance of A
        tokens:    the share `tokens` of theirs with the largest |A| * H          H: entropy at the start of the step
        both shares go in a straight line from their first to their last value over the run

    Wang et al. 2025 (D3S), sections 3.1 to 3.3: aggressive at first, then relaxed.
    """

    name = "dual-downsampling"
    paper = "Wang et al. 2025, Learning More with Less: A Dynamic Dual-Level Down-Sampling Framework, arXiv:2509.22115"
    unverified = "the shares; the paper trains on less than 20% of GRPO's tokens in all"
    needs_entropy = True

    rows: tuple[UnitInterval, UnitInterval] = (0.25, 0.5)
    tokens: tuple[UnitInterval, UnitInterval] = (0.25, 0.75)

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        assert inputs.entropy is not None
        mask, done = inputs.mask, inputs.progress.fraction
        share, token_share = (first + (last - first) * done for first, last in (self.rows, self.tokens))
        candidates = torch.nonzero(mask.any(1))[:, 0]
        kept = torch.zeros(mask.shape, dtype=torch.bool)
        if len(candidates):
            lengths = mask[candidates].sum(1)
            mean = (advantages.advantages[candidates] * mask[candidates]).sum(1) / lengths
            chosen = candidates[largest_variance(mean, max(1, round(share * len(candidates))))]
            kept[chosen] = mask[chosen]
            weight = (advantages.advantages.abs() * inputs.entropy).masked_fill(~kept, -1).flatten()
            count = max(1, round(token_share * int(kept.sum())))
            kept = torch.zeros(kept.numel(), dtype=torch.bool).index_fill(0, weight.topk(count).indices, True)
            kept = kept.reshape(mask.shape)
        metrics: dict[str, Metric] = {
            "d3s/tokens_kept": Mean(float(kept.sum()), float(mask.sum())),
            "d3s/rows_share": Last(share),
        }
        return replace(advantages, advantages=advantages.advantages * kept, mask=kept, metrics=metrics)


@dataclass
class PolicyFilter(Adjustment):
    """Of each group keep the responses whose scores can be trusted most::

        best         the `keep` best
        best-random  the best and one other at random
        best-worst   the best and the worst
        power        each row as often as it is drawn from the batch, with replacement, by |score|^power

    PF-PPO, Shen and Zhang 2024; power (= 2) is the variant of verl. Draws are seeded by the number of the batch, so
    that a resumed run repeats them.
    """

    name = "policy-filter"
    paper = "Shen and Zhang 2024, Policy Filtration in RLHF to Fine-Tune LLM for Code Generation, arXiv:2409.06957"

    strategy: Literal["best", "best-random", "best-worst", "power"] = "best-random"
    keep: Count = 1
    power: NonNegative = 2.0
    batches: int = field(default=0, init=False)

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        self.batches += 1
        generator = torch.Generator().manual_seed(self.batches)
        times = torch.zeros(len(inputs.scores))
        usable = inputs.scored & inputs.mask.any(1)
        if self.strategy == "power":
            rows = torch.nonzero(usable)[:, 0]
            weights = inputs.scores[rows].double().abs() ** self.power
            if len(rows) and weights.sum() > 0:
                drawn = torch.multinomial(weights, len(rows), replacement=True, generator=generator)
                times.index_add_(0, rows[drawn], torch.ones(len(drawn)))
        else:
            for g in inputs.group.unique().tolist():
                rows = torch.nonzero((inputs.group == g) & usable)[:, 0]
                times[self._chosen(rows, inputs.scores, generator)] = 1.0
        mask = inputs.mask & (times > 0)[:, None]
        metrics = {"pf-ppo/rows_kept": Mean(float((times > 0).sum()), float(usable.sum()))}
        weighted = advantages.advantages * times[:, None]
        return replace(advantages, advantages=weighted, mask=mask, metrics=metrics)

    def _chosen(self, rows: Tensor, scores: Tensor, generator: torch.Generator) -> Tensor:
        ranked = rows[torch.argsort(scores[rows], descending=True, stable=True)]
        if self.strategy == "best" or len(ranked) < 2:
            return ranked[: self.keep]
        other = len(ranked) - 1
        if self.strategy == "best-random":
            other = 1 + int(torch.randint(len(ranked) - 1, (1,), generator=generator))
        return ranked[[0, other]]

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches = state["batches"]
