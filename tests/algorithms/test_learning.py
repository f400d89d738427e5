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
from rlsys.metrics import merge, reduce
from rlsys.metrics.catalog import find
from rlsys.types import Progress, RolloutBatch, StartOfStep

PROMPTS, SAMPLES, TOKENS, VOCABULARY, STEPS = 16, 8, 3, 4, 20


def sample(logits: Tensor, rng: np.random.Generator, start: Tensor, step: int) -> RolloutBatch:
    """Responses of three tokens; the score is the fraction of them that are token 0, at least two of which is right.

    Demonstrations (of token 0 only) and greedy responses are the last two rows of each group.
    """
    rows = PROMPTS * SAMPLES
    probabilities = logits.softmax(0).detach().double().numpy()
    tokens = rng.choice(VOCABULARY, size=(rows, TOKENS), p=probabilities / probabilities.sum())
    place = np.arange(rows) % SAMPLES
    expert, greedy = place == SAMPLES - 2, place == SAMPLES - 1
    tokens[expert], tokens[greedy] = 0, probabilities.argmax()
    scores = (tokens == 0).mean(1).astype(np.float32)
    group = np.repeat(np.arange(PROMPTS), SAMPLES)
    behavior = logits.log_softmax(0).detach().numpy()[tokens]
    return RolloutBatch(
        input_ids_BL=np.concatenate([np.zeros((rows, 1), dtype=np.int64), tokens], 1),
        prompt_lengths_B=np.ones(rows, dtype=np.int64),
        response_lengths_B=np.full(rows, TOKENS),
        mask_BT=np.ones((rows, TOKENS), dtype=bool) & ~greedy[:, None],
        behavior_logprobs_BT=np.where(expert[:, None], 0, behavior).astype(np.float32),
        versions_BT=np.zeros((rows, TOKENS), dtype=np.int32),
        scores_B=scores,
        scored_B=np.ones(rows, dtype=bool),
        group_B=group,
        names_B=tuple(f"p/{g}@{step}#{i % SAMPLES}" for i, g in enumerate(group)),
        reference_logprobs_BT=start.log_softmax(0).numpy()[tokens],
        texts_B=tuple(" ".join(map(str, row)) for row in tokens),
        tasks_B=("sums",) * rows,
        components_BK=np.stack([scores, 1.0 + (tokens[:, 0] == 0).astype(np.float32)], 1),
        component_names=("correct", "difficulty"),
        finished_B=np.ones(rows, dtype=bool),
        expert_B=expert,
        greedy_B=greedy,
        segments_BTF=segments(tokens, float(probabilities[0])),
    )


def segments(tokens: np.ndarray, p: float) -> np.ndarray:
    """Of one token each, with exact values: the share of zeros so far, and p for every token to come."""
    ends = np.concatenate([np.zeros((len(tokens), 1)), (tokens == 0).cumsum(1)], 1)
    values = (ends + p * (TOKENS - np.arange(TOKENS + 1))) / TOKENS
    rest = np.full(tokens.shape, 0.5), np.ones(tokens.shape)
    return np.stack([values[:, :-1], values[:, 1:], *rest], -1).astype(np.float32)


def entropy_of(logits: Tensor) -> Tensor:
    policy = logits.log_softmax(0)
    return -(policy.exp() * policy).sum()


def curvature_of(logits: Tensor) -> np.ndarray:
    """As if the hidden state were the number 1: for each token |h|^2, |u|^2 and u^T (diag(p) - p p^T) u."""
    p = logits.softmax(0)
    u = torch.eye(VOCABULARY) - p
    spread = torch.einsum("vi,ij,vj->v", u, p.diag() - p[:, None] * p, u)
    return torch.stack([torch.ones(VOCABULARY), u.square().sum(1), spread], 1).numpy()


@pytest.mark.parametrize("preset", presets())
def test_the_score_rises(preset: str) -> None:
    algorithm = Algorithm.from_config(AlgorithmConfig(preset=preset))
    needs = algorithm.needs
    rng = np.random.default_rng(0)
    start = torch.zeros(VOCABULARY)
    logits = start.clone().requires_grad_()

    def score(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return logits.log_softmax(0).detach().numpy()[ids], np.full(
            ids.shape, float(entropy_of(logits.detach())), np.float32
        )

    for step in range(STEPS):
        batch = sample(logits, rng, start, step)
        logprobs, entropies = score(batch.input_ids_BL[:, 1:])
        progress = Progress(step, STEPS)
        replay = algorithm.replay(batch)
        before = StartOfStep(
            values=np.full(logprobs.shape, 0.5, np.float32) if needs.values else None,
            proximal=logprobs if needs.proximal else None,
            entropy=entropies if needs.start_entropy else None,
            curvature=curvature_of(logits.detach())[batch.input_ids_BL[:, 1:]] if needs.curvature else None,
            rescored=None if replay is None else score(replay.input_ids_BL[:, 1:])[0],
            progress=progress,
        )
        train_batches, metrics = algorithm.train_batches(batch, before)
        found = [metrics]
        for train_batch in train_batches:
            current, entropies = score(train_batch.rollouts.input_ids_BL[:, 1:])
            train_batch = algorithm.prepare(
                train_batch,
                progress,
                current if needs.current else None,
                entropies if needs.current_entropy else None,
            )
            logits = improved(algorithm, train_batch, logits, progress, found)
        logged = reduce(merge(found))
        assert all(np.isfinite(value) for value in logged.values())
        assert [name for name in logged if find(name) is None] == [], "define them in rlsys/metrics/catalog.py"
    # Multipliers start from weights that hold the policy at the reference, and take hundreds of steps to move.
    assert logits.softmax(0)[0] > (0.2 if preset.startswith("constrained-") else 0.4), "started at 0.25"


def improved(algorithm, batch, logits: Tensor, progress: Progress, found: list) -> Tensor:  # type: ignore[no-untyped-def]
    rollouts = batch.rollouts
    ids = torch.tensor(rollouts.input_ids_BL[:, 1:])
    policy = logits.log_softmax(0)
    behavior = torch.tensor(rollouts.behavior_logprobs_BT)
    proximal = behavior if batch.proximal_logprobs_BT is None else torch.tensor(batch.proximal_logprobs_BT)
    inputs = LossInputs(
        logprobs=policy[ids],
        behavior_logprobs=behavior,
        proximal_logprobs=proximal,
        reference_logprobs=torch.tensor(rollouts.reference_logprobs_BT),
        entropy=entropy_of(logits).expand(ids.shape) if algorithm.needs.entropy else None,
        advantages=torch.tensor(batch.advantages_BT),
        mask=torch.tensor(rollouts.mask_BT),
        group=torch.tensor(rollouts.group_B),
        expert=torch.tensor(rollouts.expert_B),
        extras={name: torch.tensor(extra) for name, extra in batch.extras_BT.items()},
        progress=progress,
    )
    out = algorithm.objective(inputs)
    found.append(out.metrics)
    loss = (out.per_token * torch.tensor(batch.loss_weights_BT)).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    # a fixed step size, whatever the scale; nothing moves where every token is clipped
    return (logits - 0.05 * gradient / gradient.abs().max().clamp(min=1e-6)).detach().requires_grad_()
