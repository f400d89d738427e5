"""Policy losses and corrections against loops over plain numbers, their gradients, and their metrics."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsys.losses import LossInputs
from rlsys.losses.corrections.decoupled import Decoupled
from rlsys.losses.corrections.none import NoCorrection
from rlsys.losses.corrections.recompute import Recompute
from rlsys.losses.corrections.truncated_importance import TruncatedImportance
from rlsys.losses.policy.policy_gradient import PolicyGradient
from rlsys.losses.policy.ppo_clip import PPOClip
from rlsys.metrics import merge, reduce


def random_inputs(seed: int, rows: int = 3, width: int = 5, spread: float = 0.5) -> LossInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(rows, width, generator=generator)

    current = normal(1.0) - 2
    return LossInputs(
        logprobs=current.clone().requires_grad_(),
        behavior_logprobs=current + normal(spread),
        proximal_logprobs=current + normal(spread),
        reference_logprobs=current + normal(spread),
        entropy=normal(1.0).abs(),
        advantages=normal(1.0),
        mask=torch.rand(rows, width, generator=generator) > 0.3,
    )


def rows_of(inputs: LossInputs, rows: list[int]) -> LossInputs:
    tensors = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return replace(inputs, **{name: t[rows] for name, t in tensors.items() if isinstance(t, torch.Tensor)})


def loop(inputs: LossInputs, rule) -> np.ndarray:  # type: ignore[no-untyped-def]
    """`rule(index)` at every trained token, 0 elsewhere."""
    out = np.zeros(inputs.mask.shape)
    for index in np.ndindex(*out.shape):
        if inputs.mask[index]:
            out[index] = rule(index)
    return out


def single(logprob: float, proximal: float, advantage: float, behavior: float | None = None) -> LossInputs:
    def one(value: float) -> Tensor:
        return torch.tensor([[value]])

    return LossInputs(
        logprobs=one(logprob).requires_grad_(),
        behavior_logprobs=one(proximal if behavior is None else behavior),
        proximal_logprobs=one(proximal),
        reference_logprobs=None,
        entropy=None,
        advantages=one(advantage),
        mask=torch.tensor([[True]]),
    )


# ---- PPO clip -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    low=st.sampled_from([0.1, 0.2, 1.0]),
    high=st.sampled_from([0.0, 0.2, 0.28]),
    dual=st.sampled_from([None, 1.5, 3.0]),
    spread=st.sampled_from([0.1, 1.0, 3.0]),
)
def test_ppo_clip(seed: int, low: float, high: float, dual: float | None, spread: float) -> None:
    inputs = random_inputs(seed, spread=spread)

    def rule(index: tuple[int, ...]) -> float:
        advantage = float(inputs.advantages[index])
        ratio = math.exp(inputs.logprobs[index].item() - inputs.proximal_logprobs[index].item())
        gain = min(advantage * ratio, advantage * min(max(ratio, 1 - low), 1 + high))
        if dual is not None and advantage < 0:
            gain = max(gain, dual * advantage)
        return -gain

    out = PPOClip(low, high, dual)(inputs)
    np.testing.assert_allclose(out.per_token.detach(), loop(inputs, rule), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        (1.0, 2.0, -2.0),  # on-policy: the policy gradient
        (1.0, -2.0, 2.0),
        (1.25, 2.0, -2.5),  # inside the upper bound of 0.3
        (1.35, 2.0, 0.0),  # beyond it: nothing to gain
        (0.85, -2.0, 1.7),
        (0.75, -2.0, 0.0),  # below the lower bound of 0.2
        (0.75, 2.0, -1.5),  # moving back is always allowed
        (2.0, -2.0, 4.0),
        (3.5, -2.0, 0.0),  # beyond dual clip
    ],
)
def test_ppo_clip_gradient(ratio: float, advantage: float, slope: float) -> None:
    inputs = single(math.log(ratio), 0.0, advantage)
    PPOClip(low=0.2, high=0.3, dual_clip=3.0)(inputs).per_token.sum().backward()
    torch.testing.assert_close(inputs.logprobs.grad, torch.tensor([[slope]]))


@pytest.mark.parametrize("gap", [-1e4, -50.0, 50.0, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_huge_ratios_stay_finite(gap: float, advantage: float) -> None:
    for loss in (PPOClip(), PPOClip(dual_clip=3.0), PolicyGradient(ratio=True)):
        inputs = single(gap, 0.0, advantage)
        out = loss(inputs)
        out.per_token.sum().backward()
        assert out.per_token.isfinite().all()
        assert inputs.logprobs.grad is not None
        assert inputs.logprobs.grad.tolist() == [[0.0]]  # the log-ratio is clamped there
        assert all(math.isfinite(value) for value in reduce(out.metrics).values())


def test_ppo_clip_metrics_by_hand() -> None:
    inputs = LossInputs(
        logprobs=torch.tensor([[1.5, 1.5, 0.5, 0.5, 4.0, 9.0]]).log(),
        behavior_logprobs=torch.zeros(1, 6),
        proximal_logprobs=torch.zeros(1, 6),
        reference_logprobs=None,
        entropy=None,
        advantages=torch.tensor([[1.0, -1.0, 1.0, -1.0, -1.0, 1.0]]),
        mask=torch.tensor([[True, True, True, True, True, False]]),
    )
    metrics = reduce(PPOClip(dual_clip=3.0)(inputs).metrics)
    assert metrics["policy/clip_fraction_high"] == pytest.approx(1 / 5)
    assert metrics["policy/clip_fraction_low"] == pytest.approx(1 / 5)
    assert metrics["policy/clip_fraction_dual"] == pytest.approx(1 / 5)
    assert metrics["policy/ratio"] == pytest.approx((1.5 + 1.5 + 0.5 + 0.5 + 4) / 5)
    assert metrics["policy/ratio_max"] == pytest.approx(4.0)
    logs = [math.log(r) for r in (1.5, 1.5, 0.5, 0.5, 4.0)]
    assert metrics["policy/kl_k1"] == pytest.approx(-sum(logs) / 5, abs=1e-6)
    assert metrics["policy/kl_k3"] == pytest.approx(sum(math.exp(d) - 1 - d for d in logs) / 5, rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), cut=st.integers(0, 6))
def test_metrics_do_not_depend_on_the_cut(seed: int, cut: int) -> None:
    inputs = random_inputs(seed, rows=6)
    for part in (PPOClip(dual_clip=3.0), PolicyGradient(), TruncatedImportance(), Decoupled(cap=1.5)):
        pieces = [part(rows_of(inputs, list(range(cut)))), part(rows_of(inputs, list(range(cut, 6))))]
        assert reduce(merge(piece.metrics for piece in pieces)) == pytest.approx(reduce(part(inputs).metrics))


def test_a_fully_masked_micro_batch_has_no_loss_and_no_metrics() -> None:
    inputs = single(-1.0, -2.0, 1.0)
    inputs = replace(inputs, mask=torch.tensor([[False]]))
    for part in (PPOClip(), PolicyGradient()):
        out = part(inputs)
        assert out.per_token.tolist() == [[0.0]]
        assert reduce(out.metrics) == {}


# ---- policy gradient ----------------------------------------------------------------------------------------------


def test_policy_gradient() -> None:
    inputs = random_inputs(1)
    plain, weighted = PolicyGradient()(inputs), PolicyGradient(ratio=True)(inputs)

    def ratio(index: tuple[int, ...]) -> float:
        return math.exp(inputs.logprobs[index].item() - inputs.proximal_logprobs[index].item())

    expected = loop(inputs, lambda i: -float(inputs.advantages[i]) * inputs.logprobs[i].item())
    np.testing.assert_allclose(plain.per_token.detach(), expected, rtol=1e-5)
    expected = loop(inputs, lambda i: -float(inputs.advantages[i]) * ratio(i))
    np.testing.assert_allclose(weighted.per_token.detach(), expected, rtol=1e-4)


@pytest.mark.parametrize("loss", [PolicyGradient(), PolicyGradient(ratio=True), PPOClip(), PPOClip(dual_clip=3.0)])
def test_on_policy_every_loss_has_the_policy_gradient(loss) -> None:  # type: ignore[no-untyped-def]
    """d/d logp = -A."""
    inputs = random_inputs(2, spread=0.0)
    loss(inputs).per_token.sum().backward()
    torch.testing.assert_close(inputs.logprobs.grad, torch.where(inputs.mask, -inputs.advantages, 0.0))


# ---- corrections --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), cap=st.sampled_from([0.5, 1.0, 2.0]))
def test_corrections(seed: int, cap: float) -> None:
    inputs = random_inputs(seed)
    ratio = np.exp((inputs.proximal_logprobs.double() - inputs.behavior_logprobs.double()).numpy())
    mask = inputs.mask.numpy()

    def weights(part) -> np.ndarray:  # type: ignore[no-untyped-def]
        out = part(inputs).per_token
        assert not out.requires_grad
        return np.where(mask, out.numpy(), 0)

    np.testing.assert_allclose(weights(NoCorrection()), mask.astype(float))
    np.testing.assert_allclose(weights(Decoupled()), np.where(mask, ratio, 0), rtol=1e-5)
    np.testing.assert_allclose(weights(TruncatedImportance(cap)), np.where(mask, np.minimum(ratio, cap), 0), rtol=1e-5)
    kept = mask & (ratio <= cap)
    np.testing.assert_allclose(weights(Decoupled(cap)), np.where(kept, ratio, 0), rtol=1e-5)


def test_recompute_ignores_the_sampler() -> None:
    inputs = random_inputs(1)
    other = replace(inputs, behavior_logprobs=inputs.behavior_logprobs - 3)
    for sampler in (inputs, other):
        assert Recompute()(sampler).per_token.tolist() == torch.ones_like(inputs.logprobs).tolist()


def test_correction_metrics_by_hand() -> None:
    inputs = LossInputs(
        logprobs=torch.zeros(1, 4),
        behavior_logprobs=torch.zeros(1, 4),
        proximal_logprobs=torch.tensor([[0.5, 1.0, 4.0, 8.0]]).log(),
        reference_logprobs=None,
        entropy=None,
        advantages=torch.ones(1, 4),
        mask=torch.tensor([[True, True, True, False]]),
    )
    truncated, left_out = reduce(TruncatedImportance(2.0)(inputs).metrics), reduce(Decoupled(2.0)(inputs).metrics)
    assert truncated["correction/weight"] == pytest.approx(3.5 / 3)
    assert truncated["correction/truncated"] == pytest.approx(1 / 3)
    assert truncated["correction/weight_max"] == pytest.approx(4.0)
    assert left_out["correction/weight"] == pytest.approx(1.5 / 3)
    assert left_out["correction/left_out"] == pytest.approx(1 / 3)


# ---- expectations by enumeration ----------------------------------------------------------------------------------


def categorical(seed: int, actions: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of the current policy (with gradient), and log-probs of proximal and behaviour policy; advantages."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(actions, generator=generator, dtype=torch.float64, requires_grad=True)
    proximal, behavior = torch.randn(2, actions, generator=generator, dtype=torch.float64).log_softmax(1)
    return logits, proximal, behavior, torch.randn(actions, generator=generator, dtype=torch.float64)


def enumerated(logits: Tensor, proximal: Tensor, behavior: Tensor, advantages: Tensor) -> LossInputs:
    """Every action once; the expectation is the sum weighted by exp(behavior)."""
    return LossInputs(
        logprobs=logits.log_softmax(0)[None],
        behavior_logprobs=behavior[None],
        proximal_logprobs=proximal[None],
        reference_logprobs=None,
        entropy=None,
        advantages=advantages[None],
        mask=torch.ones(1, len(logits), dtype=torch.bool),
    )


@pytest.mark.parametrize("seed", range(5))
def test_importance_weights_recover_the_gradient_of_the_expected_advantage(seed: int) -> None:
    """Sampling from the behaviour policy, weighing by pi_prox/pi_behav and by pi/pi_prox: exactly grad -E_pi[A]."""
    logits, proximal, behavior, advantages = categorical(seed)
    (expected,) = torch.autograd.grad(-(logits.softmax(0) * advantages).sum(), logits)
    inputs = enumerated(logits, proximal, behavior, advantages)
    loss = PolicyGradient(ratio=True)(inputs).per_token * Decoupled()(inputs).per_token
    (found,) = torch.autograd.grad((behavior.exp() * loss).sum(), logits)
    torch.testing.assert_close(found, expected)
    # With ratios against the behaviour policy itself, no correction is needed for the same result.
    inputs = enumerated(logits, behavior, behavior, advantages)
    loss = PolicyGradient(ratio=True)(inputs).per_token * NoCorrection()(inputs).per_token
    (found,) = torch.autograd.grad((behavior.exp() * loss).sum(), logits)
    torch.testing.assert_close(found, expected)
