"""Chains and trees against the rule by hand, and against exact values of a policy that can be enumerated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.advantages.adjustments.probability_mask import ProbabilityMask
from rlsys.advantages.segment_values import SegmentValues
from rlsys.algorithms import Algorithm
from rlsys.batches import collate
from rlsys.config.models import AlgorithmConfig
from rlsys.errors import ConfigError, SegmentError
from rlsys.metrics import reduce
from rlsys.roles import Sampling
from rlsys.segments import Strategy, prefix_of
from rlsys.segments.partitions.delimiter import Delimiter
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.partitions.low_probability import LowProbability
from rlsys.segments.partitions.python import Python
from rlsys.segments.partitions.turns import Turns
from rlsys.segments.strategies.budgets import Budgets
from rlsys.segments.strategies.chain import Chain
from rlsys.segments.strategies.reset import Reset
from rlsys.segments.strategies.tree import Tree
from rlsys.segments.strategies.windows import Windows
from rlsys.types import Demonstration, Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, Segment, VersionSpan

PROMPT = Prompt("p/0@0", 0, np.array([90, 91], np.int32), "?", "t", None, seed=7)


def rollout(
    sample: int,
    tokens: Sequence[int],
    probabilities: Sequence[float] | None = None,
    finish: Any = "stop",
    version: int = 0,
) -> Rollout:
    n = len(tokens)
    return Rollout(
        prompt_id=PROMPT.id,
        sample=sample,
        token_ids=np.array(tokens, np.int32),
        action_mask=np.ones(n, bool),
        behavior_logprobs=np.log(np.array(probabilities or [0.5] * n, np.float32)),
        version_spans=(VersionSpan(version, 0, n),),
        finish_reason=finish,
        text="".join(map(str, tokens)),
    )


def group(prompt: Prompt, *rollouts: Rollout) -> RolloutGroup:
    return RolloutGroup(prompt, rollouts, "generator-0")


def scored(part: RolloutGroup, scores: Sequence[float]) -> ScoredGroup:
    rewards = tuple(Reward("timeout" if math.isnan(s) else "ok", s) for s in scores)
    return ScoredGroup(part, rewards)


# ---- chain ----


def chain(partition: Any, **options: Any) -> Chain:
    strategy = Chain(**options)
    strategy.bind(partition, 20)
    return strategy


def test_the_published_rule_by_hand() -> None:
    """Nine tokens, five of them below 0.9, a cut at every second of those; scores of continuations are given."""
    strategy = chain(LowProbability(threshold=0.9, every=2), continuations=3)
    #                         U:       x          x    x               x     x
    probabilities = [0.99, 0.5, 0.95, 0.2, 0.85, 0.99, 0.91, 0.3, 0.89]
    root = group(PROMPT, rollout(0, [1, 2, 3, 4, 5, 6, 7, 8, 9], probabilities), rollout(1, [5], [0.99]))
    branches = strategy.branch([[root]])
    assert [(len(prefix_of(b.prompt)), b.n, b.max_new_tokens) for b in branches] == [(1, 3, 19), (4, 3, 16), (8, 3, 12)]
    assert branches[1].prompt.token_ids.tolist() == [90, 91, 1, 2, 3, 4]
    assert len({b.prompt.id for b in branches} | {PROMPT.id}) == 4
    assert len({b.prompt.seed + i for b in branches for i in range(3)}) == 9, "every continuation has its own seed"
    given = {1: [1.0, 0.0, 0.0], 4: [1.0, 1.0, math.nan], 8: [1.0, 0.0, 1.0]}  # one could not be scored
    parts = [
        group(b.prompt, *(rollout(i, [3], finish="length" if i == 2 else "stop") for i in range(3))) for b in branches
    ]
    rounds = [[root], parts]
    assert strategy.branch(rounds) == []
    assert strategy.to_score(rounds) == [root, *parts]
    out = strategy.assemble(
        rounds, [scored(root, [1.0, 0.5]), *(scored(p, given[len(prefix_of(p.prompt))]) for p in parts)]
    )
    # The last continuation of each was cut at the length limit: it counts 0 instead of its score of 1.
    assert out.rollouts[0].segments == (
        Segment(0, 1, None, pytest.approx(1 / 3)),
        Segment(1, 4, pytest.approx(1 / 3), 1.0),
        Segment(4, 8, 1.0, pytest.approx(1 / 3)),
        Segment(8, 9, pytest.approx(1 / 3), 1.0),
    )
    assert out.rollouts[1].segments == (Segment(0, 1, None, 0.5),), "no cut, no value before the end"
    algorithm = Algorithm.from_config(
        AlgorithmConfig.model_validate({"preset": "spo-chain", "adjust": [{"name": "probability-mask"}]})
    )
    (step,), metrics = algorithm.train_batches(collate([out]))
    third = 2 / 3
    expected = [0, third, 0, third, -third, 0, 0, -third, third]
    np.testing.assert_allclose(step.advantages_BT, [expected], rtol=1e-5)
    assert step.rollouts.mask_BT.tolist() == [[e != 0 for e in expected]], "surer tokens, and those without a value"
    np.testing.assert_allclose(step.loss_weights_BT, [[0.2 * (e != 0) for e in expected]], rtol=1e-6)
    found = reduce(metrics)
    assert found["segments/tokens_left_out"] == pytest.approx(2 / 10)
    assert found["segments/tokens_too_sure"] == pytest.approx(3 / 8)


def test_whitening_is_over_the_tokens_that_are_left() -> None:
    strategy = chain(FixedLength(tokens=2), continuations=1)
    root = group(PROMPT, rollout(0, [1, 2, 3, 4, 5], [0.5, 0.95, 0.5, 0.5, 0.95]))
    branches = strategy.branch([[root]])
    parts = [group(b.prompt, rollout(0, [1])) for b in branches]
    values = [scored(part, [value]) for part, value in zip(parts, [0, 0.5, 0.25], strict=True)]
    out = strategy.assemble([[root], parts], [scored(root, [1.0]), *values])
    (step,), _ = Algorithm.from_config(AlgorithmConfig(preset="spo-chain")).train_batches(collate([out]))
    left = np.array([0.5, -0.25, -0.25])
    whitened = (left - left.mean()) / (left.std() + 1e-8)
    np.testing.assert_allclose(step.advantages_BT[0][[0, 2, 3]], whitened, rtol=1e-4)
    assert step.advantages_BT[0][[1, 4]].tolist() == [0, 0]


def test_what_responses_share_is_sampled_once() -> None:
    strategy = chain(FixedLength(tokens=2), continuations=4)
    root = group(PROMPT, rollout(0, [1, 2, 3, 4]), rollout(1, [1, 2, 5]), rollout(2, [6, 7, 8]))
    assert [prefix_of(b.prompt).tolist() for b in strategy.branch([[root]])] == [[], [1, 2], [6, 7]]


# ---- an enumerable policy ----

TABLE = {prefix: 0.2 + 0.6 * math.sin(1 + len(prefix) + 3 * sum(prefix)) ** 2 for n in range(3)
         for prefix in itertools.product((0, 1), repeat=n)}  # fmt: skip


def probability(prefix: tuple[int, ...], token: int) -> float:
    return TABLE[prefix] if token else 1 - TABLE[prefix]


def reward(tokens: Sequence[int]) -> float:
    return float(tokens[0] * 2 + tokens[1] * tokens[2] - tokens[2] * 0.5)


def exact(prefix: tuple[int, ...]) -> float:
    """By enumeration of what may follow."""
    if len(prefix) == 3:
        return reward(prefix)
    return sum(probability(prefix, token) * exact((*prefix, token)) for token in (0, 1))


def sample(rng: np.random.Generator, prefix: tuple[int, ...] = ()) -> tuple[int, ...]:
    while len(prefix) < 3:
        prefix = (*prefix, int(rng.random() < TABLE[prefix]))
    return prefix


def sampled_chain(rng: np.random.Generator, n: int, whole: tuple[int, ...]) -> ScoredGroup:
    strategy = chain(FixedLength(tokens=1), continuations=n)
    root = group(PROMPT, rollout(0, whole, [probability(whole[:t], whole[t]) for t in range(3)]))
    parts, done = [], [scored(root, [reward(whole)])]
    for branch in strategy.branch([[root]]):
        prefix = tuple(prefix_of(branch.prompt).tolist())
        ends = [sample(rng, prefix) for _ in range(branch.n)]
        parts.append(group(branch.prompt, *(rollout(i, end[len(prefix) :]) for i, end in enumerate(ends))))
        done.append(scored(parts[-1], [reward(end) for end in ends]))
    return strategy.assemble([[root], parts], done)


def advantages(found: ScoredGroup) -> np.ndarray:
    batch = collate([found])
    algorithm = Algorithm.from_config(AlgorithmConfig.model_validate({"preset": "spo-chain", "adjust": []}))
    (step,), _ = algorithm.train_batches(batch)
    return step.advantages_BT[0]


@pytest.mark.parametrize("n", [1, 4])
def test_segment_advantages_are_unbiased_at_any_number_of_continuations(n: int) -> None:
    rng = np.random.default_rng(n)
    whole = (1, 0, 1)
    truth = [exact(whole[: t + 1]) - exact(whole[:t]) for t in range(3)]
    found = np.array([advantages(sampled_chain(rng, n, whole)) for _ in range(150)])
    error = found.std(axis=0, ddof=1) / math.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - truth) < 4 * error + 1e-6).all()


def test_segment_advantages_converge() -> None:
    rng = np.random.default_rng(0)
    whole = (0, 1, 1)
    truth = [exact(whole[: t + 1]) - exact(whole[:t]) for t in range(3)]
    np.testing.assert_allclose(advantages(sampled_chain(rng, 10_000, whole)), truth, atol=0.06)


def test_the_expected_segment_gradient_is_the_policy_gradient() -> None:
    """sum_y p(y) sum_t A_t grad log pi(y_t), with exact values, against the gradient of the expected reward."""
    logits = torch.tensor([math.log(p / (1 - p)) for p in TABLE.values()], dtype=torch.float64, requires_grad=True)
    place = {prefix: i for i, prefix in enumerate(TABLE)}

    def logprob(prefix: tuple[int, ...], token: int) -> torch.Tensor:
        return torch.nn.functional.logsigmoid(logits[place[prefix]] * (1 if token else -1))

    expected, form = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for whole in itertools.product((0, 1), repeat=3):
        logprobs = [logprob(whole[:t], whole[t]) for t in range(3)]
        expected = expected + torch.stack(logprobs).sum().exp() * reward(whole)
        strategy = chain(FixedLength(tokens=1), continuations=1)
        root = group(PROMPT, rollout(0, whole))
        parts = [group(b.prompt, rollout(0, [0])) for b in strategy.branch([[root]])]
        values = [exact(tuple(prefix_of(part.prompt).tolist())) for part in parts]
        found = strategy.assemble(
            [[root], parts],
            [scored(root, [reward(whole)]), *(scored(p, [v]) for p, v in zip(parts, values, strict=True))],
        )
        weight = math.prod(probability(whole[:t], whole[t]) for t in range(3))
        form = form + weight * (torch.tensor(advantages(found)).double() * torch.stack(logprobs)).sum()
    (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (given,) = torch.autograd.grad(form, logits)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-7)


# ---- tree ----


def test_tree_by_hand() -> None:
    """Two pieces; the first goes on in two ways, the second has ended."""
    strategy = Tree(breadth=(2, 2), segment_tokens=3)
    strategy.bind(FixedLength(), 5)
    first = strategy.first(Sampling(n=8, max_new_tokens=5))
    assert (first.n, first.max_new_tokens) == (2, 3)
    assert strategy.expected_tokens(8) == 2 * 3 + 4 * 2
    root = group(PROMPT, rollout(0, [1, 2, 3], finish="length", version=4), rollout(1, [6, 7], version=4))
    (branch,) = strategy.branch([[root]])
    assert (branch.n, branch.max_new_tokens) == (2, 2)
    assert branch.prompt.token_ids.tolist() == [90, 91, 1, 2, 3]
    below = group(branch.prompt, rollout(0, [8], version=5), rollout(1, [9, 9], finish="length", version=5))
    rounds = [[root], [below]]
    assert strategy.branch(rounds) == []
    leaves = strategy.to_score(rounds)
    assert [[r.sample for r in part.rollouts] for part in leaves] == [[1], [0, 1]]
    out = strategy.assemble(rounds, [scored(leaves[0], [0.25]), scored(leaves[1], [1.0, 1.0])])
    # V(piece 0) = (1 + 0) / 2: the second leaf was cut; V(prompt) = (0.5 + 0.25) / 2
    assert [r.token_ids.tolist() for r in out.rollouts] == [[1, 2, 3, 8], [1, 2, 3, 9, 9], [6, 7]]
    assert [reward.score for reward in out.rewards] == [1.0, 1.0, 0.25]
    assert out.rollouts[0].segments == (
        Segment(0, 3, 0.375, 0.5, 0.125, True),
        Segment(3, 4, 0.5, 1.0, 0.5, True),
    )
    assert out.rollouts[1].segments == (
        Segment(0, 3, 0.375, 0.5, 0.125, False),
        Segment(3, 5, 0.5, 0.0, 0.5, True),
    )
    assert out.rollouts[2].segments == (Segment(0, 2, 0.375, 0.25, 0.125, True),)
    assert [r.parent for r in out.rollouts] == [None, (0, 3), None]
    assert out.rollouts[1].version_spans == (VersionSpan(4, 0, 3), VersionSpan(5, 3, 5))
    assert [r.sample for r in out.rollouts] == [0, 1, 2]
    batch = collate([out])
    algorithm = Algorithm.from_config(
        AlgorithmConfig.model_validate({"preset": "spo-tree", "advantage": {"scale": "none"}})
    )
    (step,), _ = algorithm.train_batches(batch)
    np.testing.assert_allclose(
        step.advantages_BT, [[0.125, 0.125, 0.125, 0.5, 0], [0, 0, 0, -0.5, -0.5], [-0.125, -0.125, 0, 0, 0]], atol=1e-7
    )
    np.testing.assert_allclose(step.loss_weights_BT.sum(), 1.0, rtol=1e-6)
    assert step.rollouts.mask_BT.sum() == 8, "every sampled token once"
    (step,), _ = Algorithm.from_config(AlgorithmConfig(preset="spo-tree")).train_batches(batch)
    np.testing.assert_allclose(step.advantages_BT[:, 0], [1.0, 0, -1.0], rtol=1e-5)
    (step,), _ = Algorithm.from_config(AlgorithmConfig(preset="grpo-tree")).train_batches(batch)
    assert step.rollouts.mask_BT.sum() == 11, "GRPO trains every leaf from the beginning"


def test_edges_without_a_signal_are_counted_and_left_out() -> None:
    strategy = Tree(breadth=(3,), segment_tokens=3)
    strategy.bind(FixedLength(), 5)
    root = group(PROMPT, rollout(0, [1, 2]), rollout(1, [3]), rollout(2, [4, 5, 6]))
    out = strategy.assemble([[root]], [scored(root, [1.0, 1.0, 1.0])])
    steps, metrics = Algorithm.from_config(AlgorithmConfig(preset="spo-tree")).train_batches(collate([out]))
    assert steps == []
    assert reduce(metrics)["segments/tokens_discarded"] == 6
    unscored = strategy.assemble([[root]], [scored(root, [math.nan, 1.0, 0.0])])
    assert unscored.rollouts[0].segments == (Segment(0, 2, 0.5, None, 0.5, True),)


@pytest.mark.parametrize("seed", range(5))
def test_trees_give_every_sampled_token_once(seed: int) -> None:
    """Random trees of three levels: as many first tokens as were sampled, values means of the children's."""
    rng = np.random.default_rng(seed)
    strategy = Tree(breadth=(3, 2, 2), segment_tokens=4)
    strategy.bind(FixedLength(), 12)

    def sampled(prompt: Prompt, n: int, most: int) -> RolloutGroup:
        lengths = [int(rng.integers(1, most + 1)) for _ in range(n)]
        return group(
            prompt,
            *(
                rollout(i, rng.integers(0, 9, k).tolist(), finish="length" if k == most else "stop")
                for i, k in enumerate(lengths)
            ),
        )

    first = strategy.first(Sampling(n=1, max_new_tokens=12))
    rounds = [[sampled(PROMPT, first.n, first.max_new_tokens)]]
    while branches := strategy.branch(rounds):
        assert all(len(prefix_of(b.prompt)) + b.max_new_tokens <= 12 for b in branches)
        rounds.append([sampled(b.prompt, b.n, b.max_new_tokens) for b in branches])
    leaves = strategy.to_score(rounds)
    out = strategy.assemble(rounds, [scored(part, rng.random(len(part.rollouts)).tolist()) for part in leaves])
    total = sum(len(r.token_ids) for level in rounds for part in level for r in part.rollouts)
    assert sum(s.end - s.start for r in out.rollouts for s in r.segments if s.first) == total
    assert len(out.rollouts) == sum(len(part.rollouts) for part in leaves)
    for r in out.rollouts:
        assert [s.start for s in r.segments[1:]] == [s.end for s in r.segments[:-1]]
        assert r.segments[-1].end == len(r.token_ids)
        assert all(a.end_value == b.start_value for a, b in itertools.pairwise(r.segments))
        if r.parent is not None:
            other, place = r.parent
            assert out.rollouts[other].token_ids[:place].tolist() == r.token_ids[:place].tolist()


