"""Each rule against loops over plain numbers, and the identities between them."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.advantages import AdvantageInputs
from rlsys.advantages.gae import GAE
from rlsys.advantages.grpo import GRPO
from rlsys.advantages.reinforce import Reinforce
from rlsys.advantages.rloo import RLOO

SCORES = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=8)
GROUPS = st.lists(SCORES, min_size=1, max_size=4)


def sequences(groups: list[list[float]], tokens: int = 2) -> AdvantageInputs:
    """One row per score, NaN for unscored, every token trained on."""
    flat = torch.tensor([score for scores in groups for score in scores])
    scored = ~flat.isnan()
    mask = scored[:, None].expand(-1, tokens).clone()
    token_rewards = torch.zeros(mask.shape)
    token_rewards[:, -1] = flat.nan_to_num(0.0)
    return AdvantageInputs(
        scores=flat.nan_to_num(0.0),
        scored=scored,
        token_rewards=token_rewards,
        mask=mask,
        group=torch.tensor([g for g, scores in enumerate(groups) for _ in scores]),
        behavior_logprobs=torch.zeros(mask.shape),
        reference_logprobs=None,
        values=None,
        prompt_ids=tuple(str(g) for g, scores in enumerate(groups) for _ in scores),
    )


def by_group(groups: list[list[float]], rule) -> np.ndarray:  # type: ignore[no-untyped-def]
    """`rule(score, scored scores of its group)` for every row; 0 for unscored."""
    out = []
    for scores in groups:
        known = [s for s in scores if not math.isnan(s)]
        out += [0.0 if math.isnan(s) else rule(s, known) for s in scores]
    return np.array(out)


def grpo_rule(score: float, known: list[float]) -> float:
    if len(known) == 1:
        return score
    deviation = statistics.stdev(known)
    return (score - statistics.fmean(known)) / (deviation + 1e-6)


def dr_grpo_rule(score: float, known: list[float]) -> float:
    return score if len(known) == 1 else score - statistics.fmean(known)


def rloo_rule(score: float, known: list[float]) -> float:
    others = list(known)
    others.remove(score)
    return score - (statistics.fmean(others) if others else 0.0)


@pytest.mark.parametrize(
    ("estimator", "rule"), [(GRPO(), grpo_rule), (GRPO(std=False), dr_grpo_rule), (RLOO(), rloo_rule)]
)
@settings(max_examples=60, deadline=None)
@given(groups=GROUPS, unscored=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 7))))
def test_group_rules(estimator, rule, groups, unscored) -> None:  # type: ignore[no-untyped-def]
    groups = [
        [math.nan if (g, i) in unscored else score for i, score in enumerate(scores)] for g, scores in enumerate(groups)
    ]
    out = estimator(sequences(groups)).advantages.numpy()
    expected = by_group(groups, rule)
    np.testing.assert_allclose(out, np.stack([expected, expected], 1), rtol=1e-5, atol=1e-5)


def test_grpo_by_hand() -> None:
    """Scores 1, 0, 0, 0: mean 1/4, unbiased variance 1/4, so 3/4 / (1/2 + eps) and -1/4 / (1/2 + eps)."""
    out = GRPO(eps=0.5)(sequences([[1.0, 0.0, 0.0, 0.0]])).advantages[:, 0]
    torch.testing.assert_close(out, torch.tensor([0.75, -0.25, -0.25, -0.25]))


def test_rloo_by_hand() -> None:
    out = RLOO()(sequences([[3.0, 0.0, 6.0], [4.0]])).advantages[:, 0]
    torch.testing.assert_close(out, torch.tensor([0.0, -4.5, 4.5, 4.0]))


def test_equal_scores_without_eps_are_no_advantage() -> None:
    out = GRPO(eps=0.0)(sequences([[0.3, 0.3, 0.3], [1.0, 1.0]])).advantages
    assert (out == 0).all()


def test_an_unscored_rollout_changes_nothing_for_the_others() -> None:
    for estimator in (GRPO(), GRPO(std=False), RLOO()):
        with_one = estimator(sequences([[1.0, math.nan, 0.0, 2.0]])).advantages[:, 0]
        without = estimator(sequences([[1.0, 0.0, 2.0]])).advantages[:, 0]
        torch.testing.assert_close(with_one[[0, 2, 3]], without)
        assert with_one[1] == 0


def test_a_group_of_one_scored_rollout_has_its_score() -> None:
    for estimator in (GRPO(), GRPO(std=False), RLOO()):
        assert estimator(sequences([[math.nan, 2.0, math.nan]])).advantages[1].tolist() == [2.0, 2.0]


@settings(max_examples=60, deadline=None)
@given(scores=st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=8))
def test_rloo_is_the_centred_score_scaled(scores: list[float]) -> None:
    k = len(scores)
    centred = GRPO(std=False)(sequences([scores])).advantages
    torch.testing.assert_close(RLOO()(sequences([scores])).advantages, centred * k / (k - 1), rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.integers(-5, 5), min_size=2, max_size=8).filter(lambda s: len(set(s)) > 1),
    shift=st.integers(-8, 8),
    scale=st.sampled_from([0.5, 2.0, 4.0]),
)
def test_grpo_does_not_see_shift_and_scale(scores: list[int], shift: int, scale: float) -> None:
    plain = GRPO()(sequences([[float(s) for s in scores]])).advantages
    moved = GRPO()(sequences([[scale * s + shift for s in scores]])).advantages
    torch.testing.assert_close(moved, plain, rtol=1e-4, atol=1e-5)


# ---- REINFORCE ----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(steps=st.lists(SCORES, min_size=1, max_size=5), momentum=st.sampled_from([None, 0.0, 0.5, 0.9]))
def test_running_baseline(steps: list[list[float]], momentum: float | None) -> None:
    estimator = Reinforce(momentum=momentum)
    baseline: float | None = None
    seen: list[float] = []
    for scores in steps:
        used = statistics.fmean(scores) if baseline is None else baseline
        out = estimator(sequences([scores])).advantages[:, 0].numpy()
        np.testing.assert_allclose(out, np.array(scores) - used, rtol=1e-5, atol=1e-5)
        seen += scores
        if momentum is None:
            baseline = statistics.fmean(seen)
        else:
            baseline = momentum * used + (1 - momentum) * statistics.fmean(scores)


def test_running_baseline_ignores_unscored_rollouts_and_empty_steps() -> None:
    estimator = Reinforce()
    estimator(sequences([[1.0, math.nan, 3.0]]))
    estimator(sequences([[math.nan]]))
    assert estimator.state_dict() == {"baseline": 2.0, "seen": 2}
    assert estimator(sequences([[5.0, math.nan]])).advantages[:, 0].tolist() == [3.0, 0.0]


# ---- GAE ----------------------------------------------------------------------------------------------------------


def gae_by_loops(rewards, values, mask, gamma, lam):  # type: ignore[no-untyped-def]
    """The definition, as a sum over later trained tokens: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    advantages, returns = np.zeros(rewards.shape), np.zeros(rewards.shape)
    for b in range(len(rewards)):
        steps = [t for t in range(rewards.shape[1]) if mask[b, t]]
        deltas = []
        for k, t in enumerate(steps):
            following = values[b, steps[k + 1]] if k + 1 < len(steps) else 0.0
            deltas.append(rewards[b, t] + gamma * following - values[b, t])
        for k, t in enumerate(steps):
            advantages[b, t] = sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[k:]))
            returns[b, t] = advantages[b, t] + values[b, t]
    return advantages, returns


