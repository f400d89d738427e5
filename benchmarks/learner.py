"""Trained tokens a second of a learner step, over a bare torch loop on the same batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import NEW_TOKENS, Result, config, paired, prompts, seconds, tiny_model
from rlsys.types import Reward, Rollout, RolloutGroup, ScoredGroup, VersionSpan


def groups(model: Path, count: int, samples: int, seed: int = 0) -> list[ScoredGroup]:
    """Random responses of 8 to 24 tokens with random log-probs and scores."""
    rng = np.random.default_rng(seed)
    made = []
    for prompt in prompts(count, model):
        rollouts = []
        for sample in range(samples):
            length = int(rng.integers(8, NEW_TOKENS + 1))
            ids = rng.integers(3, 40, length).astype(np.int32)
            logprobs = -rng.random(length).astype(np.float32) - 3
            spans = (VersionSpan(0, 0, length),)
            rollouts.append(
                Rollout(prompt.id, sample, ids, np.ones(length, bool), logprobs, spans, "stop", "", origin="policy")
            )
        rewards = tuple(Reward("ok", float(rng.integers(0, 2))) for _ in rollouts)
        made.append(ScoredGroup(RolloutGroup(prompt, tuple(rollouts), "generator-0"), rewards))
    return made


def start_rank(model: Path, **changes: Any) -> Any:
    """One learner rank in this process."""
    from rlsys.algorithms.compose import Algorithm
    from rlsys.learner.distributed import open_rendezvous
    from rlsys.learner.role import LearnerRank

    settings = config(**changes)
    store = open_rendezvous("127.0.0.1", 60.0)
    algorithm = Algorithm.from_config(settings.algorithm)
    return LearnerRank(settings, model, algorithm, 0, 1, "127.0.0.1", store.port, store=store)


def run(rounds: int, count: int = 64, samples: int = 8) -> Result:
    """Ours: from scored groups to the updated weights, by DeepSpeed, with all checks and metrics. Bare: torch."""
    model = tiny_model()
    made = groups(model, count, samples)
    tokens = sum(len(rollout.token_ids) for group in made for rollout in group.rollouts)
    rank = start_rank(model)
    try:
        ratio, bare_s, ours_s = paired(_bare(model, made), lambda: seconds(lambda: rank.step(made)), rounds)
    finally:
        rank.close()
    return Result(
        "learner",
        "Learner: tokens a second of one step, over a bare torch loop",
        (
            (
                "ratio",
                str(ratio),
                f"{count * samples} rollouts of 8 to {NEW_TOKENS} tokens, {rounds} rounds; 0.85 wanted",
            ),
            ("rlsys", f"{tokens / ours_s:,.0f} tokens/s", "collate, GRPO, DeepSpeed ZeRO 0, checks, metrics"),
            ("bare torch", f"{tokens / bare_s:,.0f} tokens/s", "the same micro-batches, clipped ratio, AdamW"),
        ),
        {"ratio": ratio.median, "low": ratio.low, "high": ratio.high, "ours_s": ours_s, "bare_s": bare_s},
    )


def _bare(model_path: Path, made: list[ScoredGroup]) -> Callable[[], float]:
    """Rows sorted by length and padded, logits of response tokens only: what one would write by hand for speed."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, betas=(0.9, 0.95), weight_decay=0.0)
    rows = []
    for group in made:
        scores = torch.tensor([reward.score for reward in group.rewards])
        advantages = (scores - scores.mean()) / (scores.std() + 1e-6)
        for rollout, advantage in zip(group.rollouts, advantages, strict=True):
            rows.append((group.prompt.token_ids, rollout, float(advantage)))
    rows.sort(key=lambda row: len(row[0]) + len(row[1].token_ids))
    longest = max(len(prompt) + len(rollout.token_ids) for prompt, rollout, _ in rows)
    size = 4096 // longest
    micro_batches = [_tensors(rows[i : i + size]) for i in range(0, len(rows), size)]

    def step() -> None:
        for ids, targets, behavior, mask, advantages, weights in micro_batches:
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][mask]
            logprobs = model.lm_head(hidden).float().log_softmax(-1).gather(-1, targets[mask][:, None])[:, 0]
            ratio = (logprobs - behavior).exp()
            loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
            (loss * weights / len(rows)).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return lambda: seconds(step)


def _tensors(rows: list[Any]) -> tuple[Any, ...]:
    import torch

    width = max(len(prompt) + len(rollout.token_ids) for prompt, rollout, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    behavior, advantages, weights = [], [], []
    for b, (prompt, rollout, advantage) in enumerate(rows):
        end = len(prompt) + len(rollout.token_ids)
        ids[b, :end] = torch.from_numpy(np.concatenate([prompt, rollout.token_ids]))
        mask[b, len(prompt) - 1 : end - 1] = True
        behavior.append(torch.from_numpy(rollout.behavior_logprobs))
        advantages.append(torch.full((len(rollout.token_ids),), advantage))
        weights.append(torch.full((len(rollout.token_ids),), 1 / len(rollout.token_ids)))
    return ids, ids[:, 1:], torch.cat(behavior), mask, torch.cat(advantages), torch.cat(weights)
