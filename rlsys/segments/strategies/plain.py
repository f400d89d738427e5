"""Samples of the prompt, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass

from rlsys.segments import Strategy


@dataclass
class Plain(Strategy):
    """Independent responses::

        y_i ~ pi(. | x),   i = 1 .. rollout.samples_per_prompt

    each scored as a whole.
    """

    name = "plain"
    paper = "Williams 1992, Simple Statistical Gradient-Following Algorithms, Machine Learning 8"
