"""Published losses against loops over plain numbers, written from the formulas, and against each other's identities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys.losses import Loss, LossInputs
from rlsys.losses.policy.cispo import CISPO
from rlsys.losses.policy.copg import CoPG
from rlsys.losses.policy.covariance import ClipCov, KLCov
from rlsys.losses.policy.discovered import DiscoveredPO
from rlsys.losses.policy.gmpo import GMPO
from rlsys.losses.policy.gspo import GSPO
from rlsys.losses.policy.mirror_descent import MirrorDescent
from rlsys.losses.policy.nft import NFT
from rlsys.losses.policy.pairwise_ppo import PairwisePPO
from rlsys.losses.policy.rec import REC
from rlsys.losses.policy.regression import TRPA, OptimalAdvantageRegression, RegGRPO
from rlsys.losses.regularizers.proximity import Proximity
from rlsys.types import Progress

ROWS, WIDTH = 6, 4
GROUP = torch.tensor([0, 0, 0, 1, 1, 2])  # the last is a group of one


def random_inputs(seed: int = 0, spread: float = 0.4, on_policy: bool = False) -> LossInputs:
    """Ragged rows, one fully masked, one advantage per row. float64, so that finite differences are exact enough."""
    generator = torch.Generator().manual_seed(seed)

    def normal(scale: float) -> Tensor:
        return scale * torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)

    old = normal(0.5) - 2
    mask = torch.arange(WIDTH) < torch.tensor([4, 2, 3, 1, 0, 4])[:, None]
    rewards = torch.tensor([1.0, 0.0, 0.5, 1.0, 0.0, 1.0], dtype=torch.float64)[:, None]
    return LossInputs(
        logprobs=old.clone() if on_policy else old + normal(spread),
        behavior_logprobs=old,
        proximal_logprobs=old,
        reference_logprobs=normal(0.5) - 2,
        entropy=None,
        advantages=(rewards - 0.4).expand(ROWS, WIDTH) * mask,
        mask=mask,
        group=GROUP,
        progress=Progress(3, 10),
    )


def applied(loss: Any, inputs: LossInputs) -> Tensor:
    with torch.no_grad():
        extras = loss.prepare(inputs)
    return loss(replace(inputs, extras={**inputs.extras, **extras})).per_token


def gradient(loss: Loss, inputs: LossInputs, weights: Tensor) -> np.ndarray:
    """Of sum(per-token loss * weights) by the log-probs, as the learner computes it."""
    leaf = inputs.logprobs.clone().requires_grad_()
    with torch.no_grad():
        extras = loss.prepare(inputs)
    per_token = loss(replace(inputs, logprobs=leaf, extras={**inputs.extras, **extras})).per_token
    (found,) = torch.autograd.grad((per_token * weights).sum(), leaf)
    return found.numpy()


def slopes(objective: Callable[[np.ndarray], float], logprobs: Tensor) -> np.ndarray:
    """The gradient of `objective` by central differences."""
    x, out, h = logprobs.numpy().copy(), np.zeros(logprobs.shape), 1e-5
    for place in np.ndindex(*x.shape):
        kept = x[place]
        x[place] = kept + h
        above = objective(x)
        x[place] = kept - h
        out[place] = (above - objective(x)) / (2 * h)
        x[place] = kept
    return out


def rows_mean(mask: Tensor) -> Tensor:
    """Weights of sequence-mean-token-sum."""
    return mask.double() / mask.any(1).sum()


def rows_mean_of_means(mask: Tensor) -> Tensor:
    return mask.double() / mask.sum(1, keepdim=True).clamp(min=1) / mask.any(1).sum()


def numbers(inputs: LossInputs) -> tuple[np.ndarray, ...]:
    arrays = (inputs.logprobs, inputs.proximal_logprobs, inputs.advantages, inputs.mask)
    return tuple(array.numpy() for array in arrays)


# ---- by token -----------------------------------------------------------------------------------------------------


def check(loss: Any, rule: Callable[[float, float, float], float], seed: int = 0) -> None:
    """`rule(log pi, log pi_old, A)` is the loss of a token."""
    inputs = random_inputs(seed)
    new, old, advantages, mask = numbers(inputs)
    expected = np.zeros(mask.shape)
    for place in np.argwhere(mask):
        p = tuple(place)
        expected[p] = rule(new[p], old[p], advantages[p])
    np.testing.assert_allclose(applied(loss, inputs).numpy(), expected, rtol=1e-6)


def test_cispo() -> None:
    def rule(new: float, old: float, advantage: float) -> float:
        return -min(max(math.exp(new - old), 0.7), 1.2) * advantage * new

    check(CISPO(low=0.3, high=0.2), rule)
    inputs = random_inputs()
    weight = np.clip(np.exp(inputs.logprobs - inputs.proximal_logprobs).numpy(), 0.7, 1.2)
    expected = -weight * inputs.advantages.numpy()  # the weight has no gradient
    np.testing.assert_allclose(gradient(CISPO(low=0.3, high=0.2), inputs, inputs.mask.double()), expected, rtol=1e-6)


def test_mirror_descent() -> None:
    def rule(new: float, old: float, advantage: float) -> float:
        ratio = math.exp(new - old)
        return -ratio * advantage + (ratio * math.log(ratio) - ratio + 1) / (2 * 0.7)  # t_k = 2 * (1 - 3/10)

    check(MirrorDescent(step_size=2.0), rule)
    last = replace(random_inputs(), progress=Progress(10, 10))
    assert applied(MirrorDescent(smallest=0.5), last).isfinite().all()


def test_mirror_descents_kl_is_the_kl() -> None:
    """Enumerated over a toy vocabulary, the estimate is KL(pi || pi_old) in value and in gradient."""
    old = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    logits = torch.tensor([0.1, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    new = logits.log_softmax(0)
    mask = torch.ones(3, 1, dtype=torch.bool)
    zero = torch.zeros(3, 1, dtype=torch.float64)
    inputs = LossInputs(new[:, None], old[:, None], old[:, None], None, None, zero, mask)
    estimate = (old.exp() * MirrorDescent(anneal=False)(inputs).per_token[:, 0]).sum()
    exact = (new.exp() * (new - old)).sum()
    torch.testing.assert_close(estimate, exact)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (estimate, exact)))


def test_discovered_po() -> None:
    def rule(new: float, old: float, advantage: float) -> float:
        ratio = math.exp(new - old)
        if advantage >= 0:
            x = (ratio - 1) * advantage
            drift = max(0.0, x - 2 * math.tanh(x / 2))
        else:
            x = math.log(ratio) * advantage
            drift = max(0.0, x - 0.6 * math.tanh(x / 0.6))
        return -(ratio * advantage - drift)

    check(DiscoveredPO(), rule)
    check(DiscoveredPO(), rule, seed=1)


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("side", ["one", "two", "ring"])
def test_rec(side: Any, importance: bool) -> None:
    def rule(new: float, old: float, advantage: float) -> float:
        ratio = math.exp(new - old)
        kept = {
            "one": ratio <= 1.1 if advantage > 0 else ratio >= 0.8,
            "two": 0.8 <= ratio <= 1.1,
            "ring": 0.8 <= ratio <= 1.1 or (advantage > 0 and ratio < 0.7) or (advantage < 0 and ratio > 1.3),
        }[side]
        return -advantage * (ratio if importance else new) if kept else 0.0

    check(REC(side=side, importance=importance, low=0.2, high=0.1, outer_low=0.3, outer_high=0.3), rule)


def test_rec_one_side_with_importance_has_the_gradient_of_ppos_clip() -> None:
    from rlsys.losses.policy.ppo_clip import PPOClip

    inputs = random_inputs(2)
    weights = inputs.mask.double()
    np.testing.assert_allclose(
        gradient(REC(importance=True), inputs, weights), gradient(PPOClip(), inputs, weights), rtol=1e-6, atol=1e-12
    )


def test_proximity() -> None:
    check(Proximity(coefficient=0.3), lambda new, old, advantage: 0.3 * (new - old) ** 2 / 2)
    assert (gradient(Proximity(), random_inputs(on_policy=True), torch.ones(ROWS, WIDTH)) == 0).all()


# ---- by response --------------------------------------------------------------------------------------------------


def test_gspo() -> None:
    inputs = random_inputs(spread=0.1)
    new, old, advantages, mask = numbers(inputs)
    low, high = 0.02, 0.03
    expected, wanted = np.zeros(mask.shape), np.zeros(mask.shape)
    for row in np.flatnonzero(mask.any(1)):
        ratio = math.exp((new[row] - old[row])[mask[row]].mean())
        for t in np.flatnonzero(mask[row]):
            a = advantages[row, t]
            plain, clipped = -a * ratio, -a * min(max(ratio, 1 - low), 1 + high)
            expected[row, t] = max(plain, clipped)
            wanted[row, t] = plain if plain >= clipped else 0.0  # d ratio / d log pi = ratio
    loss = GSPO(low=low, high=high)
    np.testing.assert_allclose(applied(loss, inputs).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(gradient(loss, inputs, inputs.mask.double()), wanted, rtol=1e-6)
    assert len(np.unique(wanted != 0)) == 2, "some are clipped, some are not"


def test_gspos_gradient_is_that_of_the_sequence_ratio() -> None:
    """With the mean over tokens, the token form is the gradient of s_i * A."""
    inputs = random_inputs(1, spread=0.1)
    _, old, advantages, mask = numbers(inputs)
    rows = np.flatnonzero(mask.any(1))

    def objective(new: np.ndarray) -> float:
        ratios = [math.exp((new[r] - old[r])[mask[r]].mean()) for r in rows]
        return -sum(ratio * advantages[r, 0] for ratio, r in zip(ratios, rows, strict=True)) / len(rows)

    found = gradient(GSPO(low=1.0, high=10.0), inputs, rows_mean_of_means(inputs.mask))
    np.testing.assert_allclose(found, slopes(objective, inputs.logprobs), atol=1e-8)


def test_gmpo() -> None:
    inputs = random_inputs()
    _, old, advantages, mask = numbers(inputs)
    rows = np.flatnonzero(mask.any(1))

    def objective(new: np.ndarray) -> float:
        total = 0.0
        for r in rows:
            a = advantages[r, 0]
            logs = [
                min(x, max(min(x, 0.3), -0.3)) if a > 0 else max(x, max(min(x, 0.3), -0.3))
                for x in (new[r] - old[r])[mask[r]]
            ]
            total -= a * math.exp(sum(logs) / len(logs))
        return total / len(rows)

    loss, weights = GMPO(low=0.3, high=0.3), rows_mean_of_means(inputs.mask)
    assert float((applied(loss, inputs) * weights).sum()) == pytest.approx(objective(inputs.logprobs.numpy()))
    np.testing.assert_allclose(gradient(loss, inputs, weights), slopes(objective, inputs.logprobs), atol=1e-8)


def pairs_of(mask: np.ndarray) -> list[tuple[int, int]]:
    rows = [r for r in range(ROWS) if mask[r].any()]
    return [(i, j) for i in rows for j in rows if i != j and GROUP[i] == GROUP[j]]


def test_copg_is_the_gradient_of_its_objective() -> None:
    """All pairs of a group, each response's own divided by their number: equation 17 in both directions of a pair."""
    inputs = random_inputs()
    _, _, advantages, mask = numbers(inputs)
    assert inputs.reference_logprobs is not None
    reference, beta = inputs.reference_logprobs.numpy(), 0.3
    pairs, rows = pairs_of(mask), int(mask.any(1).sum())

    def objective(new: np.ndarray) -> float:
        d = [(new[r] - reference[r])[mask[r]].sum() for r in range(ROWS)]
        total = 0.0
        for i, j in pairs:
            share = sum(1 for pair in pairs if pair[0] == i)
            ri, rj = advantages[i, 0] - beta / 2 * d[i], advantages[j, 0] - beta / 2 * d[j]
            total += ((ri - rj) * d[i] + (rj - ri) * d[j]) / share / 2  # each pair stands in the list twice
        return -total / rows

    found = gradient(CoPG(coefficient=beta), inputs, rows_mean(inputs.mask))
    np.testing.assert_allclose(found, slopes(objective, inputs.logprobs), atol=1e-7)