# ---- windows, resets, budgets ----


def test_what_a_window_leaves_unfinished_goes_on() -> None:
    strategy = Windows(tokens=3)
    strategy.bind(FixedLength(), 7)
    assert strategy.first(Sampling(n=2, max_new_tokens=7)).max_new_tokens == 3
    root = group(PROMPT, rollout(0, [1, 2, 3], finish="length"), rollout(1, [4, 5]))
    (first,) = strategy.branch([[root]])
    assert (first.n, first.max_new_tokens, first.prompt.prefix_tokens) == (1, 3, 3)
    (second,) = strategy.branch([[group(first.prompt, rollout(0, [6, 7, 8], finish="length"))]])
    assert second.prompt.token_ids.tolist() == [90, 91, 1, 2, 3, 6, 7, 8]
    assert (second.max_new_tokens, second.prompt.prefix_tokens) == (1, 6), "seven tokens in all"
    assert strategy.branch([[group(second.prompt, rollout(0, [9], finish="length"))]]) == []


def test_resets_are_uniform_over_the_demonstration() -> None:
    strategy = Reset()
    strategy.bind(FixedLength(), 20)
    shown = Demonstration("a b c d", np.array([5, 6, 7, 8, 0], np.int32))
    started = [strategy.start(replace(PROMPT, seed=seed, demonstration=shown)) for seed in range(2000)]
    counts = np.bincount([prompt.prefix_tokens for prompt in started])
    assert len(counts) == 4
    assert abs(counts / 2000 - 0.25).max() < 0.04
    assert all(p.token_ids.tolist() == [90, 91, *[5, 6, 7, 8][: p.prefix_tokens]] for p in started)
    assert {p.id for p in started} == {PROMPT.id}
    never = Reset(probability=0.0)
    never.bind(FixedLength(), 20)
    assert never.start(replace(PROMPT, demonstration=shown)).prefix_tokens == 0


