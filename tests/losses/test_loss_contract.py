"""Every policy loss, correction and regulariser answers the same questions. New ones are found by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from rlsys.losses import Correction, Loss, LossInputs, Regularizer, TokenLoss, corrections, policy, regularizers
from rlsys.metrics import merge, reduce
from rlsys.metrics.catalog import find
from rlsys.registry import discover

LOSSES = discover(policy, Loss)
CORRECTIONS = discover(corrections, Correction)
REGULARIZERS = discover(regularizers, Regularizer)
IN_LOSS = {name: cls for name, cls in REGULARIZERS.items() if cls.in_reward is False}
ADDED: dict[str, Callable[[], Any]] = {**LOSSES, **IN_LOSS}
added = pytest.mark.parametrize("make", ADDED.values(), ids=ADDED.keys())
correction = pytest.mark.parametrize("make", CORRECTIONS.values(), ids=CORRECTIONS.keys())
EXTRAS = sorted({name for cls in ADDED.values() for name in cls.needs_extras})
every = pytest.mark.parametrize("make", [*ADDED.values(), *CORRECTIONS.values()], ids=[*ADDED, *CORRECTIONS])


def random_inputs(seed: int = 0, rows: int = 6, width: int = 5) -> LossInputs:
    """Everything carries a gradient, so that what must not be differentiated shows. Row 2 is fully masked."""
    generator = torch.Generator().manual_seed(seed)

    def normal(shift: float = 0.0) -> Tensor:
        return (0.5 * torch.randn(rows, width, generator=generator) + shift).requires_grad_()

    mask = torch.rand(rows, width, generator=generator) > 0.3
    mask[2] = False
    return LossInputs(
        logprobs=normal(-2),
        behavior_logprobs=normal(-2),
        proximal_logprobs=normal(-2),
        reference_logprobs=normal(-2),
        entropy=normal(1),
        advantages=normal(),
        mask=mask,
        group=torch.arange(rows) // 3,
        expert=torch.arange(rows) % 2 == 1,
        extras={name: torch.rand(rows, width, generator=generator) for name in EXTRAS},
    )


def prepared(part: Any, inputs: LossInputs) -> LossInputs:
    """With what the part finds out of the whole batch, as before an update."""
    plain = mapped(inputs, lambda tensor: tensor.detach())
    blanked = replace(
        plain,
        logprobs=plain.logprobs.masked_fill(~plain.mask, 0),
        advantages=plain.advantages.masked_fill(~plain.mask, 0),
    )
    with torch.no_grad():
        found = {name: extra.float() for name, extra in part.prepare(blanked).items()}
    for name, extra in found.items():
        assert extra.shape == inputs.mask.shape, name
        assert extra[inputs.mask].isfinite().all(), name
    return replace(inputs, extras={**inputs.extras, **found})


def applied(make: Callable[[], Any], inputs: LossInputs) -> TokenLoss:
    part = make()
    out: TokenLoss = part(prepared(part, inputs))
    return out


def mapped(inputs: LossInputs, change: Callable[[Tensor], Tensor]) -> LossInputs:
    values = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    changed = {name: change(value) for name, value in values.items() if isinstance(value, Tensor)}
    extras = {name: change(extra) for name, extra in inputs.extras.items()}
    return replace(inputs, **changed, extras=extras)


def picker(rows: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor[rows]


def test_the_first_ones_are_there() -> None:
    assert {"ppo-clip", "policy-gradient"} <= set(LOSSES)
    assert {"none", "truncated-importance", "decoupled"} <= set(CORRECTIONS)
    assert {"kl", "entropy"} <= set(REGULARIZERS)


@every
def test_shape_type_and_finite_metrics(make: Callable[[], Any]) -> None:
    inputs = random_inputs()
    out: TokenLoss = applied(make, inputs)
    assert out.per_token.shape == inputs.mask.shape
    assert out.per_token.dtype == torch.float32
    assert out.per_token.isfinite().all()
    assert all(math.isfinite(value) for value in reduce(out.metrics).values())
    assert [name for name in out.metrics if find(name) is None] == [], "define them in rlsys/metrics/catalog.py"


@added
def test_zero_where_masked_and_a_gradient_elsewhere(make: Callable[[], Any]) -> None:
    inputs = random_inputs()
    out: TokenLoss = applied(make, inputs)
    assert (out.per_token[~inputs.mask] == 0).all()
    assert inputs.entropy is not None
    gradients = torch.autograd.grad(out.per_token.sum(), [inputs.logprobs, inputs.entropy], allow_unused=True)
    given = [gradient for gradient in gradients if gradient is not None]
    assert given, "the loss depends on neither log-probs nor entropy"
    for gradient in given:
        assert gradient.isfinite().all()
        assert (gradient[~inputs.mask] == 0).all()
    assert any((gradient != 0).any() for gradient in given)


@correction
def test_a_weight_is_detached_and_not_negative(make: Callable[[], Any]) -> None:
    out: TokenLoss = make()(random_inputs())
    assert not out.per_token.requires_grad
    assert (out.per_token >= 0).all()


@correction
def test_a_weight_is_one_where_sampler_and_learner_agree(make: Callable[[], Any]) -> None:
    inputs = random_inputs()
    logprobs = inputs.logprobs.detach()
    out = make()(replace(inputs, behavior_logprobs=logprobs, proximal_logprobs=logprobs))
    torch.testing.assert_close(out.per_token, torch.ones_like(out.per_token))


@every
def test_rows_do_not_know_of_each_other(make: Callable[[], Any]) -> None:
    """Micro-batches give what the whole gives, in losses and in metrics."""
    inputs = prepared(make(), mapped(random_inputs(1), lambda tensor: tensor.detach()))
    whole: TokenLoss = make()(inputs)
    cuts = (torch.tensor(rows) for rows in ([0, 2], [5], [1, 3, 4]))
    parts: list[TokenLoss] = [make()(mapped(inputs, rows_of)) for rows_of in map(picker, cuts)]
    joined = torch.cat([part.per_token for part in parts])[[0, 3, 1, 4, 5, 2]]
    torch.testing.assert_close(joined, whole.per_token)
    assert reduce(merge(part.metrics for part in parts)) == pytest.approx(reduce(whole.metrics), rel=1e-5, abs=1e-6)


@every
def test_nothing_to_train_on(make: Callable[[], Any]) -> None:
    inputs = random_inputs()
    out: TokenLoss = applied(make, replace(inputs, mask=torch.zeros_like(inputs.mask)))
    assert reduce(out.metrics) == {}
    empty: TokenLoss = applied(make, mapped(inputs, lambda tensor: tensor[:0]))
    assert empty.per_token.shape == (0, 5)


@every
@pytest.mark.parametrize("gap", [-1e3, 1e3])
def test_extreme_log_probs_stay_finite(make: Callable[[], Any], gap: float) -> None:
    inputs = random_inputs()
    for name in ("logprobs", "behavior_logprobs", "proximal_logprobs", "reference_logprobs"):
        shifted = replace(inputs, **{name: getattr(inputs, name).detach() + gap})
        logprobs = shifted.logprobs.detach().requires_grad_()
        out: TokenLoss = applied(make, replace(shifted, logprobs=logprobs))
        assert out.per_token.isfinite().all()
        if out.per_token.requires_grad:
            (gradient,) = torch.autograd.grad(out.per_token.sum(), [logprobs], allow_unused=True)
            assert gradient is None or gradient.isfinite().all()


@every
def test_log_probs_that_were_rounded_to_bfloat16(make: Callable[[], Any]) -> None:
    """A model in bfloat16 gives coarse log-probs: near 16 they are 1/8 apart, and equal ones differ. All stays finite,
    and what is given in bfloat16 itself comes to the same as in float32, but for its own rounding."""
    inputs = mapped(random_inputs(), lambda t: t.detach().bfloat16().float() if t.is_floating_point() else t.detach())
    ready = prepared(make(), inputs)
    wide: TokenLoss = make()(ready)
    narrow: TokenLoss = make()(mapped(ready, lambda t: t.bfloat16() if t.is_floating_point() else t))
    assert wide.per_token.isfinite().all()
    torch.testing.assert_close(narrow.per_token.float(), wide.per_token, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("make", REGULARIZERS.values(), ids=REGULARIZERS.keys())
def test_a_regulariser_scales_with_its_coefficient(make: Callable[..., Any]) -> None:
    inputs = random_inputs()
    one, two, none = (applied(partial(make, coefficient=c), inputs).per_token for c in (1.0, 2.0, 0.0))
    torch.testing.assert_close(two, 2 * one)
    assert (none == 0).all()
