"""Combiners of rewards, and the choice of rows and tokens, against loops over plain numbers."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.advantages import AdvantageInputs, Advantages
from rlsys.advantages.adjustments.downsampling import DualDownsampling, PolicyFilter, largest_variance
from rlsys.advantages.combiners.constrained import Constrained
from rlsys.advantages.combiners.dynamic_weights import GradientWeight, HypervolumeWeight, hypervolume
from rlsys.advantages.combiners.ensemble import Ensemble
from rlsys.advantages.combiners.shaped import ConfidenceCalibration, ConstraintMask, VerifierShaped
from rlsys.advantages.groups import to_tokens
from rlsys.errors import LearnerError
from rlsys.types import Progress

NAN = float("nan")


def inputs_of(components: list[list[float]], names: tuple[str, ...], **changes: Any) -> AdvantageInputs:
    values = torch.tensor(components)
    rows = len(values)
    scores = values.nan_to_num(0.0).sum(1)
    base = AdvantageInputs(
        scores=scores,
        scored=torch.ones(rows, dtype=torch.bool),
        token_rewards=torch.zeros(rows, 2),
        mask=torch.ones(rows, 2, dtype=torch.bool),
        group=torch.zeros(rows, dtype=torch.long),
        behavior_logprobs=torch.full((rows, 2), -1.0),
        reference_logprobs=torch.full((rows, 2), -1.5),
        values=None,
        prompt_ids=("p",) * rows,
        components=values,
        component_names=names,
    )
    return replace(base, **changes)


class Scores:
    """Stands for the estimator: the scores are the advantages, the penalty of row i is -i."""

    def __init__(self, inputs: AdvantageInputs) -> None:
        self.mask = inputs.mask
        self.penalty = -torch.arange(len(inputs.scores)).float()

    def __call__(self, scores: torch.Tensor, *, penalties: bool = True) -> Advantages:
        return Advantages(to_tokens(scores.float() + self.penalty * penalties, self.mask))


def combined(combiner: Any, inputs: AdvantageInputs) -> list[float]:
    """What was made of the rewards, penalties taken off again."""
    estimate = Scores(inputs)
    return (combiner(inputs, estimate).advantages[:, 0] - estimate.penalty).tolist()


VALUES = [[1.0, 3.0, 2.0], [0.0, 4.0, NAN]]


@pytest.mark.parametrize("method", ["mean", "worst", "uncertainty"])
def test_ensembles(method: Any) -> None:
    inputs = inputs_of(VALUES, ("a", "b", "c"))
    rule = Ensemble(method=method, penalty=0.5, mean={"b": 1.0}, std={"b": 2.0})
    expected = []
    for a, b, c in VALUES:
        members = [a, (b - 1) / 2, 0.0 if math.isnan(c) else c]
        value = {
            "mean": np.mean(members),
            "worst": min(members),
            "uncertainty": np.mean(members) - 0.5 * np.var(members),
        }
        expected.append(value[method])
    assert combined(rule, inputs) == pytest.approx(expected, rel=1e-5)


def test_members_can_be_named_and_must_be_there() -> None:
    inputs = inputs_of(VALUES, ("a", "b", "c"))
    assert combined(Ensemble(components=("a",)), inputs) == pytest.approx([1.0, 0.0])
    with pytest.raises(LearnerError, match="no reward component 'd' came with the batch; there are a, b, c"):
        Ensemble(components=("d",))(inputs, Scores(inputs))


def unit(x: list[float]) -> np.ndarray:
    array = np.array(x)
    return (array - array.mean()) / array.std() if array.std() > 0 else array * 0


@pytest.mark.parametrize("kind", ["inequality", "equality"])
def test_constrained_by_hand_over_a_resume(kind: Any) -> None:
    a, b = [1.0, 0.0, 0.5], [0.2, 0.9, 0.1]
    inputs = inputs_of([list(row) for row in zip(a, b, strict=True)], ("a", "b"))
    rule = Constrained(thresholds={"a": 0.9, "b": 0.1}, kind=kind, rate=0.5, momentum=0.3)
    x, velocity = {"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}
    for _ in range(3):
        squash = {k: 1 / (1 + math.exp(-v)) if kind == "inequality" else math.tanh(v) for k, v in x.items()}
        found = rule(inputs, Scores(inputs)).advantages[:, 0]
        expected = (2 - sum(squash.values())) * unit([0, -1, -2]) + squash["a"] * unit(a) + squash["b"] * unit(b)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        for k, values, threshold in (("a", a, 0.9), ("b", b, 0.1)):
            slope = squash[k] * (1 - squash[k]) if kind == "inequality" else 1 - squash[k] ** 2
            velocity[k] = 0.3 * velocity[k] + slope * (np.mean(values) - threshold)
            x[k] -= 0.5 * velocity[k]
        resumed = Constrained(thresholds={"a": 0.9, "b": 0.1}, kind=kind, rate=0.5, momentum=0.3)
        resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
        rule = resumed
    assert x["a"] > 0 > x["b"], "a is below its threshold and gains weight, b is above and loses it"


def test_hypervolume_against_a_fine_grid() -> None:
    points, reference = [[3.0, 1.0, 2.0], [1.0, 3.0, 1.0], [2.0, 2.0, 3.0], [0.5, 0.5, 0.5]], [0.0, 0.0, 0.0]
    cells = [i + 0.5 for i in range(6)]  # of half a unit
    covered = sum(
        any(all(x / 2 < p for x, p in zip(cell, point, strict=True)) for point in points)
        for cell in itertools.product(cells, repeat=3)
    )
    assert hypervolume(points, reference) == pytest.approx(covered / 8)
    assert hypervolume([], reference) == 0
    assert hypervolume([[-1.0, 5.0]], [0.0, 0.0]) == 0


def test_hypervolume_weight() -> None:
    rule, weights = HypervolumeWeight(scale=0.5), []
    for point in ([0.2, 0.2], [0.6, 0.4], [0.5, 0.3], [0.4, 0.9]):
        inputs = inputs_of([point, point], ("a", "b"))
        total = sum(point)
        weights.append(combined(rule, inputs)[0] / total)
        resumed = HypervolumeWeight(scale=0.5)
        resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
        rule = resumed
    gains = [0.4 * 0.2, 0.0, 0.2 * 0.7 - 0.2 * 0.2]
    assert weights == pytest.approx([1.0, *(0.5 + 1.5 * math.tanh(g / 0.5) for g in gains)], rel=1e-5)
    assert len(rule.front) == 2


def test_gradient_weight() -> None:
    a, b = [1.0, -1.0], [2.0, 0.5]
    inputs = inputs_of([list(row) for row in zip(a, b, strict=True)], ("a", "b"))
    rule = GradientWeight(rate=0.5, regularization=2.0, start={"a": 3.0})
    found = combined(rule, inputs)
    aa, ab, bb = np.mean(np.multiply(a, a)), np.mean(np.multiply(a, b)), np.mean(np.multiply(b, b))
    logits = np.array([math.log(0.75) + 0.25 * (aa + ab), math.log(0.25) + 0.25 * (ab + bb)])
    w = np.exp(logits) / np.exp(logits).sum()
    assert found == pytest.approx((w[0] * np.array(a) + w[1] * np.array(b)).tolist(), rel=1e-5)
    assert sum(rule.weights.values()) == pytest.approx(1)


def test_constraint_mask() -> None:
    values = [[2.0, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]]
    inputs = inputs_of(values, ("reward", "base", "safe", "honest"))
    rule = ConstraintMask(baseline="base", constraints=("safe", "honest"), kl_max=4.0)
    near = 1 - 1.0 / 4  # two tokens, each 0.5 above the reference
    expected = [near / (1 + math.exp(-1)), 0.0, near / (1 + math.exp(1))]
    assert combined(rule, inputs) == pytest.approx(expected, rel=1e-5)
    far = replace(inputs, reference_logprobs=torch.full((3, 2), -9.0))
    assert combined(rule, far) == pytest.approx([0.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("adjustment", ["threshold", "difference"])
def test_confidence_calibration_over_a_resume(adjustment: Any) -> None:
    texts = ("x Confidence: 9", "confidence 1 Confidence: 2.5", "none", "Confidence: 99")
    rule, average = ConfidenceCalibration(adjustment=adjustment), None
    for scores in ([1.0, 2.0, -3.0, 40.0], [0.0, 1.0, 2.0, 3.0]):
        inputs = inputs_of([[s] for s in scores], ("r",), texts=texts)
        bounded = [min(10.0, max(-10.0, s)) for s in scores]
        mean = float(np.mean(bounded))
        average = mean if average is None else 0.1 * mean + 0.9 * average
        expected = []
        for r, s in zip(bounded, (9, 2.5, 5, 10), strict=True):
            c = s / 10 - 0.5
            if adjustment == "difference":
                expected.append(r + 0.5 * (r - average) * c)
            else:
                expected.append(r + 0.5 * abs(r) * c if r >= average else r - 0.5 * abs(r) * c)
        assert combined(rule, inputs) == pytest.approx(expected, rel=1e-5)
        resumed = ConfidenceCalibration(adjustment=adjustment)
        resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
        rule = resumed


def test_verifier_shaped_ranks_right_above_wrong() -> None:
    inputs = inputs_of([[9.0, 0.0], [-9.0, 1.0]], ("model", "verifier"))
    wrong, right = combined(VerifierShaped(), inputs)
    assert (wrong, right) == pytest.approx((1 / (1 + math.exp(-4.5)) - 1, 1 / (1 + math.exp(4.5))), rel=1e-4)
    assert right > 0 > wrong


# ---- rows and tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_largest_variance_against_all_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(-3, 4, 8).astype(float) if seed % 2 else rng.standard_normal(8)
    for size in (1, 3, 5, 8):
        best = max(np.var(list(subset)) for subset in itertools.combinations(values, size))
        chosen = largest_variance(torch.tensor(values), size).tolist()
        assert len(set(chosen)) == size
        assert np.var(values[chosen]) == pytest.approx(best)


def test_dual_downsampling_follows_its_schedule() -> None:
    advantages = torch.tensor([[2.0, 2.0], [-2.0, -2.0], [0.1, 0.1], [0.0, 0.0]])
    entropy = torch.tensor([[1.0, 0.5], [0.1, 0.2], [9.0, 9.0], [9.0, 9.0]])
    base = inputs_of([[1.0]] * 4, ("r",), entropy=entropy)
    rule = DualDownsampling(rows=(0.5, 1.0), tokens=(0.5, 1.0))
    first = rule(replace(base, progress=Progress(0, 10)), Advantages(advantages)).mask
    assert first is not None
    assert first.tolist() == [[True, True], [False, False], [False, False], [False, False]]
    middle = rule(replace(base, progress=Progress(5, 10)), Advantages(advantages)).mask
    assert middle is not None
    assert middle.sum() == round(0.75 * 6)  # three of four rows, three quarters of their tokens
    last = rule(replace(base, progress=Progress(10, 10)), Advantages(advantages)).mask
    assert last is not None
    assert last.all()


@pytest.mark.parametrize(
    ("strategy", "certain"), [("best", {1, 4}), ("best-worst", {1, 2, 4, 5}), ("best-random", {1, 4})]
)
def test_policy_filter(strategy: Any, certain: set[int]) -> None:
    scores = [0.5, 0.9, 0.1, 0.3, 2.0, 1.0]
    inputs = inputs_of([[s] for s in scores], ("r",), group=torch.tensor([0, 0, 0, 0, 1, 1]))
    rule, seen = PolicyFilter(strategy=strategy), set()
    for _ in range(12):
        out = rule(inputs, Advantages(torch.ones(6, 2)))
        assert out.mask is not None
        kept = set(torch.nonzero(out.mask[:, 0])[:, 0].tolist())
        assert certain <= kept
        assert len(kept) == (2 if strategy == "best" else 4)
        seen.add(tuple(sorted(kept)))
    assert len(seen) == (3 if strategy == "best-random" else 1)


def test_policy_filter_by_power_draws_high_scores_more_often_and_resumes() -> None:
    inputs = inputs_of([[0.0], [1.0], [2.0]], ("r",))
    rule, total = PolicyFilter(strategy="power"), torch.zeros(3)
    for _ in range(300):
        total += rule(inputs, Advantages(torch.ones(3, 2))).advantages[:, 0]
    np.testing.assert_allclose(total / 900, [0.0, 0.2, 0.8], atol=0.05)  # squares 1 and 4
    again = PolicyFilter(strategy="power")
    again.load_state_dict(rule.state_dict())
    one, two = (r(inputs, Advantages(torch.ones(3, 2))).advantages for r in (rule, again))
    torch.testing.assert_close(one, two)
