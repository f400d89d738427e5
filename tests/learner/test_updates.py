"""Optimizer updates: equal to plain torch AdamW, repeatable to the bit, and refused as a whole when not finite."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlsys.errors import NonFiniteError

pytestmark = pytest.mark.slow
LAYOUTS = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]  # ranks, ZeRO stage
OFFLOADED = [(1, 2), (2, 3)]
OPTIMIZER = {
    "learning_rate": 0.01,
    "betas": (0.8, 0.9),
    "eps": 1e-3,  # smooths the first updates, which otherwise are the sign of the gradient, rounding noise included
    "weight_decay": 0.1,
    "max_grad_norm": 0.05,
    "warmup_steps": 2,
}


def states(world: Any, engine: str = "policy") -> list[dict[str, np.ndarray]]:
    return world.run("state", engine=engine)


def assert_equal_bits(left: list[dict[str, np.ndarray]], right: list[dict[str, np.ndarray]]) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        assert not [name for name in one if not np.array_equal(one[name], other[name])]


def spoiled(batch: Any, row: int, **changes: float) -> Any:
    """The batch with whole rows of arrays replaced: `behavior_logprobs_BT=-1e4` makes the ratio of `row` overflow."""
    rollouts = batch.rollouts
    for name, value in changes.items():
        owner = rollouts if hasattr(rollouts, name) else batch
        array = getattr(owner, name).copy()
        array[row] = value
        if owner is rollouts:
            rollouts = dataclasses.replace(rollouts, **{name: array})
        else:
            batch = dataclasses.replace(batch, **{name: array})
    return dataclasses.replace(batch, rollouts=rollouts)


@pytest.fixture(scope="module")
def plain(tiny_model: Path, make_batch: Any) -> dict[str, Any]:
    """Two updates with torch's own AdamW, clipping and log_softmax: parameters before and after, and gradient norms."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=OPTIMIZER["betas"], eps=OPTIMIZER["eps"], weight_decay=OPTIMIZER["weight_decay"]
    )
    norms = []
    for batch, rate in ((make_batch(rows=6, seed=1), 0.005), (make_batch(rows=9, seed=2), 0.01)):
        loss = torch.zeros(())
        for b in range(batch.rollouts.rows):
            p, r = int(batch.rollouts.prompt_lengths_B[b]), int(batch.rollouts.response_lengths_B[b])
            ids = torch.from_numpy(batch.rollouts.input_ids_BL[b, : p + r])
            log_softmax = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            logprobs = log_softmax[p - 1 : -1].gather(1, ids[p:, None])[:, 0]
            behavior, reference, advantages, weights = (
                torch.from_numpy(array[b, :r])
                for array in (
                    batch.rollouts.behavior_logprobs_BT,
                    batch.rollouts.reference_logprobs_BT,
                    batch.advantages_BT,
                    batch.loss_weights_BT,
                )
            )
            ratio = (logprobs - behavior).exp()
            loss = loss + (weights * (-advantages * ratio + 0.05 * (logprobs - reference) ** 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER["max_grad_norm"])))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return {"before": before, "after": {n: p.detach().numpy() for n, p in model.named_parameters()}, "norms": norms}


@pytest.mark.parametrize(
    ("ranks", "stage", "offload"),
    [*((*layout, False) for layout in LAYOUTS), *((*layout, True) for layout in OFFLOADED)],
)
def test_updates_equal_plain_adamw_with_a_refused_one_between(
    worlds: dict[int, Any],
    make_config: Any,
    make_batch: Any,
    tiny_model: Path,
    plain: Any,
    ranks: int,
    stage: int,
    offload: bool,
) -> None:
    world = worlds[ranks]
    first, second = make_batch(rows=6, seed=1), make_batch(rows=9, seed=2)
    config = make_config(zero_stage=stage, offload=offload, micro_batch_tokens=40, optimizer=OPTIMIZER)
    world.run("build", config=config, model_path=tiny_model)
    for metrics, skipped in world.run("update", batch=first):
        assert skipped is None
        assert metrics["learner/grad_norm"].value() == pytest.approx(plain["norms"][0], rel=1e-4)
    world.run("advance")

    held = states(world)
    with pytest.raises(NonFiniteError, match="row/4@0#0") as caught:
        world.run("update", batch=spoiled(first, 4, behavior_logprobs_BT=-1e4))
    assert "row/3@0#0" not in str(caught.value)
    assert_equal_bits(states(world), held)

    assert world.run("update", batch=second)[0][1] is None
    for weights in world.run("weights")[:1]:
        assert weights.keys() == plain["after"].keys()
        for name, wanted in plain["after"].items():
            moved = np.linalg.norm(wanted - plain["before"][name])
            assert np.linalg.norm(weights[name] - wanted) <= 2e-4 * moved, name
    assert states(world)[0]["updates"] == 2


