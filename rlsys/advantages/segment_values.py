"""Credit by segment: how much better one stands after it than before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.errors import LearnerError
from rlsys.metrics import Mean, Metric, Sum
from rlsys.registry import Positive


@dataclass
class SegmentValues(Estimator):
    """The difference of the values at the two ends of a segment, on each of its tokens::

        A_t = V(end) - V(start)                                      scale: none
        A_t = (V(end) - V(start)) / (std of its siblings' V(end) + eps)     scale: siblings

    Guo et al. 2025 (SPO), equations 4 and 6. A segment without a value at either end is not trained; one that several
    rollouts share is trained in the first of them. With `discard_zero`, as the authors do for trees, segments with
    A = 0 are taken out, of the normaliser, too.
    """

    name = "segment-values"
    paper = (
        "Guo et al. 2025, Segment Policy Optimization: Effective Segment-Level Credit Assignment in RL for Large "
        "Language Models, arXiv:2505.23564"
    )
    needs_segments = True

    scale: Literal["none", "siblings"] = "none"
    eps: Positive = 1e-8
    discard_zero: bool = False

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        if inputs.segments is None:
            raise LearnerError("segment-values: no rollout of the batch has segments")
        start, end, spread, first = inputs.segments.double().unbind(-1)
        valued = inputs.mask & (first > 0) & start.isfinite() & end.isfinite()
        advantages = torch.where(valued, end - start, 0.0)
        if self.scale == "siblings":
            advantages = torch.where(valued, advantages / (spread.nan_to_num(0.0) + self.eps), 0.0)
        mask = valued & (advantages != 0) if self.discard_zero else valued
        count = float(inputs.mask.sum())
        metrics: dict[str, Metric] = {
            "segments/tokens_left_out": Mean(count - float(valued.sum()), count),
            "segments/tokens_discarded": Sum(float(valued.sum() - mask.sum())),
            "segments/value_start": Mean(float(start[valued].sum()), float(valued.sum())),
            "segments/advantage_size": Mean(float(advantages.abs().sum()), float(valued.sum())),
        }
        return Advantages(advantages.float(), metrics=metrics, mask=mask)
