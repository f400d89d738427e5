"""Tokens that good and bad responses share."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlsys.advantages import Adjustment, AdvantageInputs, Advantages
from rlsys.metrics import Mean
from rlsys.registry import NonNegative


@dataclass
class ConflictTokens(Adjustment):
    """Do not punish in bad responses the tokens by which good ones of the prompt begin and end::

        conflict: a token stands at the same place in a response with A > 0 and in one with A < 0 of the group,
                  counted from the start while that holds without a gap, and likewise from the end
        A <- weight * A  for conflict tokens of good responses,   0 * A  for those of bad ones

    Simoni et al. 2025 (GTPO), equation 4, weight = 2; a token that conflicts both from the start and from the end gets
    the factor twice, as in the authors' code. Which responses are good is a matter of their score, so this comes before
    `entropy-filter`, which has responses of both kinds take part here and shifts advantages across zero afterwards.
    """

    name = "conflict-tokens"
    paper = "Simoni et al. 2025, GTPO: Trajectory-Based Policy Optimization in Large Language Models, arXiv:2508.03772"
    unverified = (
        "the code also divides a response's loss by its number of conflict tokens, which the paper does not have"
    )

    provides = ("conflict_factor",)

    weight: NonNegative = 2.0

    def __call__(self, inputs: AdvantageInputs, advantages: Advantages) -> Advantages:
        assert inputs.token_ids is not None
        mask, given = inputs.mask, advantages.advantages
        sign = torch.sign((given * mask).sum(1))
        lengths = mask.sum(1)
        places = torch.arange(mask.shape[1])
        # A prefix is aligned on the left; for the end, every row is moved so that its last token comes first.
        backwards = (lengths[:, None] - 1 - places).clamp(min=0)
        inside = places < lengths[:, None]
        packed, order = _packed(inputs.token_ids, mask)
        first = _conflicts(packed, inside, sign, inputs.group)
        last = _conflicts(packed.gather(1, backwards), inside, sign, inputs.group)
        last = last.gather(1, backwards) & inside
        factor = torch.ones(mask.shape)
        for conflict in (first, last):
            factor = torch.where(conflict, factor * torch.where(sign[:, None] > 0, self.weight, 0.0), factor)
        spread = torch.ones(mask.shape).scatter(1, order, factor)
        conflicts = float(((first | last) & inside).sum())
        metrics = {"gtpo/conflict_tokens": Mean(conflicts, float(mask.sum()))}
        spread = torch.where(mask, spread, 1.0)
        extras = {**advantages.extras, "conflict_factor": spread}
        return replace(advantages, advantages=given * spread, extras=extras, metrics=metrics)


def _packed(token_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Trained tokens moved to the front of each row, and the columns they come from."""
    order = torch.argsort((~mask).int(), dim=1, stable=True)
    return token_ids.gather(1, order), order


def _conflicts(token_ids: Tensor, inside: Tensor, sign: Tensor, group: Tensor) -> Tensor:
    """bool [B, T]: the contiguous run from column 0 in which the token also stands there in a row of the other sign."""
    out = torch.zeros(inside.shape, dtype=torch.bool)
    for g in group.unique().tolist():
        rows = torch.nonzero((group == g) & (sign != 0))[:, 0]
        if len(rows) < 2:
            continue
        ids, here, signs = token_ids[rows], inside[rows], sign[rows]
        opposite = signs[:, None] != signs[None, :]
        for t in range(ids.shape[1]):
            shared = (ids[:, None, t] == ids[None, :, t]) & opposite & here[None, :, t] & here[:, None, t]
            found = shared.any(1) & (out[rows, t - 1] if t else torch.ones(len(rows), dtype=torch.bool))
            if not found.any():
                break
            out[rows, t] = found
    return out
