"""The gradient of a batch is that of one plain torch loss over all of it, however the batch is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow
TEMPERATURE = 0.8


def whole_batch_loss(model: torch.nn.Module, batch: Any, entropy: bool) -> torch.Tensor:
    """Row by row over transformers' full logits: the formulas of `rank_program.objective` written out."""
    rollouts = batch.rollouts
    loss = torch.zeros(())
    for b in range(rollouts.rows):
        p, r = int(rollouts.prompt_lengths_B[b]), int(rollouts.response_lengths_B[b])
        ids = torch.from_numpy(rollouts.input_ids_BL[b, : p + r])
        log_softmax = torch.log_softmax(model(input_ids=ids[None]).logits[0] / TEMPERATURE, dim=-1)
        for t in range(r):
            if not rollouts.mask_BT[b, t]:
                continue
            distribution = log_softmax[p + t - 1]
            logprob = distribution[ids[p + t]]
            ratio = torch.exp(logprob - float(rollouts.behavior_logprobs_BT[b, t]))
            token = -float(batch.advantages_BT[b, t]) * ratio
            token = token + 0.05 * (logprob - float(rollouts.reference_logprobs_BT[b, t])) ** 2
            if entropy:
                token = token + 0.01 * (distribution.exp() * distribution).sum()
            loss = loss + token * float(batch.loss_weights_BT[b, t])
    return loss


def flat(named: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([named[name].ravel() for name in sorted(named)])


@pytest.fixture(scope="module")
def truth(tiny_model: Path, make_batch: Any) -> Callable[[bool], tuple[Any, np.ndarray]]:
    """A batch, with or without a masked rollout, and the gradient of `whole_batch_loss` over it."""
    from transformers import AutoModelForCausalLM

    @cache
    def compute(masked_row: bool) -> tuple[Any, np.ndarray]:
        batch = make_batch(rows=7, seed=3, masked_row=masked_row)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        whole_batch_loss(model, batch, entropy=True).backward()
        return batch, flat({name: p.grad.numpy() for name, p in model.named_parameters()})

    return compute


CUTS = {"one row": 1, "about three rows": 50, "all rows": 10_000}


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3), (1, 3)])
def test_the_gradient_does_not_depend_on_the_cut(
    worlds: dict[int, Any], make_config: Any, tiny_model: Path, truth: Any, ranks: int, stage: int
) -> None:
    world = worlds[ranks]
    config = make_config(temperature=TEMPERATURE, zero_stage=stage, logprob_chunk=16)
    world.run("build", config=config, model_path=tiny_model)
    wrong: dict[str, float] = {}
    for masked_row in (False, True):
        batch, wanted = truth(masked_row)
        for cut, packing in itertools.product(CUTS, ["padded", "packed", "shared"]):
            world.run("configure", micro_batch_tokens=CUTS[cut], packing=packing)
            for rank, got in enumerate(world.run("gradients", batch=batch, entropy=True)):
                relative = np.linalg.norm(flat(got) - wanted) / np.linalg.norm(wanted)
                if not relative <= 1e-5:
                    wrong[f"{cut}, {packing}, masked row: {masked_row}, rank {rank}"] = relative
    assert not wrong


@pytest.mark.parametrize("stage", [0, 3])
def test_gradient_checkpointing_changes_nothing(
    worlds: dict[int, Any], make_config: Any, tiny_model: Path, truth: Any, stage: int
) -> None:
    config = make_config(temperature=TEMPERATURE, zero_stage=stage, gradient_checkpointing=True)
    worlds[2].run("build", config=config, model_path=tiny_model)
    batch, wanted = truth(False)
    for got in worlds[2].run("gradients", batch=batch, entropy=True):
        assert np.linalg.norm(flat(got) - wanted) <= 1e-5 * np.linalg.norm(wanted)