def test_copg_on_policy_is_rloo_with_the_kl_in_the_reward() -> None:
    inputs = random_inputs(on_policy=True)
    _, _, advantages, mask = numbers(inputs)
    assert inputs.reference_logprobs is not None
    d = [(inputs.logprobs - inputs.reference_logprobs).numpy()[r][mask[r]].sum() for r in range(ROWS)]
    regularised = [advantages[r, 0] - 0.3 * d[r] for r in range(ROWS)]
    expected = np.zeros(mask.shape)
    for r in range(ROWS):
        others = [regularised[j] for i, j in pairs_of(mask) if i == r]
        if others:
            expected[r] = -(regularised[r] - sum(others) / len(others)) * mask[r]
    np.testing.assert_allclose(gradient(CoPG(coefficient=0.3), inputs, torch.ones(ROWS, WIDTH)), expected, rtol=1e-6)


@pytest.mark.parametrize("ratios", ["separate", "joint"])
def test_pairwise_ppo_is_the_gradient_of_its_objective(ratios: Any) -> None:
    inputs = random_inputs(3, spread=0.08)
    _, old, advantages, mask = numbers(inputs)
    pairs, clip = pairs_of(mask), 0.1

    def objective(new: np.ndarray) -> float:
        d = [(new[r] - old[r])[mask[r]].sum() for r in range(ROWS)]
        total = 0.0
        for i, j in pairs:
            share = sum(1 for pair in pairs if pair[0] == i)
            a = (advantages[i, 0] - advantages[j, 0]) / 2
            u = math.exp(d[i]) if ratios == "separate" else math.exp(d[i] - d[j])
            value = min(u * a, min(max(u, 1 - clip), 1 + clip) * a)
            total += value / share / (1 if ratios == "separate" else 2)
        return -total / int(mask.any(1).sum())

    found = gradient(PairwisePPO(ratios=ratios, clip=clip), inputs, rows_mean(inputs.mask))
    np.testing.assert_allclose(found, slopes(objective, inputs.logprobs), atol=1e-7)
    assert (found[mask] == 0).any()