def test_budgets_by_hand() -> None:
    """Two traces, two budgets: the second trace ends by itself within the first budget."""
    strategy = Budgets(budgets=(2, 4), summaries=2, summary_tokens=3, prior="linear")
    strategy.bind(FixedLength(), 7)
    assert strategy.first(Sampling(n=2, max_new_tokens=7)).max_new_tokens == 4
    root = group(PROMPT, rollout(0, [1, 2, 3, 4], finish="length"), rollout(1, [5, 6]))
    branches = strategy.branch([[root]])
    assert [(b.prompt.id[-3:], prefix_of(b.prompt).tolist(), b.n) for b in branches] == [
        ("0.0", [1, 2], 2),
        ("0.1", [1, 2, 3, 4], 2),
    ]
    parts = [group(b.prompt, rollout(0, [7]), rollout(1, [8, 8])) for b in branches]
    scores = [[0.0, 1.0], [1.0, 1.0]]
    done = [scored(root, [0.0, 0.75]), *(scored(p, s) for p, s in zip(parts, scores, strict=True))]
    out = strategy.assemble([[root], parts], done)
    p0, p1 = 1 / 3, 2 / 3
    c = [[0.5, 1.0], [0.75, 0.75]]
    returns = [[p0 * c[g][0] + p1 * c[g][1], p1 * c[g][1]] for g in range(2)]
    v2 = [(returns[0][s] + returns[1][s]) / 2 for s in range(2)]
    wanted = [returns[0][0] - v2[0], returns[0][1] - (1 * c[0][0] * p1 + 1 * v2[1]) / 2, returns[1][0] - v2[0]]
    segments = [segment for r in out.rollouts[:2] for segment in r.segments]
    assert [(s.start, s.end) for s in segments] == [(0, 2), (2, 4), (0, 2)]
    assert [s.end_value - s.start_value for s in segments] == pytest.approx(wanted)
    summaries = out.rollouts[2:]
    assert [r.token_ids.tolist() for r in summaries] == [[1, 2, 7], [1, 2, 8, 8], [1, 2, 3, 4, 7], [1, 2, 3, 4, 8, 8]]
    assert [r.segments[1].end_value - r.segments[1].start_value for r in summaries] == [-0.5, 0.5, 0.0, 0.0]
    assert [r.action_mask.sum() for r in summaries] == [1, 2, 1, 2]
    assert [reward.score for reward in out.rewards] == [0.0, 0.75, 0.0, 1.0, 1.0, 1.0]
    algorithm = Algorithm.from_config(AlgorithmConfig(preset="brpo"))
    (step,), _ = algorithm.train_batches(collate([out]))
    np.testing.assert_allclose(step.advantages_BT[0], [wanted[0]] * 2 + [wanted[1]] * 2 + [0] * 2, rtol=1e-5)
    assert step.rollouts.mask_BT.sum() == 6 + 6


