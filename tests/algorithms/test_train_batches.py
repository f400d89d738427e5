"""From a batch of rollouts to optimizer steps, and the objective of one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsys.algorithms import Algorithm
from rlsys.batches import select_rows, split
from rlsys.config.models import AlgorithmConfig
from rlsys.errors import LearnerError, NonFiniteError
from rlsys.losses import LossInputs
from rlsys.metrics import merge, reduce
from rlsys.types import RolloutBatch, StartOfStep, TrainBatch

NAN = float("nan")


def compose(**config: Any) -> Algorithm:
    return Algorithm.from_config(AlgorithmConfig.model_validate(config))


# ---- train_batches ------------------------------------------------------------------------------------------------


def test_grpo_by_hand(make_batch) -> None:  # type: ignore[no-untyped-def]
    """Two groups; scores 1, 0 have deviation sqrt(1/2). Sequence means: weight 1/3 of 1/4 for every token."""
    batch = make_batch([[1.0, 0.0], [0.5, 0.5]])
    (step,), metrics = compose(advantage={"eps": 0.0}).train_batches(batch)
    expected = np.array([1, -1, 0, 0]) * 0.5 / np.sqrt(0.5)
    np.testing.assert_allclose(step.advantages_BT, np.tile(expected[:, None], 3), rtol=1e-6)
    np.testing.assert_allclose(step.loss_weights_BT, np.full((4, 3), 1 / 12), rtol=1e-6)
    assert (step.proximal_logprobs_BT, step.values_BT, step.returns_BT) == (None, None, None)
    assert reduce(metrics) == pytest.approx(
        {
            "batch/rows_left_out": 0,
            "advantages/mean": 0,
            "advantages/max": np.sqrt(0.5),
            "advantages/min": -np.sqrt(0.5),
            "advantages/nonzero": 0.5,
        },
        abs=1e-6,
    )


def test_unscored_rows_are_left_out_and_do_not_count(make_batch) -> None:  # type: ignore[no-untyped-def]
    batch = make_batch([[1.0, NAN, 0.0], [NAN, 3.0]])
    (step,), metrics = compose(preset="dr-grpo", aggregate={"length": 3}).train_batches(batch)
    assert step.rollouts.names_B == ("p0#0", "p0#2", "p1#1")
    np.testing.assert_allclose(step.advantages_BT[:, 0], [0.5, -0.5, 3.0])
    np.testing.assert_allclose(step.loss_weights_BT, np.full((3, 3), 1 / 9), rtol=1e-6)
    assert reduce(metrics)["batch/rows_left_out"] == 2


def test_what_the_last_part_counts_is_counted_once(make_batch) -> None:  # type: ignore[no-untyped-def]
    batch = replace(make_batch([[1.0, 0.0], [0.5, 0.0]]), explored_B=np.array([0, 0, 1, 1], dtype=np.int8))
    _, metrics = compose(preset="aepo").train_batches(batch, StartOfStep(proximal=batch.behavior_logprobs_BT))
    found = reduce(metrics)
    assert (found["explored/rows"], found["explored/trained"]) == (2, 1)


def test_nothing_scored_gives_no_step(make_batch) -> None:  # type: ignore[no-untyped-def]
    batch = make_batch([[NAN, NAN], [NAN]])
    for name in ("grpo", "reinforce-baseline", "rloo"):
        steps, metrics = compose(preset=name).train_batches(batch)
        assert steps == []
        assert reduce(metrics)["batch/rows_left_out"] == 3


def test_minibatches_have_their_own_normaliser_and_the_advantages_of_the_whole_batch(make_batch) -> None:  # type: ignore[no-untyped-def]
    batch = make_batch([[1.0, 0.0], [2.0], [NAN]], lengths=[2, 4, 1, 4])
    config = {"preset": "reinforce-baseline", "aggregate": {"name": "token-mean"}, "minibatches": 3}
    steps, _ = compose(**config).train_batches(batch)
    assert [step.rollouts.names_B for step in steps] == [("p0#0", "p0#1"), ("p1#0",)]
    np.testing.assert_allclose(steps[0].loss_weights_BT, [[1 / 6, 1 / 6, 0, 0], [1 / 6] * 4], rtol=1e-6)
    np.testing.assert_allclose(steps[1].loss_weights_BT, [[1.0]])
    np.testing.assert_allclose(steps[0].advantages_BT, [[0, 0, 0, 0], [-1] * 4])
    np.testing.assert_allclose(steps[1].advantages_BT, [[1.0]])


def test_kl_in_the_reward_reaches_every_kind_of_estimator(make_batch) -> None:  # type: ignore[no-untyped-def]
    """The reference is 0.5 below the sampler at every token: k1 = 0.5 a token, for rows of 1 and 4 tokens."""
    batch = make_batch([[1.0, 1.0]], lengths=[1, 4])
    kl = [{"name": "kl", "estimator": "k1", "coefficient": 0.1, "in_reward": True}]
    (step,), metrics = compose(preset="rloo", regularize=kl).train_batches(batch)
    # scores 1 - 0.05 and 1 - 0.20
    np.testing.assert_allclose(step.advantages_BT, [[0.15, 0, 0, 0], [-0.15] * 4], rtol=1e-5)
    assert reduce(metrics)["rewards/added_by_regularizers"] == pytest.approx(-0.125)
    values = np.zeros((2, 4), dtype=np.float32)
    ppo = compose(preset="ppo", regularize=kl, advantage={"whiten": False, "lam": 1.0})
    (step,), _ = ppo.train_batches(batch, StartOfStep(values=values))
    np.testing.assert_allclose(step.advantages_BT, [[0.95, 0, 0, 0], [0.8, 0.85, 0.9, 0.95]], rtol=1e-5)


def test_the_score_is_on_the_last_trained_token(make_batch) -> None:  # type: ignore[no-untyped-def]
    """A tool's token at the end, or in between, does not take the reward away."""
    batch = make_batch([[1.0], [2.0]], lengths=4, reference=False)
    mask = np.array([[True, True, True, False], [True, False, True, True]])
    advantage = {"gamma": 0.5, "lam": 1.0, "whiten": False}
    ppo = compose(preset="ppo", regularize=[], advantage=advantage, minibatches=1)
    (step,), metrics = ppo.train_batches(replace(batch, mask_BT=mask), StartOfStep(values=np.zeros((2, 4))))
    np.testing.assert_allclose(step.advantages_BT, [[0.25, 0.5, 1, 0], [0.5, 0, 1, 2]])
    assert step.returns_BT is not None
    np.testing.assert_allclose(step.returns_BT, step.advantages_BT)
    assert reduce(metrics)["critic/explained_variance"] == pytest.approx(0.0)