@pytest.mark.parametrize("ratios", ["separate", "joint"])
def test_pairwise_ppo_on_policy_is_half_of_rloo(ratios: Any) -> None:
    inputs = random_inputs(on_policy=True)
    _, _, advantages, mask = numbers(inputs)
    found = gradient(PairwisePPO(ratios=ratios), inputs, torch.ones(ROWS, WIDTH))
    others = [[advantages[j, 0] for i, j in pairs_of(mask) if i == r] for r in range(ROWS)]
    rloo = [advantages[r, 0] - sum(o) / len(o) if (o := others[r]) else 0 for r in range(ROWS)]
    np.testing.assert_allclose(found, -0.5 * np.array(rloo)[:, None] * mask, rtol=1e-6, atol=1e-12)


def test_reg_grpo_is_the_gradient_of_its_objective() -> None:
    inputs = random_inputs()
    _, old, advantages, mask = numbers(inputs)
    rows = [r for r in range(ROWS) if mask[r].any()]

    def objective(new: np.ndarray) -> float:
        d = {r: (new[r] - old[r])[mask[r]].sum() for r in rows}
        total = 0.0
        for r in rows:
            mates = np.array([d[s] for s in rows if GROUP[s] == GROUP[r]])
            total += (advantages[r, 0] - (d[r] - mates.mean()) / (mates.std() + 0.5)) ** 2
        return total / len(rows)

    found = gradient(RegGRPO(floor=0.5), inputs, rows_mean(inputs.mask))
    np.testing.assert_allclose(found, slopes(objective, inputs.logprobs), atol=1e-6)
    assert np.isfinite(gradient(RegGRPO(), random_inputs(on_policy=True), rows_mean(inputs.mask))).all()


