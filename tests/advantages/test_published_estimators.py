"""Published estimators, combiners and adjustments against loops over plain numbers written from the formulas."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.advantages import AdvantageInputs, Advantages
from rlsys.advantages.adjustments.data_shaping import DropNegatives, ExponentialWeight
from rlsys.advantages.adjustments.exploration import ExploredSuccesses
from rlsys.advantages.adjustments.prompt_value import PromptValueTarget
from rlsys.advantages.adjustments.scaling import ComponentScale, SemanticEntropyScale
from rlsys.advantages.adjustments.whiten import Whiten
from rlsys.advantages.answers import NUMBER, final_answers
from rlsys.advantages.beta_normalized import BetaNormalized, beta_density
from rlsys.advantages.combiners.per_component import PerComponent
from rlsys.advantages.consistency_blend import ConsistencyBlend
from rlsys.advantages.greedy_baseline import GreedyBaseline
from rlsys.advantages.groups import to_tokens
from rlsys.advantages.grpo import GRPO
from rlsys.advantages.mixed_var_bundles import MixedVaRBundles
from rlsys.advantages.optimal_value import OptimalValue
from rlsys.advantages.return_to_go import ReturnToGo
from rlsys.advantages.solve_rate import SolveRate
from rlsys.advantages.stratified import Stratified
from rlsys.advantages.tracked_baseline import TrackedBaseline
from rlsys.errors import LearnerError
from rlsys.losses.regularizers.overlong import Overlong
from rlsys.metrics import reduce
from rlsys.types import RolloutBatch

NAN = float("nan")


def inputs_of(groups: list[list[float]], lengths: list[int] | None = None, **changes: Any) -> AdvantageInputs:
    """One row per score; NaN is an unscored row. The score is on the last token, and -0.1 on every token before it."""
    scores = torch.tensor([score for group in groups for score in group])
    rows = len(scores)
    lengths = lengths or [2] * rows
    width = max(lengths)
    scored = ~scores.isnan()
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]) & scored[:, None]
    scores = scores.nan_to_num(0.0)
    token_rewards = -0.1 * mask.float()
    for row, length in enumerate(lengths):
        if scored[row]:
            token_rewards[row, length - 1] = scores[row]
    names = tuple(f"task/{g}@0" for g, group in enumerate(groups) for _ in group)
    base = AdvantageInputs(
        scores=scores,
        scored=scored,
        token_rewards=token_rewards,
        mask=mask,
        group=torch.tensor([g for g, group in enumerate(groups) for _ in group]),
        behavior_logprobs=-torch.rand(rows, width, generator=torch.Generator().manual_seed(0)) * mask,
        reference_logprobs=None,
        values=None,
        prompt_ids=names,
    )
    return replace(base, **changes)


def first_tokens(out: Advantages) -> list[float]:
    return [float(x) for x in out.advantages[:, 0]]


def test_return_to_go() -> None:
    found = ReturnToGo(gamma=0.5)(inputs_of([[1.0, NAN], [4.0]], [3, 2, 1])).advantages.tolist()
    expected = [[-0.1 + 0.5 * (-0.1 + 0.5 * 1), -0.1 + 0.5 * 1, 1], [0, 0, 0], [4, 0, 0]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_return_to_go_does_not_discount_over_a_tools_output() -> None:
    inputs = inputs_of([[1.0]], [3])
    holed = replace(inputs, mask=torch.tensor([[True, False, True]]), token_rewards=torch.tensor([[0.0, 0.0, 1.0]]))
    assert ReturnToGo(gamma=0.5)(holed).advantages.tolist() == [[0.5, 0.0, 1.0]]


def test_greedy_baseline() -> None:
    """Three prompts: the last row of each is greedy; that of the third was not scored."""
    inputs = inputs_of([[1.0, 0.0, 0.25], [9.0, 2.0], [1.0, NAN]], [2, 1, 2, 2, 2, 2, 2])
    greedy = torch.tensor([False, False, True, False, True, False, True])
    shown = replace(
        inputs, greedy=greedy & inputs.scored, scored=inputs.scored & ~greedy, mask=inputs.mask & ~greedy[:, None]
    )
    out = GreedyBaseline(gamma=0.5, clip=5.0)(shown)
    expected = np.zeros((7, 2))
    expected[0] = [-0.1 + 0.5 * 1 - 0.25, 1 - 0.25]
    expected[1, 0] = 0 - 0.25
    expected[3] = [-0.1 + 0.5 * 5 - 2, 5 - 2]  # 9 is clipped to 5
    np.testing.assert_allclose(out.advantages, expected, rtol=1e-5, atol=1e-6)
    assert out.mask is not None
    assert not out.mask[5].any(), "no baseline, no training"


def test_beta_normalized_by_hand() -> None:
    groups = [[1.0, 0, 0, 0], [1.0, 1, 0, 0], [1.0, 1, 1, 0], [1.0, 1, NAN, 0]]
    rates = np.array([0.25, 0.5, 0.75, 2 / 3])
    m, v = rates.mean(), rates.var(ddof=1)
    a, b = (m * (1 - m) / v - 1) * m, (m * (1 - m) / v - 1) * (1 - m)
    alpha, beta = max(1, 1 + a / 3), max(1, 1 + b / 3)
    area = sum(((i + 0.5) / 20000) ** (alpha - 1) * (1 - (i + 0.5) / 20000) ** (beta - 1) for i in range(20000)) / 20000
    expected = []
    for group, p in zip(groups, rates, strict=True):
        density = p ** (alpha - 1) * (1 - p) ** (beta - 1) / area
        expected += [0.0 if math.isnan(r) else (r - p) / density for r in group]
    np.testing.assert_allclose(first_tokens(BetaNormalized()(inputs_of(groups))), expected, rtol=1e-4)


def test_a_beta_density_of_three_halves_is_grpo_but_for_a_constant() -> None:
    p = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    ratio = beta_density(p, 1.5, 1.5) / (p * (1 - p)).sqrt()
    torch.testing.assert_close(ratio, ratio[:1].expand(4))
    torch.testing.assert_close(beta_density(p, 1.0, 1.0), torch.ones(4, dtype=torch.float64))


def test_beta_normalized_without_variance_is_mean_centred() -> None:
    groups = [[1.0, 0.0], [0.0, 1.0]]
    np.testing.assert_allclose(first_tokens(BetaNormalized()(inputs_of(groups))), [0.5, -0.5, -0.5, 0.5], rtol=1e-6)
    assert first_tokens(BetaNormalized()(inputs_of([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])))[:4] == [0, 0, 0, 0]


def test_per_component_is_the_mean_over_the_components() -> None:
    components = torch.tensor([[1.0, 5.0], [0.0, 1.0], [0.0, NAN]])
    inputs = inputs_of([[6.0, 1.0, 0.0]], components=components, component_names=("a", "b"))

    def estimate(scores: torch.Tensor) -> Advantages:
        return GRPO(std=False)(replace(inputs, scores=scores))

    out = PerComponent()(inputs, estimate)
    a, b = np.array([1, 0, 0]) - 1 / 3, np.array([5, 1, 0]) - 2
    np.testing.assert_allclose(first_tokens(out), (a + b) / 2, rtol=1e-6)


def test_stratified_by_hand() -> None:
    texts = ("x", "<search> <search>", "<search>", "<search>", "y", "<search>")
    scores = [1.0, 3.0, 0.0, 2.0, 5.0, NAN]
    inputs = inputs_of([scores], texts=texts)
    group = np.array(scores[:5])
    strata = {0: [1.0, 5.0], 1: [0.0, 2.0], 2: [3.0]}
    expected = []
    for text, score in zip(texts, scores, strict=True):
        mates = np.array(strata[text.count("<search>")])
        san = (score - mates.mean()) / (mates.std(ddof=1) + 1e-8) if len(mates) > 1 else 0.0
        expected.append(
            0.0 if math.isnan(score) else 0.6 * san + 0.4 * (score - group.mean()) / (group.std(ddof=1) + 1e-8)
        )
    np.testing.assert_allclose(first_tokens(Stratified(alpha=0.6)(inputs)), expected, rtol=1e-5)


def test_final_answers() -> None:
    assert final_answers(["3,10,-2.5", "none", "7 apples"], NUMBER) == ["-2.5", "", "7"]
    assert final_answers(["a #b", "#c\n#d"], r"#(\w)") == ["b", "d"]


def test_consistency_blend_by_hand() -> None:
    """Two prompts: one whose answers differ, one whose answers agree and are wrong."""
    texts = ("1", "2", "3", "4", "9", "9", "9", "9")
    inputs = inputs_of([[1.0, 0, 0, 0], [0.0, 0, 0, 0]], texts=texts)
    local = np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6)
    means = np.array([0.25, 0.0])
    across = (means - means.mean()) / (means.std(ddof=1) + 1e-6)
    w = [1 / (1 + math.exp(-20 * (h - 1.5))) for h in (math.log(4), 0.0)]
    expected = [*(w[0] * local + (1 - w[0]) * across[0]), *([(1 - w[1]) * across[1]] * 4)]
    np.testing.assert_allclose(first_tokens(ConsistencyBlend()(inputs)), expected, rtol=1e-5)
    assert expected[4] < -0.5, "agreeing on a wrong answer is discouraged, which GRPO cannot do"


def test_semantic_entropy_scale_by_hand() -> None:
    texts = ("4", "4", "5", "x")
    inputs = inputs_of([[1.0, 1.0, 0.0, 0.0]], [2, 1, 2, 2], texts=texts)
    given = Advantages(torch.ones(4, 2) * inputs.mask)
    likelihood = [float(inputs.behavior_logprobs[r, : (2, 1, 2, 2)[r]].mean()) for r in range(4)]
    share = np.exp(likelihood) / np.exp(likelihood).sum()
    p = [share[0] + share[1], share[2], share[3]]
    entropy = -sum(x * math.log(x) for x in p)
    out = SemanticEntropyScale(alpha=0.3)(inputs, given)
    np.testing.assert_allclose(first_tokens(out), [1 - 0.3 * entropy / math.log(4)] * 4, rtol=1e-5)


@pytest.mark.parametrize(("heat", "most"), [(1, 2), (-1, 1)])
def test_explored_successes(heat: int, most: int) -> None:
    """Rows 3 to 6 are explored: of the successes (3, 4, 6) the first `most` take the place of ordinary rows."""
    inputs = inputs_of([[0.0] * 3, [0.0] * 4], lengths=[2, 0, 1, 2, 1, 2, 2])
    inputs = replace(inputs, explored=torch.tensor([0, 0, 0, heat, heat, heat, heat], dtype=torch.int8))
    given = to_tokens(torch.tensor([0.3, 0.3, -0.4, 0.9, 0.06, 0.05, 2.0]), inputs.mask)
    out = ExploredSuccesses(rows=2)(inputs, Advantages(given))
    assert out.mask is not None
    successes = [3, 4][:most]
    ordinary = [0, 2][most:]  # row 1 has no token, so none is replaced by it
    assert out.mask.any(1).nonzero().squeeze(1).tolist() == [*ordinary, *successes]
    for row in successes:
        assert out.advantages[row][inputs.mask[row]].tolist() == [1.0] * int(inputs.mask[row].sum())
    for row in ordinary:
        assert torch.equal(out.advantages[row], given[row])
    metrics = reduce(out.metrics)
    assert (metrics["explored/rows"], metrics["explored/trained"]) == (4, most)
    assert metrics["explored/success"] == 0.75


def test_prompt_value_target() -> None:
    """The error of the critic is that of its first value alone; the advantages do not change."""
    inputs = inputs_of([[1.0, 0.0, NAN], [0.25, 0.75]], lengths=[2, 1, 1, 0, 2])
    values = torch.arange(10.0).reshape(5, 2) / 10
    given = Advantages(inputs.token_rewards, returns=None)
    out = PromptValueTarget()(replace(inputs, values=values), given)
    assert out.returns is not None
    error = (out.returns - values).masked_fill(~inputs.mask, 0)
    assert error.tolist() == [[0.5 - 0.0, 0.0], [pytest.approx(0.5 - 0.2), 0], [0, 0], [0, 0], [pytest.approx(-0.3), 0]]
    assert out.advantages is given.advantages
    assert reduce(out.metrics)["prompt_value/error"] == pytest.approx((0.5 + 0.3 + 0.3) / 3)


def test_nothing_explored() -> None:
    inputs = inputs_of([[1.0, 0.0]])
    given = Advantages(to_tokens(torch.tensor([0.5, -0.5]), inputs.mask))
    out = ExploredSuccesses()(inputs, given)
    assert out.mask is not None
    assert torch.equal(out.mask, inputs.mask)
    assert torch.equal(out.advantages, given.advantages)


def test_component_scale() -> None:
    inputs = inputs_of([[1.0, 0.0]], components=torch.tensor([[2.0], [NAN]]), component_names=("difficulty",))
    assert first_tokens(ComponentScale()(inputs, Advantages(torch.ones(2, 2)))) == [2.0, 1.0]
    with pytest.raises(LearnerError, match="no reward component 'gap' came with the batch; there are difficulty"):
        ComponentScale(component="gap")(inputs, Advantages(torch.ones(2, 2)))


@pytest.mark.parametrize("over", ["tokens", "sequences"])
def test_whiten(over: Any) -> None:
    inputs = inputs_of([[1.0, 0.0, NAN, 2.0]], [3, 1, 2, 2])
    values = torch.tensor([[1.0, 2, 3], [5, 0, 0], [9, 9, 0], [0, 4, 0]])
    rows = [[1.0, 2, 3], [5.0], [0.0, 4]]
    flat = [(x, 1.0 if over == "tokens" else 1 / len(row)) for row in rows for x in row]
    total = sum(w for _, w in flat)
    mean = sum(x * w for x, w in flat) / total
    std = math.sqrt(sum(w * (x - mean) ** 2 for x, w in flat) / total)
    out = Whiten(over=over)(inputs, Advantages(values)).advantages
    np.testing.assert_allclose(out[0], [(x - mean) / std for x in rows[0]], rtol=1e-5)
    np.testing.assert_allclose(out[3, :2], [(x - mean) / std for x in rows[2]], rtol=1e-5)
    assert (out[2] == 0).all()
    assert (Whiten(over=over)(inputs, Advantages(torch.full((4, 3), 7.0))).advantages == 0).all()


def test_exponential_weight() -> None:
    inputs = inputs_of([[1.0, 0.0]])
    out = ExponentialWeight(temperature=2.0)(inputs, Advantages(torch.tensor([[1.0, 1.0], [-3.0, -3.0]])))
    np.testing.assert_allclose(first_tokens(out), [math.exp(0.5), -3 * math.exp(-1.5)], rtol=1e-6)


def test_drop_negatives_balances_each_group() -> None:
    groups = [[1.0, 0, 0, 0, 0, 0], [1.0, 1.0, 1.0, 0], [1.0, 1.0]]
    inputs = inputs_of(groups)
    shaper, given = DropNegatives(), Advantages(torch.zeros(12, 2))
    draws = set()
    for _ in range(8):
        out = shaper(inputs, given)
        assert out.mask is not None
        kept = out.mask[:, 0]
        draws.add(tuple(kept.tolist()))
        assert kept[0]
        assert kept[1:6].sum() == 1, "one positive, so one negative"
        assert kept[6:].all()
        np.testing.assert_allclose(out.advantages[0, 0], 0.5)
        np.testing.assert_allclose(out.advantages[1:6, 0][kept[1:6]], [-0.5])
        np.testing.assert_allclose(out.advantages[6:10, 0], [0.25, 0.25, 0.25, -0.75])
    assert len(draws) > 1
    resumed, again = DropNegatives(), DropNegatives()
    again(inputs, given)
    resumed.load_state_dict(json.loads(json.dumps(again.state_dict())))
    torch.testing.assert_close(resumed(inputs, given).advantages, again(inputs, given).advantages)


def test_mixed_var_bundles_by_hand() -> None:
    """Two bundles of two questions and one of one, at the second batch, when the quantiles have been running."""
    rule = MixedVaRBundles(questions=2, low=0.2, high=0.8, tail=1.5, rate=0.1)
    rule.load_state_dict({"quantiles": [0.5, 1.5]})
    groups = [[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0], [1.0, 0.0, 1.0], [1.0, 0.5]]
    out = rule(inputs_of(groups))
    papers = [[1 + 1, 0 + 0, 1 + 0], [0 + 1, 0 + 0], [1.0, 0.5]]
    everything = [p for bundle in papers for p in bundle]
    q = [
        level_q + 0.1 * (level - np.mean([p < level_q for p in everything]))
        for level_q, level in ((0.5, 0.2), (1.5, 0.8))
    ]
    expected = np.zeros(13)
    starts = [0, 3, 6, 8, 11]
    for number, bundle in enumerate(papers):
        questions = [2 * number, 2 * number + 1] if number < 2 else [4]
        for g, score in enumerate(bundle):
            middle = (max(score - q[0], 0) - max(score - q[1], 0)) / (0.6 + 1e-6)
            tail = -max(q[0] - score, 0) / (0.2 + 1e-6)
            value = (1.5 * tail + middle) / 2.5 / (np.std(bundle, ddof=1) + 1e-6)
            credit = [groups[k][g] - np.mean(groups[k]) for k in questions]
            for k, c in zip(questions, credit, strict=True):
                share = c / sum(credit) if abs(sum(credit)) > 1e-6 else 1 / len(credit)
                expected[starts[k] + g] = value * share
    np.testing.assert_allclose(first_tokens(out), expected, rtol=1e-5, atol=1e-7)
    assert rule.quantiles == pytest.approx(q)
    assert out.mask is not None
    assert not out.mask[10].any(), "the third response to the fourth question is on no paper"


def test_solve_rate() -> None:
    out = SolveRate()(inputs_of([[1.0, 0, 0, 0], [1.0, 1.0], [1.0, NAN, 0.0]]))
    assert [round(float(x), 6) for x in out.extras["solve_rate"][:, 0]] == [0.25] * 4 + [0.98] * 2 + [0.5, 0, 0.5]
    assert [round(float(x), 6) for x in out.extras["prompt_weight"][:, 0]] == [0.75] * 4 + [0.0] * 2 + [0.5, 0, 0.5]
    np.testing.assert_allclose(first_tokens(out), [0.75, -0.25, -0.25, -0.25, 0, 0, 0.5, 0, -0.5], rtol=1e-5, atol=1e-7)


def test_optimal_value_is_estimated_once_and_kept() -> None:
    rule = OptimalValue(beta=0.5)
    first = rule(inputs_of([[1.0, 0.0, 0.0], [0.0, 0.0]]))
    value = 0.5 * math.log((math.exp(2) + 2) / 3)
    np.testing.assert_allclose(first_tokens(first), [1 - value, -value, -value, 0, 0], rtol=1e-5)
    assert first.mask is not None
    assert not first.mask[3:].any(), "nobody solved the second prompt"
    resumed = OptimalValue(beta=0.5)
    resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
    later = resumed(replace(inputs_of([[0.0], [1.0]]), prompt_ids=("task/0@1", "task/1@1")))
    np.testing.assert_allclose(first_tokens(later), [-value, 0], rtol=1e-5)


def batch_of(score: float, logprob: float, epoch: int) -> RolloutBatch:
    """One response of two tokens to prompt task/0."""
    return RolloutBatch(
        input_ids_BL=np.array([[7, 8, 9]]),
        prompt_lengths_B=np.array([1]),
        response_lengths_B=np.array([2]),
        mask_BT=np.ones((1, 2), dtype=bool),
        behavior_logprobs_BT=np.full((1, 2), logprob, dtype=np.float32),
        versions_BT=np.zeros((1, 2), dtype=np.int32),
        scores_B=np.array([score], dtype=np.float32),
        scored_B=np.ones(1, dtype=bool),
        group_B=np.zeros(1, dtype=np.int64),
        names_B=(f"task/0@{epoch}#0",),
        reference_logprobs_BT=None,
    )


def test_tracked_baseline_by_hand_and_over_a_resume() -> None:
    """Three visits of a prompt; the policy moves by 0.03 and then by 0.2 between them."""
    rule, alpha, beta = TrackedBaseline(), 0.5, 0.5
    for epoch, (score, logprob, moved) in enumerate([(1.0, -1.0, 0.0), (0.25, -1.5, 0.03), (1.0, -0.5, 0.2)]):
        batch = batch_of(score, logprob, epoch)
        replay = rule.replay(batch)
        rescored = None
        if epoch:
            assert replay is not None
            np.testing.assert_array_equal(replay.input_ids_BL, [[7, 8, 9]])
            rescored = torch.tensor(replay.behavior_logprobs_BT) + moved
        else:
            assert replay is None
        inputs = replace(inputs_of([[score]]), prompt_ids=batch.prompt_ids_B, rescored=rescored)
        assert first_tokens(rule(inputs)) == pytest.approx([score - alpha / (alpha + beta)], rel=1e-5)
        rho = min(max(2 ** (-moved / 0.06), 0.875), 0.96)
        alpha, beta = rho * alpha + score, rho * beta + 1 - score
        assert rule.counts["task/0"] == pytest.approx((alpha, beta))
        resumed = TrackedBaseline()
        resumed.load_state_dict(json.loads(json.dumps(rule.state_dict())))
        rule = resumed


def test_the_trackers_update_is_a_moving_average() -> None:
    alpha, beta, rho, reward = 3.0, 2.0, 0.9, 0.7
    value, weight = alpha / (alpha + beta), rho * (alpha + beta)
    moved = (rho * alpha + reward) / (weight + 1)
    assert moved == pytest.approx(value + (reward - value) / (weight + 1))


def test_overlong() -> None:
    mask = torch.arange(10) < torch.tensor([0, 5, 6, 7, 8, 10])[:, None]
    added = Overlong(length=8, buffer=4, coefficient=2.0).reward(torch.zeros(6, 10), None, mask)
    assert added.sum(1).tolist() == [0, -0.5, -1.0, -1.5, -2.0, -2.0]
    assert [int(row.nonzero()[0]) for row in added[1:]] == [4, 5, 6, 7, 9]