def test_explained_variance(make_batch) -> None:  # type: ignore[no-untyped-def]
    batch = make_batch([[1.0], [0.0]], lengths=1, reference=False)
    values = np.array([[0.75], [0.25]])
    ppo = compose(preset="ppo", regularize=[], minibatches=1)
    _, metrics = ppo.train_batches(batch, StartOfStep(values=values))
    # errors 1/4 and -1/4 against returns 1 and 0
    assert reduce(metrics)["critic/explained_variance"] == pytest.approx(1 - 0.0625 / 0.25)


def test_read_only_arrays_are_fine(make_batch, recwarn) -> None:  # type: ignore[no-untyped-def]
    batch = make_batch([[1.0, 0.0]])
    for field in fields(batch):
        array = getattr(batch, field.name)
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    compose().train_batches(batch)
    assert not recwarn.list


def test_what_is_missing_or_not_finite_is_named(make_batch) -> None:  # type: ignore[no-untyped-def]
    batch = make_batch([[1.0, 0.0]], reference=False)
    with pytest.raises(LearnerError, match="'grpo' needs reference log-probs, but the batch came without"):
        compose().train_batches(batch)
    with pytest.raises(LearnerError, match="'grpo-decoupled' needs proximal log-probs"):
        compose(preset="grpo-decoupled").train_batches(batch)
    with pytest.raises(LearnerError, match="'ppo' needs values"):
        compose(preset="ppo", regularize=[]).train_batches(batch)
    values = np.zeros((2, 3))
    values[1, 2] = NAN
    with pytest.raises(NonFiniteError, match="p0#1"):
        compose(preset="ppo", regularize=[], advantage={"whiten": False}).train_batches(
            batch, StartOfStep(values=values)
        )


# ---- objective ----------------------------------------------------------------------------------------------------


def loss_inputs(step: TrainBatch, logprobs: Tensor, entropy: Tensor | None = None) -> LossInputs:
    """What the learner makes of a batch and the current policy's log-probs."""
    rollouts = step.rollouts
    behavior = torch.tensor(rollouts.behavior_logprobs_BT)
    proximal, reference = step.proximal_logprobs_BT, rollouts.reference_logprobs_BT
    return LossInputs(
        logprobs=logprobs,
        behavior_logprobs=behavior,
        proximal_logprobs=behavior if proximal is None else torch.tensor(proximal),
        reference_logprobs=None if reference is None else torch.tensor(reference),
        entropy=entropy,
        advantages=torch.tensor(step.advantages_BT),
        mask=torch.tensor(rollouts.mask_BT),
    )