def test_optimal_advantage_regression() -> None:
    inputs = random_inputs()
    _, _, advantages, mask = numbers(inputs)
    assert inputs.reference_logprobs is not None
    reference = inputs.reference_logprobs.numpy()
    rows = np.flatnonzero(mask.any(1))

    def objective(new: np.ndarray) -> float:
        return sum((0.2 * (new[r] - reference[r])[mask[r]].sum() - advantages[r, 0]) ** 2 for r in rows) / len(rows)

    loss, weights = OptimalAdvantageRegression(beta=0.2), rows_mean(inputs.mask)
    assert float((applied(loss, inputs) * weights).sum()) == pytest.approx(objective(inputs.logprobs.numpy()))
    np.testing.assert_allclose(gradient(loss, inputs, weights), slopes(objective, inputs.logprobs), atol=1e-8)


def test_trpa_is_the_gradient_of_its_objective() -> None:
    inputs = random_inputs()
    _, old, levels, mask = numbers(inputs)
    rows = [r for r in range(ROWS) if mask[r].any()]

    def objective(new: np.ndarray) -> float:
        d = {r: (new[r] - old[r])[mask[r]].mean() for r in rows}
        total = 0.0
        for g in {int(GROUP[r]) for r in rows}:
            mates = [r for r in rows if GROUP[r] == g]
            best = max(levels[r, 0] for r in mates)
            losses = [
                math.log(1 + math.exp(-0.3 * (2.5 if levels[i, 0] == best else 1) * (d[i] - d[j])))
                for i in mates
                for j in mates
                if levels[i, 0] > levels[j, 0]
            ]
            total += sum(losses) / max(1, len(losses))
        return total / len({int(GROUP[r]) for r in rows})

    found = gradient(TRPA(beta=0.3), inputs, rows_mean_of_means(inputs.mask))
    np.testing.assert_allclose(found, slopes(objective, inputs.logprobs), atol=1e-8)


# ---- negative-aware fine-tuning -----------------------------------------------------------------------------------