def test_what_closes_the_thinking_stands_before_the_summary() -> None:
    class Words:
        def __call__(self, ids: np.ndarray) -> list[str]:
            return [str(i) for i in ids]

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

    strategy = Budgets(budgets=(2,), summaries=3, summary_tokens=4, closing="40 41")
    strategy.bind(FixedLength(), 7, Words())
    root = group(PROMPT, rollout(0, [1, 2], finish="length"))
    (branch,) = strategy.branch([[root]])
    assert prefix_of(branch.prompt).tolist() == [1, 2, 40, 41]
    assert (branch.n, branch.max_new_tokens) == (3, 3), "seven tokens in all"
    part = group(branch.prompt, rollout(0, [7]))
    out = strategy.assemble([[root], [part]], [scored(root, [0.0]), scored(part, [1.0])])
    assert out.rollouts[1].token_ids.tolist() == [1, 2, 40, 41, 7]
    assert out.rollouts[1].action_mask.tolist() == [False] * 4 + [True]
    long = Budgets(budgets=(4,), summary_tokens=3, closing="40 41 42")
    long.bind(FixedLength(), 7, Words())
    with pytest.raises(SegmentError, match="closing has 3 tokens: after budget 4"):
        long.branch([[root]])


def test_budgets_that_cannot_be() -> None:
    for options, message in (({"budgets": (4, 2)}, "must rise"), ({"budgets": (4, 6)}, "are more than")):
        with pytest.raises(ConfigError, match=message):
            Budgets(**options, summary_tokens=2).bind(FixedLength(), 7)