def test_objective_is_loss_times_correction_plus_regularisers() -> None:
    algorithm = compose(
        preset="grpo-decoupled",
        correction={"cap": None},
        regularize=[
            {"name": "kl", "estimator": "k2", "coefficient": 0.3},
            {"name": "kl", "in_reward": True},
            {"name": "entropy", "coefficient": 0.2},
        ],
    )

    def one(value: float) -> Tensor:
        return torch.tensor([[value, 5.0]])

    inputs = LossInputs(
        logprobs=one(-1.0).requires_grad_(),
        behavior_logprobs=one(-1.4),
        proximal_logprobs=one(-1.1),
        reference_logprobs=one(-2.0),
        entropy=one(0.7),
        advantages=one(2.0),
        mask=torch.tensor([[True, False]]),
    )
    out = algorithm.objective(inputs)
    expected = -2.0 * np.exp(0.1) * np.exp(0.3) + 0.3 * 0.5 - 0.2 * 0.7
    torch.testing.assert_close(out.per_token, torch.tensor([[expected, 0.0]], dtype=torch.float32))
    assert {"policy/ratio", "correction/weight", "reference/kl_k2", "policy/entropy"} <= set(reduce(out.metrics))


@pytest.mark.parametrize("loss", ["ppo-clip", "policy-gradient"])
def test_masked_places_have_no_say_even_when_they_are_not_finite(loss: str) -> None:
    algorithm = compose(
        loss={"name": loss}, correction={"name": "decoupled"}, regularize=[{"name": "kl"}, {"name": "entropy"}]
    )
    mask = torch.tensor([[True, False], [False, True]])

    def filled(value: float, junk: float) -> Tensor:
        return torch.where(mask, value, junk).requires_grad_()

    results = []
    for junk in (0.0, NAN, float("-inf"), float("inf")):
        logprobs, entropy = filled(-1.0, junk), filled(0.5, junk)
        behavior, proximal, reference, advantages = (filled(v, junk).detach() for v in (-1.5, -1.2, -0.8, 1.0))
        inputs = LossInputs(logprobs, behavior, proximal, reference, entropy, advantages, mask)
        out = algorithm.objective(inputs)
        out.per_token.sum().backward()
        assert logprobs.grad is not None
        assert entropy.grad is not None
        assert (logprobs.grad[~mask] == 0).all()
        results.append((out.per_token.tolist(), logprobs.grad.tolist(), entropy.grad.tolist(), reduce(out.metrics)))
    assert all(result == results[0] for result in results)


CUTS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr-grpo": {},
    "rloo": {},
    "ppo": {"minibatches": 1},
    "grpo-decoupled": {"regularize": [{"name": "kl", "estimator": "k2"}, {"name": "entropy"}], "minibatches": 1},
}


@pytest.mark.parametrize("preset", CUTS)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), ranks=st.integers(1, 3), budget=st.integers(1, 40), packed=st.booleans())
def test_the_gradient_does_not_depend_on_the_cut(make_batch, preset, seed, ranks, budget, packed) -> None:  # type: ignore[no-untyped-def]
    """A policy with shared parameters, summed over any micro-batches of any ranks, padding trimmed in each."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 7, 7).tolist()
    batch: RolloutBatch = make_batch([[1.0, 0.0, NAN], [0.5, 2.0], [1.0, 3.0]], lengths=lengths, seed=seed)
    algorithm = compose(preset=preset, **CUTS[preset])
    shape = batch.mask_BT.shape
    values = rng.normal(size=shape) if algorithm.needs.values else None
    proximal = batch.behavior_logprobs_BT + 0.1 * rng.normal(size=shape) if algorithm.needs.proximal else None
    (step,), _ = algorithm.train_batches(batch, StartOfStep(values=values, proximal=proximal))
    position = torch.arange(6, dtype=torch.float32)

    def run(pieces: list[list[int]]) -> tuple[float, Tensor, dict[str, float]]:
        weights = torch.tensor([0.05, -0.1], requires_grad=True)
        total, metrics = 0.0, []
        for rows in pieces:
            part = select_rows(step, rows)
            behavior = torch.tensor(part.rollouts.behavior_logprobs_BT)
            logprobs = behavior + weights[0] * position[: behavior.shape[1]] + weights[1] * behavior.square()
            out = algorithm.objective(loss_inputs(part, logprobs, logprobs.exp()))
            loss = (out.per_token * torch.tensor(part.loss_weights_BT)).sum()
            loss.backward()
            total += loss.item()
            metrics.append(out.metrics)
        assert weights.grad is not None
        return total, weights.grad, reduce(merge(metrics))

    whole = run([list(range(step.rollouts.rows))])
    row_lengths = (step.rollouts.prompt_lengths_B + step.rollouts.response_lengths_B).tolist()
    plan = split(row_lengths, ranks, budget, "packed" if packed else "padded")
    cut = run([rows for rank in plan for rows in rank])
    assert cut[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-4, atol=1e-6)
    assert cut[2] == pytest.approx(whole[2], rel=1e-5, abs=1e-6)
