"""Advantages inside strata of a group."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import group_statistics, to_tokens
from rlsys.metrics import Last
from rlsys.registry import Positive, UnitInterval


@dataclass
class Stratified(Estimator):
    """Compare a response with those of its own structure, so that structures are not played off against each other::

        stratum of a response: how often `pattern` occurs in it
        SAN = (r_i - mean of its stratum) / (std of its stratum + eps)      0 for the only one of a stratum
        GN  = (r_i - mean of the group) / (std of the group + eps)
        A_i = alpha * SAN + (1 - alpha) * GN

    Zhu et al. 2025, section 4. The paper's strata are counts of search calls; deviations are unbiased (n - 1).
    """

    name = "stratified"
    paper = "Zhu et al. 2025, Stratified GRPO: Handling Structural Heterogeneity, arXiv:2510.06214"
    unverified = "alpha; the rule follows a third party's code that agrees with the abstract"

    alpha: UnitInterval = 0.8
    pattern: str = "<search>"
    eps: Positive = 1e-8

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        compiled = re.compile(self.pattern)
        texts = inputs.texts or ("",) * len(inputs.scores)
        kind = torch.tensor([len(compiled.findall(text)) for text in texts], dtype=torch.long)
        pairs = torch.stack([inputs.group, kind], 1) if len(kind) else torch.zeros((0, 2), dtype=torch.long)
        strata, stratum = torch.unique(pairs, dim=0, return_inverse=True)
        parts = []
        for labels in (stratum, inputs.group):
            _, mean, std = group_statistics(inputs.scores, labels, inputs.scored)
            parts.append(torch.where(std > 0, (inputs.scores - mean) / (std + self.eps), 0))
        blended = self.alpha * parts[0] + (1 - self.alpha) * parts[1]
        groups = max(1, len(inputs.group.unique()))
        metrics = {"stratified/strata_per_prompt": Last(len(strata) / groups)}
        return Advantages(to_tokens(blended, inputs.mask), metrics=metrics)
