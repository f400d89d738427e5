"""Rules of clipping, stability and entropy against loops over plain numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlsys.advantages import AdvantageInputs, Advantages
from rlsys.advantages.adjustments.conflict_tokens import ConflictTokens
from rlsys.advantages.adjustments.difficulty import DifficultyKL
from rlsys.advantages.adjustments.entropy import EntropyBonus, EntropyFilter, EntropyScore
from rlsys.advantages.adjustments.reward_scale import ClipAdvantages
from rlsys.advantages.combiners.running_normalization import RunningNormalization
from rlsys.advantages.gae import GAE
from rlsys.advantages.scores import Scores
from rlsys.advantages.token_level_grpo import TokenLevelGRPO
from rlsys.losses import LossInputs
from rlsys.losses.policy.balanced import BalancedClip
from rlsys.losses.policy.heterogeneous import HeterogeneousClip
from rlsys.losses.regularizers.kl import KL
from rlsys.losses.regularizers.smoothed_entropy import SmoothedEntropy
from rlsys.metrics import reduce
from rlsys.types import Progress


def batch(lengths: list[int], scores: list[float], groups: list[int], **changes: object) -> AdvantageInputs:
    rows, width = len(lengths), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    rewards = torch.zeros(rows, width)
    for row, length in enumerate(lengths):
        if length:
            rewards[row, length - 1] = scores[row]
    base = AdvantageInputs(
        scores=torch.tensor(scores),
        scored=torch.ones(rows, dtype=torch.bool),
        token_rewards=rewards,
        mask=mask,
        group=torch.tensor(groups),
        behavior_logprobs=torch.zeros(rows, width),
        reference_logprobs=None,
        values=None,
        prompt_ids=tuple(f"p/{g}@0" for g in groups),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def loss_inputs(ratios: list[list[float]], advantages: list[list[float]], **changes: object) -> LossInputs:
    log_ratio = torch.tensor(ratios).log()
    old = torch.full(log_ratio.shape, -1.0)
    mask = torch.ones(log_ratio.shape, dtype=torch.bool)
    base = LossInputs(old + log_ratio, old, old, None, None, torch.tensor(advantages), mask)
    return replace(base, **changes)  # type: ignore[arg-type]


# ---- BAPO ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("positive", "expected"),
    [(9.0, (0.8, 1.2)), (0.55, (0.9, 1.2)), (0.2, (0.95, 2.0))],
    ids=["balanced at once", "low is enough", "both to the end"],
)
def test_balanced_clip_searches_low_first_then_high(positive: float, expected: tuple[float, float]) -> None:
    """Ratios 0.5 and 1 for negative tokens of advantage -1, 3 for one positive token."""
    inputs = loss_inputs([[0.5, 1.0, 3.0]], [[-1.0, -1.0, positive]])
    loss = BalancedClip(dual_clip=None)

    def share(low: float, high: float) -> float:
        return min(3.0, high) * positive / (max(0.5, low) + max(1.0, low))

    low, high = 0.8, 1.2
    while low < 0.95 - 1e-9 and share(low, high) < 0.5:
        low += 0.05
    while high < 2.0 - 1e-9 and share(low, high) < 0.5:
        high += 0.05
    extras = loss.prepare(inputs)
    assert float(extras["clip_low"][0, 0]) == pytest.approx(low)
    assert float(extras["clip_high"][0, 0]) == pytest.approx(high)
    if positive != 0.55:
        assert (low, high) == pytest.approx(expected)
    out = loss(replace(inputs, extras=extras)).per_token[0]
    assert out.tolist() == pytest.approx([max(0.5, low), 1.0, -min(3.0, high) * positive], rel=1e-5)


def test_balanced_clip_counts_every_row_of_the_update() -> None:
    """Two halves that are unbalanced in opposite ways are balanced together."""
    loss = BalancedClip(target=0.9)
    whole = loss_inputs([[1.0], [1.0]], [[1.0], [-1.0]])
    assert float(loss.prepare(whole)["clip_low"][0, 0]) == pytest.approx(0.8)
    half = loss_inputs([[1.0]], [[-1.0]])
    assert float(loss.prepare(half)["clip_high"][0, 0]) == pytest.approx(2.0)


# ---- HAPO ---------------------------------------------------------------------------------------------------------


def test_heterogeneous_clip_by_hand() -> None:
    cases = [(r, a, h) for r in (0.7, 0.87, 0.95, 1.05, 1.12, 1.3, 5.0) for a in (-1.0, 2.0) for h in (-0.5, 0.0, 0.5)]
    inputs = loss_inputs([[r for r, _, _ in cases]], [[a for _, a, _ in cases]])
    score = torch.tensor([[h for _, _, h in cases]])
    expected = []
    for r, a, h in cases:
        low, high = (0.2 * (1 - h), 0.2) if h <= 0 else (0.2, 0.2 * (1 + h))
        inside = 1 - low / 2 < r < 1 + high / 2
        if (h > 0 and not inside) or (h <= 0 and inside):
            a = a * (1 + h)
        value = max(-a * r, -a * min(max(r, 1 - low), 1 + high))
        expected.append(min(value, -a * 3.0) if a < 0 else value)
    out = HeterogeneousClip()(replace(inputs, extras={"entropy_score": score})).per_token[0]
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_entropy_score_is_positive_for_uncertain_tokens() -> None:
    entropy = torch.tensor([[0.01, 0.1, 0.5], [1.0, 2.0, 9.0]])
    inputs = batch([3, 2], [1.0, 0.0], [0, 0], entropy=entropy)
    out = EntropyScore(pivot=0.5)(inputs, Advantages(torch.ones(2, 3)))
    x = np.log([0.01, 0.1, 0.5, 1.0, 2.0])
    centred = x - np.quantile(x, 0.5)
    z = centred / math.sqrt((centred**2).mean())
    expected = np.where(z > 0, z / z.max(), z / abs(z.min()))
    np.testing.assert_allclose(out.extras["entropy_score"][inputs.mask], expected, rtol=1e-5)
    assert out.extras["entropy_score"][1, 2] == 0
    assert expected[-1] == 1
    assert expected[0] == -1
    same = EntropyScore()(replace(inputs, entropy=torch.ones(2, 3)), Advantages(torch.ones(2, 3)))
    assert (same.extras["entropy_score"] == 0).all()


def test_token_level_grpo() -> None:
    inputs = batch([3, 1, 2, 1, 1], [1.0, 0.0, 0.5, 2.0, 2.0], [0, 0, 0, 1, 1])
    tokens = np.array([1.0] * 3 + [0.0] + [0.5] * 2)
    expected = (np.array([1.0, 0.0, 0.5]) - tokens.mean()) / (tokens.std() + 1e-6)
    found = TokenLevelGRPO()(inputs).advantages[:, 0]
    np.testing.assert_allclose(found, [*expected, 0, 0], rtol=1e-5)
    zero_sum = (TokenLevelGRPO(eps=0.0)(inputs).advantages * inputs.mask).sum()
    assert abs(float(zero_sum)) < 1e-5


def test_token_level_grpo_falls_back_where_one_response_dominates() -> None:
    inputs = batch([60, 1], [1.0, 0.0], [0, 0])
    found = TokenLevelGRPO()(inputs).advantages[:, 0]
    np.testing.assert_allclose(found, np.array([0.5, -0.5]) / (np.std([1, 0], ddof=1) + 1e-6), rtol=1e-5)


# ---- GTPO ---------------------------------------------------------------------------------------------------------


def conflicts_by_hand(rows: list[list[int]], signs: list[int]) -> np.ndarray:
    """Factors of every token, from the definition: runs from the start and from the end."""
    width = max(map(len, rows))
    factor = np.ones((len(rows), width))
    for i, row in enumerate(rows):
        for direction in (1, -1):
            mine = row[::direction]
            for t, token in enumerate(mine):
                others = [r[::direction] for j, r in enumerate(rows) if signs[j] == -signs[i] and len(r) > t]
                if not any(other[t] == token for other in others):
                    break
                place = t if direction == 1 else len(row) - 1 - t
                factor[i, place] *= 2.0 if signs[i] > 0 else 0.0
    return factor


def test_conflict_tokens_by_hand() -> None:
    rows = [[5, 6, 7, 9], [5, 6, 8, 9], [5, 1, 9], [2, 6, 7, 3, 9]]
    advantages = [1.0, -1.0, 1.0, -2.0]
    lengths = [len(row) for row in rows]
    ids = torch.tensor([row + [0] * (5 - len(row)) for row in rows])
    inputs = batch(lengths, [1.0, 0, 1, 0], [0, 0, 0, 0], token_ids=ids)
    given = torch.tensor(advantages)[:, None] * inputs.mask
    out = ConflictTokens()(inputs, Advantages(given)).advantages
    expected = np.array(advantages)[:, None] * conflicts_by_hand(rows, [1, -1, 1, -1])
    np.testing.assert_allclose(out[inputs.mask], expected[inputs.mask.numpy()])
    alone = ConflictTokens()(replace(inputs, group=torch.arange(4)), Advantages(given)).advantages
    torch.testing.assert_close(alone, given)


def test_entropy_filter_and_its_start_over_a_resume() -> None:
    entropy = torch.tensor([[0.2, 0.4], [0.9, 1.1], [0.5, 9.0]])
    inputs = batch([2, 2, 1], [1.0, 0.0, 1.0], [0, 0, 0], entropy=entropy)
    rule, given = EntropyFilter(), Advantages(torch.ones(3, 2) * inputs.mask)
    out = rule(inputs, given)
    assert rule.start == pytest.approx((0.3 + 1.0 + 0.5) / 3)  # below log 2 = 0.693
    assert out.mask is not None
    assert out.mask.any(1).tolist() == [True, False, True]
    np.testing.assert_allclose(out.advantages[:, 0], [1 - 0.1 * 0.3, 0, 1 - 0.1 * 0.5], rtol=1e-6)
    resumed = EntropyFilter()
    resumed.load_state_dict(rule.state_dict())
    assert resumed.start == rule.start
    wild = EntropyFilter()
    assert wild(replace(inputs, entropy=entropy + 1), given).mask.any(1).all(), "a policy that starts wild is let be"  # type: ignore[union-attr]


def test_gtpo_prices_the_entropy_of_a_token_with_its_conflict_factor() -> None:
    """(A_i - gamma * H_i) * lambda_t, with lambda from the signs of A_i, and filtered responses still in conflict."""
    entropy = torch.tensor([[0.1, 0.1, 0.1], [0.9, 0.9, 0.9], [0.3, 0.3, 0.3]])
    ids = torch.tensor([[5, 6, 7], [5, 8, 9], [5, 6, 1]])
    scores = [0.05, -1.0, 1.0]
    inputs = batch([3, 3, 3], scores, [0, 0, 0], token_ids=ids, entropy=entropy)
    rule = EntropyFilter(gamma=1.0, limit=0.7)
    rule.start = 0.1
    conflicts = ConflictTokens()(inputs, Advantages(torch.tensor(scores)[:, None].expand(3, 3)))
    out = rule(inputs, conflicts)
    expected = [[2 * (0.05 - 0.1), 0.05 - 0.1, 0.05 - 0.1], [0, 0, 0], [2 * 0.7, 0.7, 0.7]]
    np.testing.assert_allclose(out.advantages, expected, rtol=1e-5, atol=1e-7)
    assert out.mask is not None
    assert out.mask.any(1).tolist() == [True, False, True]


# ---- entropy ------------------------------------------------------------------------------------------------------


def test_entropy_bonus_never_turns_a_sign() -> None:
    inputs = batch([2, 2], [1.0, 0.0], [0, 0], entropy=torch.tensor([[0.5, 9.0], [0.5, 9.0]]))
    out = EntropyBonus(alpha=0.4, kappa=2.0)(inputs, Advantages(torch.tensor([[1.0, 1.0], [-1.0, -1.0]])))
    np.testing.assert_allclose(out.advantages, [[1.2, 1.5], [-0.8, -0.5]], rtol=1e-6)


def test_smoothed_entropy_compares_with_the_updates_before() -> None:
    rule = SmoothedEntropy(coefficient=0.5, smooth=2.0, penalty=0.1)
    zeros = [[0.0, 0.0]]
    first = loss_inputs([[1.0, 1.0]], zeros, entropy=torch.tensor([[1.0, 3.0]]))
    out = rule(replace(first, extras=rule.prepare(first)))
    np.testing.assert_allclose(out.per_token, [[-0.5, -1.5]])  # nothing to compare with yet
    second = loss_inputs([[1.0, 1.0]], zeros, entropy=torch.tensor([[2.1, 3.0]]))
    resumed = SmoothedEntropy(coefficient=0.5, smooth=2.0, penalty=0.1)
    resumed.load_state_dict(rule.state_dict())
    out = resumed(replace(second, extras=resumed.prepare(second)))
    np.testing.assert_allclose(out.per_token, [[-0.5 * 2.1, -0.5 * (3.0 - 0.2)]], rtol=1e-6)  # history 2
    assert resumed.total / resumed.tokens == pytest.approx((1 + 3 + 2.1 + 3) / 4)


def test_kl_with_a_schedule() -> None:
    inputs = loss_inputs([[1.0]], [[0.0]], reference_logprobs=torch.tensor([[-2.0]]))
    k2 = 0.5
    for step, coefficient in ((0, 0.1), (5, 0.2), (10, 0.3)):
        out = KL(estimator="k2", coefficient=0.1, final=0.3)(replace(inputs, progress=Progress(step, 10)))
        assert float(out.per_token) == pytest.approx(coefficient * k2)
        assert reduce(out.metrics)["reference/kl_coefficient"] == pytest.approx(coefficient)
    with pytest.raises(ValueError, match="final is for the loss"):
        KL(in_reward=True, final=0.3)


def test_difficulty_kl_halves_the_pull_on_hard_prompts() -> None:
    """Groups with accuracies 1/4 (one more is unscored), 1/2, and a group without any score."""
    scores = [1.0, 0.0, 0.2, 0.0, 0.0, 1.0, 0.4, 0.0]
    inputs = batch([2, 1, 2, 1, 2, 1, 2, 2], scores, [0, 0, 0, 0, 0, 1, 1, 2])
    scored = torch.ones(8, dtype=torch.bool)
    scored[4] = scored[7] = False
    given = Advantages(torch.ones(8, 2), extras={"other": torch.ones(8, 2)})
    out = DifficultyKL()(replace(inputs, scored=scored), given)
    rows = torch.tensor([0.5] * 5 + [1.0] * 3)
    torch.testing.assert_close(out.extras["kl_scale"], rows[:, None] * inputs.mask)
    assert out.extras["other"] is given.extras["other"]
    assert out.advantages is given.advantages
    assert reduce(out.metrics)["clpo/hard"] == pytest.approx(5 / 8)
    loss = loss_inputs([[1.0, 1.0]], [[0.0, 0.0]], reference_logprobs=torch.tensor([[-2.0, -2.0]]))
    scaled = replace(loss, extras={"kl_scale": torch.tensor([[0.5, 1.0]])})
    assert KL(estimator="k2", coefficient=0.1)(scaled).per_token.tolist() == [pytest.approx([0.025, 0.05])]
    assert reduce(KL(estimator="k2")(scaled).metrics)["reference/kl_k2"] == pytest.approx(0.5), "the KL, not the term"


# ---- PPO-max, T-PPO -----------------------------------------------------------------------------------------------


def test_running_normalization_has_the_statistics_of_everything_so_far() -> None:
    rule, seen = RunningNormalization(bound=1.5), []
    for scores in ([1.0, 3.0], [10.0, 2.0, 0.0]):
        seen += scores
        inputs = batch([1] * len(scores), scores, [0] * len(scores))
        out = rule(inputs, lambda s, inputs=inputs: Scores()(replace(inputs, scores=s.float())))  # type: ignore[misc]
        expected = np.clip((np.array(scores) - np.mean(seen)) / (np.std(seen) + 1e-8), -1.5, 1.5)
        np.testing.assert_allclose(out.advantages[:, 0], expected, rtol=1e-5)
        resumed = RunningNormalization(bound=1.5)
        resumed.load_state_dict(rule.state_dict())
        rule = resumed


def test_clip_advantages() -> None:
    inputs = batch([2], [1.0], [0])
    assert ClipAdvantages()(inputs, Advantages(torch.tensor([[2.0, -0.25]]))).advantages.tolist() == [[0.5, -0.25]]


def test_extended_gae() -> None:
    """Row 0 is finished, row 1 was cut: its value goes on after its last token, its score is left out."""
    values = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.6, 0.7]])
    inputs = batch([3, 3], [1.0, -2.0], [0, 1], values=values, finished=torch.tensor([True, False]))
    out = GAE(gamma=0.9, lam=0.8, whiten=False, extended=True, drop_last=1)(inputs)
    expected = np.zeros((2, 3))
    for row, (rewards, after) in enumerate((([0, 0, 1.0], 0.0), ([0, 0, 0.0], 0.7))):
        v = [*values[row].tolist(), after]
        running = 0.0
        for t in (2, 1, 0):
            running = rewards[t] + 0.9 * v[t + 1] - v[t] + 0.9 * 0.8 * running
            expected[row, t] = running
    expected[1, 2] = 0.0  # dropped
    np.testing.assert_allclose(out.advantages, expected, rtol=1e-5)
    assert out.mask is not None
    assert out.mask.tolist() == [[True, True, True], [True, True, False]]
    np.testing.assert_allclose(out.returns, [[0.81, 0.9, 1.0], values[1].tolist()], rtol=1e-6)
