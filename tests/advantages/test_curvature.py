"""The mask of CAPO against the step itself: a small output projection, moved and differentiated."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlsys.advantages import AdvantageInputs, Advantages
from rlsys.advantages.adjustments.curvature import CurvatureMask
from rlsys.metrics import reduce

RATE = 0.03


def shifts(weight: Tensor, hidden: Tensor, token: int, advantage: float) -> tuple[float, float, Tensor]:
    """m_H and m_F by automatic differentiation, and the three numbers that the part is given."""

    def objective(w: Tensor) -> Tensor:
        logprob = (w @ hidden).log_softmax(0)[token]
        return advantage * (logprob - (weight @ hidden).log_softmax(0)[token]).exp()

    def logprob(w: Tensor) -> Tensor:
        return (w @ hidden).log_softmax(0)[token]

    gradient = torch.autograd.functional.jacobian(objective, weight)
    step = RATE * gradient
    _, curved = torch.autograd.functional.hvp(objective, weight, step)
    score = torch.autograd.functional.jacobian(logprob, weight)
    p = (weight @ hidden).softmax(0)
    u = torch.nn.functional.one_hot(torch.tensor(token), len(p)) - p
    numbers = torch.stack([hidden @ hidden, u @ u, u @ (p.diag() - p[:, None] * p) @ u])
    return float((gradient * step).sum() + (step * curved).sum() / 2), float((score * step).sum() ** 2 / 2), numbers


def batch(numbers: Tensor) -> AdvantageInputs:
    """One row."""
    mask = torch.ones(1, len(numbers), dtype=torch.bool)
    zero = torch.zeros(1)
    return AdvantageInputs(
        *(zero, zero == 0, mask * 0.0, mask, zero.long(), mask * 0.0, None, None, ("p",)),
        curvature=numbers[None].float(),
    )


def kept(rule: CurvatureMask, inputs: AdvantageInputs, advantages: Tensor) -> Tensor:
    out = rule(inputs, Advantages(advantages))
    assert out.mask is not None
    torch.testing.assert_close(out.advantages, advantages * out.mask)
    return out.mask


@pytest.mark.parametrize("seed", range(6))
def test_shifts_are_those_of_the_step(seed: int) -> None:
    """Every token is kept by a bound just above its own shift, and rejected by one just below."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    hidden = torch.randn(3, generator=generator, dtype=torch.float64)
    advantage = (2.0, -1.5, 0.4, -0.3, 4.0, -4.0)[seed]
    objective, policy, numbers = shifts(weight, hidden, seed % 5, advantage)
    inputs, given = batch(numbers[None]), torch.tensor([[advantage]])
    for name, size in (("objective", abs(objective)), ("policy", policy)):
        wide = {"objective": 1e6, "policy": 1e6, "rate": RATE}
        assert kept(CurvatureMask(**{**wide, name: 1.001 * size}), inputs, given).all()
        assert not kept(CurvatureMask(**{**wide, name: 0.999 * size}), inputs, given).any()


def test_a_worsening_step_is_rejected_where_it_is_not_symmetric() -> None:
    """A large step on a token of negative advantage overshoots: to second order the objective falls."""
    numbers = torch.tensor([[4000.0, 0.5, 0.1]])
    inputs, given = batch(numbers), torch.tensor([[-3.0]])
    wide = {"objective": 1e6, "policy": 1e6, "rate": 0.01}
    assert kept(CurvatureMask(**wide), inputs, given).all()
    assert not kept(CurvatureMask(**wide, symmetric=False), inputs, given).any()


def test_rejected_tokens_are_counted_and_masked_ones_do_not_matter() -> None:
    numbers = torch.tensor([[1.0, 0.5, 0.1], [1e6, 0.5, 0.1], [torch.nan, torch.nan, torch.nan], [1e6, 0.5, 0.1]])
    inputs = batch(numbers)
    inputs = replace(inputs, mask=torch.tensor([[True, True, False, True]]))
    out = CurvatureMask()(inputs, Advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), extras={"a": numbers}))
    assert out.mask is not None
    assert out.mask.tolist() == [[True, False, False, True]]
    assert out.extras["a"] is numbers
    metrics = reduce(out.metrics)
    assert metrics["capo/rejected"] == pytest.approx(1 / 3)
    assert metrics["capo/objective_shift_max"] == pytest.approx(
        1.5e-5 * 0.5e6 + (1.5e-5 * 1e6) ** 2 * (0.25 - 0.1) / 2, rel=1e-5
    )
    empty = replace(inputs, mask=torch.zeros(1, 4, dtype=torch.bool))
    assert reduce(CurvatureMask()(empty, Advantages(torch.zeros(1, 4))).metrics) == {}