@pytest.mark.parametrize(("ranks", "stage"), LAYOUTS)
def test_refusals_without_a_loss_that_is_not_finite(
    worlds: dict[int, Any], make_config: Any, make_batch: Any, tiny_model: Path, ranks: int, stage: int
) -> None:
    world = worlds[ranks]
    config = make_config(zero_stage=stage, micro_batch_tokens=40, non_finite="skip", optimizer=OPTIMIZER)
    world.run("build", config=config, model_path=tiny_model)
    batch = make_batch(rows=6, seed=1)
    assert world.run("update", batch=batch)[0][1] is None
    held = states(world)

    # the clipped loss is finite, its gradient is 0 * inf
    overflow = spoiled(batch, 2, behavior_logprobs_BT=-1e4)
    for _, skipped in world.run("update", batch=overflow, objective="clipped"):
        assert "1 rollout: row/2@0#0" in skipped
    assert_equal_bits(states(world), held)

    # no loss tells: all rollouts are suspects
    world.run("poison")
    for metrics, skipped in world.run("update", batch=batch):
        assert "6 rollouts" in skipped
        assert metrics["learner/skipped_updates"].value() == 1
    assert_equal_bits(states(world), held)
    assert world.run("update", batch=batch)[0][1] is None


def test_the_same_input_gives_the_same_bits(
    worlds: dict[int, Any], make_config: Any, make_batch: Any, tiny_model: Path
) -> None:
    runs = []
    for _ in range(2):
        config = make_config(zero_stage=2, micro_batch_tokens=60, optimizer=OPTIMIZER)
        worlds[2].run("build", config=config, model_path=tiny_model)
        for seed in range(3):
            worlds[2].run("update", batch=make_batch(rows=8, seed=seed), entropy=True)
        runs.append(states(worlds[2]))
    assert_equal_bits(*runs)
    assert_equal_bits(runs[0][:1], runs[0][1:])


def test_nothing_to_train_on(worlds: dict[int, Any], make_config: Any, make_batch: Any, tiny_model: Path) -> None:
    worlds[2].run("build", config=make_config(), model_path=tiny_model)
    held = states(worlds[2])
    batch = make_batch(rows=3, seed=0)
    masked = dataclasses.replace(batch.rollouts, mask_BT=np.zeros_like(batch.rollouts.mask_BT))
    for metrics, skipped in worlds[2].run("update", batch=dataclasses.replace(batch, rollouts=masked)):
        assert not metrics
        assert "no rollout" in skipped
    assert_equal_bits(states(worlds[2]), held)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_scores_and_differences_to_the_sampler(
    worlds: dict[int, Any], make_config: Any, make_batch: Any, tiny_model: Path, ranks: int, stage: int
) -> None:
    """Log-probs of all rows reach every rank; differences to the sampler are told apart by version."""
    from transformers import AutoModelForCausalLM

    world, batch = worlds[ranks], make_batch(rows=5, seed=7)
    world.run("build", config=make_config(zero_stage=stage, micro_batch_tokens=40), model_path=tiny_model)
    rollouts = batch.rollouts
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    wanted = np.zeros_like(rollouts.behavior_logprobs_BT)
    for b, (p, r) in enumerate(zip(rollouts.prompt_lengths_B, rollouts.response_lengths_B, strict=True)):
        ids = torch.from_numpy(rollouts.input_ids_BL[b, : p + r])
        with torch.no_grad():
            log_softmax = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        wanted[b, :r] = log_softmax[p - 1 : -1].gather(1, ids[p:, None])[:, 0].numpy()
    for got, _ in world.run("call", method="logprobs", batch=rollouts):
        np.testing.assert_allclose(got, wanted, atol=1e-5)

    # rows 0 and 1 were sampled by version 0 and are off by 0.25, one token by 1; the others by another version and by 2
    off = np.full_like(wanted, 2.0)
    off[:2], off[0, 0] = 0.25, 1.0
    versions = np.where(rollouts.versions_BT < 0, -1, np.where(np.arange(5)[:, None] < 2, 0, -2)).astype(np.int32)
    sampled = dataclasses.replace(rollouts, behavior_logprobs_BT=wanted - off, versions_BT=versions)
    metrics, _ = world.run("update", batch=dataclasses.replace(batch, rollouts=sampled))[-1]
    assert metrics["learner/sampler_difference"].value() == pytest.approx(
        off[:2][rollouts.mask_BT[:2]].mean(), abs=1e-5
    )
    assert metrics["learner/sampler_difference_max"].value() == pytest.approx(1.0, abs=1e-5)
    assert metrics["learner/off_policy_difference"].value() == pytest.approx(off[rollouts.mask_BT].mean(), abs=1e-5)
    assert metrics["learner/tokens"].value() == rollouts.mask_BT.sum()
