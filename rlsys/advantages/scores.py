"""The scores as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.advantages.groups import to_tokens


@dataclass
class Scores(Estimator):
    """No baseline: for losses that compare responses themselves, and for plain REINFORCE::

        A_i = r_i

    Williams 1992, with a baseline of 0.
    """

    name = "scores"
    paper = "Williams 1992, Simple statistical gradient-following algorithms, doi:10.1007/BF00992696"

    def __call__(self, inputs: AdvantageInputs) -> Advantages:
        return Advantages(to_tokens(torch.where(inputs.scored, inputs.scores, 0), inputs.mask))