# ---- partitions ----


def test_partitions() -> None:
    given = rollout(0, range(7), [0.1, 0.95, 0.1, 0.1, 0.99, 0.1, 0.1])
    assert LowProbability(every=2).boundaries(given, []) == [0, 3, 6]
    assert list(FixedLength(tokens=3).boundaries(given, [])) == [0, 3, 6]
    pieces = ["a", "b\n", "\n", "c", "\nd", "e", "\n"]
    assert Delimiter().boundaries(given, pieces) == [0, 2, 3, 5], "token 4 begins before the break that is in it ends"
    assert Delimiter(every=2).boundaries(given, pieces) == [0, 3]
    assert Delimiter(pattern=r"\n+").boundaries(given, pieces) == [0, 3, 5]
    mask = np.array([1, 1, 0, 0, 1, 0, 1], bool)
    turned = Rollout(**{**{f: getattr(given, f) for f in given.__dataclass_fields__}, "action_mask": mask})
    assert Turns().boundaries(turned, []) == [0, 4, 6]
    with pytest.raises(ValueError, match="no regular expression"):
        Delimiter(pattern="(")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [2, 1]", "boundaries must rise"),
        ("return [0, 0]", "boundaries must rise"),
        ("return [-1]", "from 0 to 2"),
        ("return [3]", "from 0 to 2"),
        ("return None", "python raised TypeError"),
        ("raise KeyError('x')", "python raised KeyError"),
    ],
)
def test_a_users_rule_that_goes_wrong_is_named(tmp_path: Any, body: str, message: str) -> None:
    (tmp_path / "rule.py").write_text(f"def cut(pieces, probabilities):\n    {body}\n")
    strategy = Chain()
    strategy.bind(Python(path=f"{tmp_path}/rule.py:cut"), 20, lambda ids: [str(i) for i in ids])
    with pytest.raises(SegmentError, match=message) as caught:
        strategy.branch([[group(PROMPT, rollout(4, [1, 2, 3]))]])
    assert "p/0@0#4" in str(caught.value)