def nft_inputs(rate: float, weight: float, on_policy: bool = False) -> LossInputs:
    inputs = random_inputs(on_policy=on_policy)
    right = torch.tensor([1.0, 0, 0, 1, 0, 1], dtype=torch.float64)[:, None].expand(ROWS, WIDTH)
    full = torch.ones(ROWS, WIDTH, dtype=torch.float64)
    return replace(inputs, extras={"solve_rate": rate * full, "prompt_weight": weight * full, "right": right})


def test_nft_and_its_straight_through_floor() -> None:
    inputs = nft_inputs(0.25, 0.6)
    new, old, _, mask = numbers(inputs)
    right = inputs.extras["right"].numpy() > 0
    loss, slope = np.zeros(mask.shape), np.zeros(mask.shape)
    for place in np.argwhere(mask):
        p = tuple(place)
        ratio = math.exp(new[p] - old[p])
        if right[p]:
            loss[p], slope[p] = -0.6 * math.log(ratio), -0.6
        else:
            implied = (1 - 0.25 * ratio) / 0.75
            loss[p] = -0.6 * math.log(max(implied, 1.0))
            slope[p] = 0.6 * (0.25 * ratio / 0.75) / max(implied, 1.0)
    np.testing.assert_allclose(applied(NFT(), inputs).numpy(), loss, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(gradient(NFT(), inputs, inputs.mask.double()), slope, rtol=1e-6)
    assert (loss[mask & ~right] == 0).any()
    assert (loss[mask & ~right] > 0).sum() == 0


@pytest.mark.parametrize("rate", [0.125, 0.5, 0.75])
def test_nft_on_policy_is_grpo(rate: float) -> None:
    """w = 1 - r: mean-centred advantages; w = sqrt((1 - r) / r): over the population deviation too."""
    deviation = math.sqrt(rate * (1 - rate))
    for weight, scale in ((1 - rate, 1.0), (math.sqrt((1 - rate) / rate), 1 / deviation)):
        inputs = nft_inputs(rate, weight, on_policy=True)
        advantages = (inputs.extras["right"].numpy() - rate) * scale
        found = gradient(NFT(), inputs, inputs.mask.double())
        np.testing.assert_allclose(found, -advantages * inputs.mask.numpy(), rtol=1e-6)


# ---- covariance ---------------------------------------------------------------------------------------------------


def covariances(inputs: LossInputs) -> np.ndarray:
    new, _, advantages, mask = numbers(inputs)
    out = np.full(mask.shape, -np.inf)
    out[mask] = (new[mask] - new[mask].mean()) * (advantages[mask] - advantages[mask].mean())
    return out


def test_kl_cov() -> None:
    inputs = random_inputs()
    new, old, advantages, mask = numbers(inputs)
    cov = covariances(inputs)
    worst = np.argsort(cov, axis=None)[::-1][: int(0.3 * mask.sum())]
    expected = np.where(mask, -advantages * np.exp(new - old), 0)
    expected.flat[worst] += 0.7 * np.abs(new - old).flat[worst]
    np.testing.assert_allclose(applied(KLCov(fraction=0.3, coefficient=0.7), inputs).numpy(), expected, rtol=1e-6)


def test_clip_cov_holds_as_many_as_asked_and_only_those_in_the_band() -> None:
    inputs = random_inputs(spread=0.05)
    cov = covariances(inputs)
    loss = ClipCov(fraction=0.2, lowest=0.0, highest=0.2)
    held = loss.prepare(inputs)["held"].numpy() > 0
    assert held.sum() == int(0.2 * int(inputs.mask.sum()))
    assert ((cov[held] > 0) & (cov[held] < 0.2)).all()
    per_token = applied(ClipCov(fraction=0.2, lowest=0.0, highest=0.2), inputs).numpy()
    assert (per_token[held] == 0).all()
    free = inputs.mask.numpy() & ~held & (inputs.advantages.numpy() != 0)
    assert (per_token[free] != 0).all()


def test_clip_covs_draw_changes_with_every_update_and_resumes() -> None:
    inputs = random_inputs(spread=0.05)
    loss = ClipCov(fraction=0.15, lowest=0.0, highest=9.0)
    draws = [loss.prepare(inputs)["held"] for _ in range(6)]
    assert len({tuple(draw.flatten().tolist()) for draw in draws}) > 1
    again = ClipCov(fraction=0.15, lowest=0.0, highest=9.0)
    again.load_state_dict({"updates": 3})
    torch.testing.assert_close(again.prepare(inputs)["held"], draws[3])
