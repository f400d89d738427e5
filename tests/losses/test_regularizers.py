"""KL estimators and entropy: values, and expected gradients by enumeration of a categorical policy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlsys.losses import LossInputs
from rlsys.losses.regularizers.entropy import Entropy
from rlsys.losses.regularizers.kl import KL
from rlsys.metrics import reduce

SEEDS = range(5)


def toy(seed: int) -> tuple[Tensor, Tensor]:
    """Logits with gradient, and reference log-probs, of a policy over six actions."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    return logits, torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0)


def enumerated(logprobs: Tensor, reference: Tensor) -> LossInputs:
    zeros = torch.zeros_like(logprobs)[None]
    return LossInputs(
        logprobs=logprobs[None],
        behavior_logprobs=zeros,
        proximal_logprobs=zeros,
        reference_logprobs=reference[None],
        entropy=None,
        advantages=zeros,
        mask=torch.ones(1, len(logprobs), dtype=torch.bool),
    )


def expected_loss(part: KL, logits: Tensor, reference: Tensor) -> Tensor:
    """On-policy expectation of the loss; the sampling distribution itself carries no gradient."""
    logprobs = logits.log_softmax(0)
    return (logprobs.exp().detach() * part(enumerated(logprobs, reference)).per_token[0]).sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities, by definition."""
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_expected_gradients(seed: int) -> None:
    logits, reference = toy(seed)
    logprobs = logits.log_softmax(0)
    (reverse,) = torch.autograd.grad(kl(logprobs, reference), logits, retain_graph=True)
    (forward,) = torch.autograd.grad(kl(reference, logprobs), logits)
    for estimator, gradient in (("k1", torch.zeros(6).double()), ("k2", reverse), ("k3", forward)):
        loss = expected_loss(KL(coefficient=1.0, estimator=estimator), logits, reference)  # type: ignore[arg-type]
        (found,) = torch.autograd.grad(loss, logits)
        torch.testing.assert_close(found, gradient, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_k1_and_k3_have_the_value_of_the_kl_and_k2_nearly(seed: int) -> None:
    logits, reference = toy(seed)
    exact = kl(logits.log_softmax(0), reference)
    for estimator in ("k1", "k3"):
        found = expected_loss(KL(coefficient=1.0, estimator=estimator), logits, reference)
        torch.testing.assert_close(found, exact)
    near = logits.log_softmax(0).detach() + 0.01 * reference
    close_by = expected_loss(KL(coefficient=1.0, estimator="k2"), logits, near.log_softmax(0))
    torch.testing.assert_close(close_by, kl(logits.log_softmax(0), near.log_softmax(0)), rtol=0.05, atol=0)


@pytest.mark.parametrize(("estimator", "value"), [("k1", 0.7), ("k2", 0.7**2 / 2), ("k3", math.exp(-0.7) - 1 + 0.7)])
def test_values_by_hand_in_the_loss_and_in_the_reward(estimator: str, value: float) -> None:
    inputs = enumerated(torch.tensor([-1.0, -1.0]), torch.tensor([-1.7, -9.0]))
    inputs.mask[0, 1] = False
    part = KL(coefficient=0.5, estimator=estimator)  # type: ignore[arg-type]
    out = part(inputs)
    torch.testing.assert_close(out.per_token, torch.tensor([[0.5 * value, 0.0]]))
    assert reduce(out.metrics) == {f"reference/kl_{estimator}": pytest.approx(value)}
    assert inputs.reference_logprobs is not None
    reward = part.reward(inputs.logprobs, inputs.reference_logprobs, inputs.mask)
    torch.testing.assert_close(reward, torch.tensor([[-0.5 * value, 0.0]]))


def test_no_difference_no_kl() -> None:
    for estimator in ("k1", "k2", "k3"):
        part = KL(coefficient=1.0, estimator=estimator)
        same = torch.tensor([-0.5, -3.0])
        assert part(enumerated(same, same)).per_token.tolist() == [[0.0, 0.0]]


def test_k3_is_bounded() -> None:
    logprobs = torch.tensor([-500.0, 0.0], requires_grad=True)
    out = KL(coefficient=1.0, estimator="k3")(enumerated(logprobs, torch.tensor([0.0, -500.0])))
    out.per_token.sum().backward()
    assert out.per_token.tolist() == [[10.0, 10.0]]
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [0.0, 0.0]


def test_entropy_is_rewarded() -> None:
    entropy = torch.tensor([[0.5, 2.0, 7.0]], requires_grad=True)
    zeros = torch.zeros(1, 3)
    mask = torch.tensor([[True, True, False]])
    out = Entropy(coefficient=0.1)(LossInputs(zeros, zeros, zeros, None, entropy, zeros, mask))
    torch.testing.assert_close(out.per_token, torch.tensor([[-0.05, -0.2, 0.0]]))
    assert reduce(out.metrics) == {"policy/entropy": pytest.approx(1.25)}
    out.per_token.sum().backward()
    torch.testing.assert_close(entropy.grad, torch.tensor([[-0.1, -0.1, 0.0]]))
