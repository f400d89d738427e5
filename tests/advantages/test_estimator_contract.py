"""Every estimator answers the same questions. New ones are found by themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlsys import advantages
from rlsys.advantages import AdvantageInputs, Advantages, Estimator
from rlsys.registry import discover

ESTIMATORS = discover(advantages, Estimator)


def estimators(keep: Callable[[type[Estimator]], bool] = lambda cls: True) -> pytest.MarkDecorator:
    found = {name: cls for name, cls in ESTIMATORS.items() if keep(cls)}
    return pytest.mark.parametrize("cls", found.values(), ids=found.keys())


every_estimator = estimators()
# Their baseline is none, or not the mean of the batch or group.
WITHOUT_A_MEAN = {"scores", "return-to-go", "greedy-baseline", "tracked-baseline"}


def random_inputs(seed: int, sizes: tuple[int, ...] = (4, 1, 3), width: int = 6) -> AdvantageInputs:
    """Ragged responses with holes in the mask, one unscored row, one row without a trained token."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(sizes)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]) & (torch.rand(rows, width, generator=generator) > 0.2)
    scored = torch.ones(rows, dtype=torch.bool)
    scored[1] = False
    mask[1] = False
    mask[3] = False
    scores = torch.randint(0, 3, (rows,), generator=generator).float() * scored
    token_rewards = torch.zeros(rows, width)
    for row in range(rows):
        if mask[row].any():
            token_rewards[row, int(mask[row].nonzero().max())] = scores[row]

    def noise() -> Tensor:
        return torch.randn(rows, width, generator=generator) * mask

    return AdvantageInputs(
        scores=scores,
        scored=scored,
        token_rewards=token_rewards,
        mask=mask,
        group=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        behavior_logprobs=-noise().abs(),
        reference_logprobs=-noise().abs(),
        values=noise(),
        prompt_ids=tuple(f"prompt-{g}" for g, size in enumerate(sizes) for _ in range(size)),
        greedy=torch.cat([torch.arange(size) == 0 for size in sizes]),
        segments=torch.cat([torch.rand(rows, width, 3, generator=generator), torch.ones(rows, width, 1)], -1),
    )


def mapped(inputs: AdvantageInputs, change) -> AdvantageInputs:  # type: ignore[no-untyped-def]
    """`change(name, tensor)` on every tensor."""
    values = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
    return replace(inputs, **{name: change(name, v) for name, v in values.items() if isinstance(v, Tensor)})


def same(a: Advantages, b: Advantages) -> None:
    torch.testing.assert_close(a.advantages, b.advantages)
    torch.testing.assert_close(a.returns, b.returns)


def test_the_first_four_are_there() -> None:
    assert {"grpo", "rloo", "reinforce", "gae"} <= set(ESTIMATORS)


@every_estimator
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), sizes=st.lists(st.integers(1, 5), min_size=3, max_size=5))
def test_shape_type_and_masked_tokens(cls: type[Estimator], seed: int, sizes: list[int]) -> None:
    inputs = random_inputs(seed, (4, *sizes))
    before = mapped(inputs, lambda _, tensor: tensor.clone())
    out = cls()(inputs)
    for tensor in (out.advantages, out.returns):
        if tensor is not None:
            assert tensor.dtype == torch.float32
            assert tensor.shape == inputs.mask.shape
            assert tensor.isfinite().all()
            assert (tensor[~inputs.mask] == 0).all()
    assert (out.returns is not None) == cls.needs_values
    for field in fields(inputs):
        value = getattr(inputs, field.name)
        assert not isinstance(value, Tensor) or torch.equal(value, getattr(before, field.name)), "an input was changed"


@every_estimator
def test_something_is_learned_from_a_plain_batch(cls: type[Estimator]) -> None:
    assert (cls()(random_inputs(0, (4, 3, 4))).advantages != 0).any()


@every_estimator
def test_nothing_to_train_on(cls: type[Estimator]) -> None:
    inputs = random_inputs(1)
    none = torch.zeros_like(inputs.mask)
    for scored in (inputs.scored, torch.zeros_like(inputs.scored)):
        scores, rewards = inputs.scores * scored, torch.zeros_like(inputs.token_rewards)
        out = cls()(replace(inputs, mask=none, scored=scored, scores=scores, token_rewards=rewards))
        assert (out.advantages == 0).all()


@every_estimator
def test_no_rows(cls: type[Estimator]) -> None:
    empty = mapped(random_inputs(1), lambda _, tensor: tensor[:0])
    assert cls()(replace(empty, prompt_ids=())).advantages.shape == (0, 6)


@estimators(lambda cls: not (cls.needs_values or cls.needs_segments) and cls.name not in WITHOUT_A_MEAN)
def test_equal_scores_everywhere_are_no_preference(cls: type[Estimator]) -> None:
    inputs = random_inputs(2, (4, 3))
    inputs = replace(inputs, scores=torch.where(inputs.scored, 0.1, 0.0))
    assert cls()(inputs).advantages.abs().max() < 1e-6


@every_estimator
def test_padding_does_not_matter(cls: type[Estimator]) -> None:
    inputs = random_inputs(3)
    wide = mapped(inputs, lambda _, t: torch.cat([t, t.new_zeros(len(t), 4, *t.shape[2:])], 1) if t.dim() > 1 else t)
    out, padded = cls()(inputs), cls()(wide)
    torch.testing.assert_close(padded.advantages[:, :6], out.advantages)
    assert (padded.advantages[:, 6:] == 0).all()


@every_estimator
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), order=st.permutations(range(8)))
def test_permuted_rows_give_permuted_results(cls: type[Estimator], seed: int, order: list[int]) -> None:
    inputs = random_inputs(seed)
    rows = torch.tensor(order)
    shuffled = mapped(inputs, lambda _, tensor: tensor[rows])
    shuffled = replace(shuffled, prompt_ids=tuple(inputs.prompt_ids[i] for i in order))
    out, permuted = cls()(inputs), cls()(shuffled)
    torch.testing.assert_close(permuted.advantages, out.advantages[rows])
    if out.returns is not None:
        torch.testing.assert_close(permuted.returns, out.returns[rows])


@every_estimator
def test_group_numbers_are_only_labels(cls: type[Estimator]) -> None:
    inputs = random_inputs(4)
    same(cls()(replace(inputs, group=7 - 2 * inputs.group)), cls()(inputs))


@every_estimator
def test_state_goes_through_json_and_continues_alike(cls: type[Estimator]) -> None:
    original = cls()
    original(random_inputs(5))
    saved = json.loads(json.dumps(original.state_dict()))
    restored = cls()
    restored.load_state_dict(saved)
    assert restored.state_dict() == original.state_dict()
    same(restored(random_inputs(6)), original(random_inputs(6)))
    assert restored.state_dict() == original.state_dict()


@estimators(lambda cls: not cls().state_dict())
def test_a_stateless_estimator_refuses_state(cls: type[Estimator]) -> None:
    with pytest.raises(ValueError, match="keeps no state"):
        cls().load_state_dict({"baseline": 1.0})