def tokens(rewards: np.ndarray, values: np.ndarray, mask: np.ndarray) -> AdvantageInputs:
    rows = len(rewards)
    return AdvantageInputs(
        scores=torch.tensor(rewards.sum(1)).float(),
        scored=torch.ones(rows, dtype=torch.bool),
        token_rewards=torch.tensor(rewards).float(),
        mask=torch.tensor(mask),
        group=torch.arange(rows),
        behavior_logprobs=torch.zeros(mask.shape),
        reference_logprobs=None,
        values=torch.tensor(values).float(),
        prompt_ids=tuple(map(str, range(rows))),
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    rows=st.integers(1, 4),
    width=st.integers(1, 7),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_gae(seed: int, rows: int, width: int, gamma: float, lam: float) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, width)) > 0.3
    rewards, values = rng.normal(size=(2, rows, width)) * mask
    expected, returns = gae_by_loops(rewards, values, mask, gamma, lam)
    inputs = tokens(rewards, values, mask)
    plain = GAE(gamma, lam, whiten=False)(inputs)
    np.testing.assert_allclose(plain.advantages, expected, rtol=1e-4, atol=1e-5)
    assert plain.returns is not None
    np.testing.assert_allclose(plain.returns, returns, rtol=1e-4, atol=1e-5)
    whitened = GAE(gamma, lam)(inputs)
    assert whitened.returns is not None
    np.testing.assert_allclose(whitened.returns, returns, rtol=1e-4, atol=1e-5)
    if mask.sum() > 1:
        chosen = expected[mask]
        scaled = np.where(mask, (expected - chosen.mean()) / np.sqrt(chosen.var(ddof=1) + 1e-8), 0)
        np.testing.assert_allclose(whitened.advantages, scaled, rtol=1e-3, atol=1e-4)


def test_gae_steps_over_tool_tokens() -> None:
    """A tool's tokens in the middle, with whatever values: as if they were not there."""
    values = np.array([[0.5, 9.0, -7.0, 0.25]])
    rewards = np.array([[0.0, 0.0, 0.0, 1.0]])
    mask = np.array([[True, False, False, True]])
    out = GAE(gamma=0.5, lam=0.5, whiten=False)(tokens(rewards, values, mask))
    # delta_3 = 1 - 0.25 = 0.75; delta_0 = 0.5 * 0.25 - 0.5 = -0.375; A_0 = -0.375 + 0.25 * 0.75
    torch.testing.assert_close(out.advantages, torch.tensor([[-0.1875, 0.0, 0.0, 0.75]]))
    assert out.returns is not None
    torch.testing.assert_close(out.returns, torch.tensor([[0.3125, 0.0, 0.0, 1.0]]))


def test_gae_with_one_token_is_not_whitened() -> None:
    out = GAE()(tokens(np.array([[2.0]]), np.array([[0.5]]), np.array([[True]])))
    assert out.advantages.tolist() == [[1.5]]


def test_gae_at_lambda_one_is_the_score_minus_the_value() -> None:
    rng = np.random.default_rng(0)
    values, mask = rng.normal(size=(3, 5)), np.ones((3, 5), dtype=bool)
    rewards = np.zeros((3, 5))
    rewards[:, -1] = [1.0, 0.0, 2.0]
    out = GAE(gamma=1.0, lam=1.0, whiten=False)(tokens(rewards, values, mask))
    np.testing.assert_allclose(out.advantages, rewards.sum(1, keepdims=True) - values, atol=1e-5)