def test_a_users_rule(tmp_path: Any) -> None:
    (tmp_path / "rule.py").write_text(
        "def cut(pieces, probabilities):\n    return [i for i, p in enumerate(pieces) if p == '2']\n"
    )
    strategy = Chain()
    strategy.bind(Python(path=f"{tmp_path}/rule.py:cut"), 20, lambda ids: [str(i) for i in ids])
    assert [prefix_of(b.prompt).tolist() for b in strategy.branch([[group(PROMPT, rollout(0, [1, 2, 3]))]])] == [[1]]


def test_trees_that_cannot_fit() -> None:
    with pytest.raises(ConfigError, match=r"3 levels of 10 tokens leave none of rollout.max_new_tokens \(20\)"):
        Tree(breadth=(2, 2, 2), segment_tokens=10).bind(FixedLength(), 20)
    with pytest.raises(ConfigError, match="breadth: empty"):
        Tree(breadth=()).bind(FixedLength(), 20)
    with pytest.raises(ConfigError, match=r"'segment-values' works with the values of segments.*'plain'"):
        Algorithm.from_config(AlgorithmConfig.model_validate({"advantage": {"name": "segment-values"}}))


def test_the_estimator_by_hand() -> None:
    nan = math.nan
    segments = torch.tensor([[[0.0, 0.5, 0.25, 1], [0.5, 0.5, 0.25, 1], [nan, 1.0, nan, 1], [0.0, 1.0, 0.0, 0]]])
    from rlsys.advantages import AdvantageInputs

    mask = torch.ones(1, 4, dtype=torch.bool)
    one = torch.zeros(1)
    inputs = AdvantageInputs(
        one, one == 0, mask * 0.0, mask, one.long(), mask * -0.1, None, None, ("p",), segments=segments
    )
    out = SegmentValues(scale="siblings")(inputs)
    assert out.mask is not None
    assert out.mask.tolist() == [[True, True, False, False]]
    assert out.advantages.tolist() == [[pytest.approx(2.0), 0, 0, 0]]
    assert SegmentValues(discard_zero=True)(inputs).mask.tolist() == [[True, False, False, False]]
    sure = ProbabilityMask(threshold=0.9)(inputs, out)
    assert sure.mask is not None
    assert not sure.mask.any(), "exp(-0.1) = 0.905"


def test_strategies_are_sampling_and_nothing_more_by_default() -> None:
    strategy = Strategy()
    root = group(PROMPT, rollout(0, [1]))
    done = scored(root, [1.0])
    assert (strategy.branch([[root]]), strategy.to_score([[root]]), strategy.assemble([[root]], [done])) == (
        [],
        [root],
        done,
    )
