"""Every preset makes a small softmax policy better: the whole chain from scores to a gradient, signs included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rlsys.algorithms import Algorithm
from rlsys.algorithms.presets import presets
from rlsys.config.models import AlgorithmConfig
from rlsys.losses import LossInputs
from rlsys.types import RolloutBatch, StartOfStep

PROMPTS, SAMPLES, TOKENS, VOCABULARY = 16, 8, 3, 4


def sample(logits: Tensor, rng: np.random.Generator, start: Tensor) -> tuple[RolloutBatch, np.ndarray]:
    """Responses of three tokens; the score is the fraction of them that are token 0."""
    rows = PROMPTS * SAMPLES
    probabilities = logits.softmax(0).detach().double().numpy()
    tokens = rng.choice(VOCABULARY, size=(rows, TOKENS), p=probabilities / probabilities.sum())
    scores = (tokens == 0).mean(1).astype(np.float32)
    group = np.repeat(np.arange(PROMPTS), SAMPLES)
    batch = RolloutBatch(
        input_ids_BL=np.concatenate([np.zeros((rows, 1), dtype=np.int64), tokens], 1),
        prompt_lengths_B=np.ones(rows, dtype=np.int64),
        response_lengths_B=np.full(rows, TOKENS),
        mask_BT=np.ones((rows, TOKENS), dtype=bool),
        behavior_logprobs_BT=logits.log_softmax(0).detach().numpy()[tokens],
        versions_BT=np.zeros((rows, TOKENS), dtype=np.int32),
        scores_B=scores,
        scored_B=np.ones(rows, dtype=bool),
        group_B=group,
        names_B=tuple(f"{g}#{i % SAMPLES}" for i, g in enumerate(group)),
        reference_logprobs_BT=start.log_softmax(0).numpy()[tokens],
    )
    return batch, tokens


@pytest.mark.parametrize("preset", presets())
def test_the_score_rises(preset: str) -> None:
    algorithm = Algorithm.from_config(AlgorithmConfig(preset=preset))
    rng = np.random.default_rng(0)
    start = torch.zeros(VOCABULARY)
    logits = start.clone().requires_grad_()
    for _ in range(20):
        batch, tokens = sample(logits, rng, start)
        values = np.full(tokens.shape, 0.5) if algorithm.needs.values else None
        proximal = batch.behavior_logprobs_BT if algorithm.needs.proximal else None
        steps, _ = algorithm.train_batches(batch, StartOfStep(values=values, proximal=proximal))
        for step in steps:
            ids = torch.tensor(step.rollouts.input_ids_BL[:, 1:])
            policy = logits.log_softmax(0)
            behavior = torch.tensor(step.rollouts.behavior_logprobs_BT)
            inputs = LossInputs(
                logprobs=policy[ids],
                behavior_logprobs=behavior,
                proximal_logprobs=behavior,
                reference_logprobs=torch.tensor(step.rollouts.reference_logprobs_BT),
                entropy=-(policy.exp() * policy).sum().expand(ids.shape),
                advantages=torch.tensor(step.advantages_BT),
                mask=torch.tensor(step.rollouts.mask_BT),
            )
            loss = (algorithm.objective(inputs).per_token * torch.tensor(step.loss_weights_BT)).sum()
            (gradient,) = torch.autograd.grad(loss, logits)
            # a fixed step size, whatever the scale; nothing moves where every token is clipped
            logits = (logits - 0.05 * gradient / gradient.abs().max().clamp(min=1e-6)).detach().requires_grad_()
    assert logits.softmax(0)[0] > 0.4, "started at 0.25"
