"""Losses with demonstrations, their gates and their way through collation, by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.advantages import AdvantageInputs, Advantages
from rlsys.advantages.adjustments.demonstration_gates import DemonstrationIfUnsolved, SolveRateSwitch
from rlsys.errors import LearnerError
from rlsys.losses import LossInputs
from rlsys.losses.policy.demonstrations import Chord, Hybrid, PolicyShaping, SupervisedFineTuning
from rlsys.types import Progress

NEW = [[-0.5, -1.0], [-2.0, -0.1]]
OLD = [[-0.9, -1.1], [0.0, 0.0]]  # the second row is a demonstration
ADVANTAGES = [[1.0, -2.0], [0.5, 0.5]]


def inputs_at(step: int = 0) -> LossInputs:
    new, old = torch.tensor(NEW, requires_grad=True), torch.tensor(OLD)
    mask = torch.ones(2, 2, dtype=torch.bool)
    expert = torch.tensor([False, True])
    return LossInputs(
        new, old, old, None, None, torch.tensor(ADVANTAGES), mask, expert=expert, progress=Progress(step, 1000)
    )


def clipped(new: float, old: float, a: float) -> float:
    ratio = math.exp(new - old)
    return max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.0), (5, 0.25), (10, 0.5), (15, 0.26), (20, 0.02), (500, 0.02)], ids=str
)
def test_chords_schedule(step: int, expected: float) -> None:
    """Warm-up of 10, decay of 10; half-way down a cosine is half-way down."""
    assert Chord(peak=0.5, valley=0.02, warmup=10, decay=10).mu(step) == pytest.approx(expected)


@pytest.mark.parametrize("weight", ["none", "phi"])
def test_chord(weight: Any) -> None:
    out = Chord(weight=weight, peak=0.6, valley=0.2, decay=100)(inputs_at(50)).per_token
    mu = 0.4
    own = [(1 - mu) * clipped(n, o, a) for n, o, a in zip(NEW[0], OLD[0], ADVANTAGES[0], strict=True)]
    expert = [-mu * n * (math.exp(n) * (1 - math.exp(n)) if weight == "phi" else 1) for n in NEW[1]]
    np.testing.assert_allclose(out.detach(), [own, expert], rtol=1e-5)


def test_phi_has_no_gradient() -> None:
    inputs = inputs_at()
    (slope,) = torch.autograd.grad(Chord(weight="phi", peak=1.0)(inputs).per_token.sum(), inputs.logprobs)
    np.testing.assert_allclose(slope[1], [-math.exp(n) * (1 - math.exp(n)) for n in NEW[1]], rtol=1e-5)


def test_supervised_learns_from_demonstrations_only() -> None:
    out = SupervisedFineTuning()(inputs_at()).per_token
    np.testing.assert_allclose(out.detach(), [[0, 0], [2.0, 0.1]], rtol=1e-6)
    with pytest.raises(LearnerError, match="does not say which rows are demonstrations"):
        SupervisedFineTuning()(replace(inputs_at(), expert=None))


def test_one_token_rollout_is_the_expected_policy_gradient() -> None:
    """Enumerated over the vocabulary: reward 1 for the demonstrated token, beta for every other, at temperature 1."""
    logits, truth, beta = torch.tensor([0.3, -0.2, 1.1], requires_grad=True), 2, -0.1
    policy = logits.log_softmax(0)
    rewards = torch.tensor([beta, beta, 1.0])
    expected = -(policy.detach().exp() * rewards * policy).sum()
    one = policy[truth].reshape(1, 1)
    mask, expert, zero = torch.ones(1, 1, dtype=torch.bool), torch.tensor([True]), torch.zeros(1, 1)
    found = SupervisedFineTuning(weight="one-token", beta=beta)(
        LossInputs(one, zero, zero, None, None, zero, mask, expert=expert)
    ).per_token.sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)))


def test_hybrid() -> None:
    out = Hybrid(coefficient=0.3)(inputs_at()).per_token
    own = [-a * math.exp(n - o) for n, o, a in zip(NEW[0], OLD[0], ADVANTAGES[0], strict=True)]
    np.testing.assert_allclose(out.detach(), [own, [0.6, 0.03]], rtol=1e-5)


@pytest.mark.parametrize("clip", [True, False])
def test_policy_shaping(clip: bool) -> None:
    inputs = inputs_at()
    out = PolicyShaping(clip=clip, gamma=0.2)(inputs).per_token
    rows = zip(NEW[0], OLD[0], ADVANTAGES[0], strict=True)
    own = [clipped(n, o, a) if clip else -a * math.exp(n - o) for n, o, a in rows]
    expert = [-0.5 * math.exp(n) / (math.exp(n) + 0.2) for n in NEW[1]]
    np.testing.assert_allclose(out.detach(), [own, expert], rtol=1e-5)
    (slope,) = torch.autograd.grad(out.sum(), inputs.logprobs)
    p = np.exp(NEW[1])
    np.testing.assert_allclose(
        slope[1], -0.5 * 0.2 * p / (p + 0.2) ** 2, rtol=1e-5
    )  # d f / d log p = gamma p / (p + gamma)^2


def groups() -> AdvantageInputs:
    """Three prompts, each with two rollouts and a demonstration: none right, one right, one right and one unscored."""
    scores = torch.tensor([0.0, 0.2, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    expert = torch.tensor([False, False, True] * 3)
    scored = ~expert
    scored[7] = False
    mask = torch.ones(9, 1, dtype=torch.bool)
    mask[7] = False
    ones = torch.ones(9, 1)
    return AdvantageInputs(
        scores, scored, ones, mask, torch.arange(9) // 3, ones, None, None, ("p",) * 9, expert=expert
    )


def kept(out: Advantages) -> list[bool]:
    assert out.mask is not None
    return [bool(row) for row in out.mask[:, 0]]


def test_solve_rate_switch() -> None:
    out = SolveRateSwitch(gate=0.0)(groups(), Advantages(torch.ones(9, 1)))
    assert kept(out) == [False, False, True, True, True, False, True, False, False]
    out = SolveRateSwitch(gate=0.5)(groups(), Advantages(torch.ones(9, 1)))
    assert kept(out) == [False, False, True, False, False, True, True, False, False]


def test_demonstrations_only_where_nothing_was_solved() -> None:
    out = DemonstrationIfUnsolved()(groups(), Advantages(torch.ones(9, 1)))
    assert kept(out) == [True, True, True, True, True, False, True, False, False]
