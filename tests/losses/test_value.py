"""The critic's loss against a loop over plain numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.losses.value import value_loss
from rlsys.metrics import reduce


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), clip=st.sampled_from([None, 0.1, 0.5, 5.0]))
def test_value_loss(seed: int, clip: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = torch.randn(3, 3, 4, generator=generator)
    mask = torch.rand(3, 4, generator=generator) > 0.3
    out = value_loss(values, old, returns, mask, clip)
    expected = np.zeros((3, 4))
    clipped = 0
    for index in np.ndindex(3, 4):
        if not mask[index]:
            continue
        value, before, target = float(values[index]), float(old[index]), float(returns[index])
        error = (value - target) ** 2
        if clip is not None:
            bounded = min(max(value, before - clip), before + clip)
            clipped += (bounded - target) ** 2 > error
            error = max(error, (bounded - target) ** 2)
        expected[index] = error / 2
    np.testing.assert_allclose(out.per_token, expected, rtol=1e-4, atol=1e-6)
    metrics = reduce(out.metrics)
    if clip is not None and mask.any():
        assert metrics["critic/clip_fraction"] == pytest.approx(clipped / int(mask.sum()))


@pytest.mark.parametrize(
    ("value", "slope"),
    [
        (0.1, 0.1 - 1.0),  # inside the bounds
        (0.5, 0.0),  # has moved further towards the target than 0.2: no more
        (-0.5, -0.5 - 1.0),  # has moved away: pulled back
    ],
)
def test_gradient(value: float, slope: float) -> None:
    values = torch.tensor([[value]], requires_grad=True)
    one = torch.ones(1, 1)
    value_loss(values, 0 * one, one, one.bool(), clip=0.2).per_token.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[slope]]))
