"""What the mathematics of every preset costs, as a share of a learner step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from benchmarks.common import Result, tiny_model
from rlsys.types import Progress, RolloutBatch, StartOfStep, TrainBatch

ROWS, TOKENS, SAMPLES, PROMPT, VOCABULARY = 512, 1024, 8, 16, 40
MEASURED_ROWS = 16  # of the learner step, which is proportional to its rows
MICRO_BATCH = 8  # rows of 1024 tokens
WANTED = 0.02


def batch(rows: int, tokens: int, seed: int = 0) -> RolloutBatch:
    """Random responses, all of full length: the most that there can be to do."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 2, rows).astype(np.float32)
    place = np.arange(rows) % SAMPLES
    behavior = -rng.exponential(0.7, (rows, tokens)).astype(np.float32)
    greedy = place == SAMPLES - 1
    return RolloutBatch(
        input_ids_BL=rng.integers(3, VOCABULARY, (rows, PROMPT + tokens)),
        prompt_lengths_B=np.full(rows, PROMPT),
        response_lengths_B=np.full(rows, tokens),
        mask_BT=np.ones((rows, tokens), dtype=bool) & ~greedy[:, None],
        behavior_logprobs_BT=behavior,
        versions_BT=np.zeros((rows, tokens), dtype=np.int32),
        scores_B=scores,
        scored_B=np.ones(rows, dtype=bool),
        group_B=np.arange(rows) // SAMPLES,
        names_B=tuple(f"p/{b // SAMPLES}@0#{b % SAMPLES}" for b in range(rows)),
        reference_logprobs_BT=(behavior + rng.normal(0, 0.1, behavior.shape)).astype(np.float32),
        texts_B=tuple(f"so the answer is {int(n)}" for n in rng.integers(0, 9, rows)),
        tasks_B=("task",) * rows,
        components_BK=np.stack([scores, rng.random(rows).astype(np.float32)], 1),
        component_names=("correct", "difficulty"),
        finished_B=np.ones(rows, dtype=bool),
        expert_B=place == SAMPLES - 2,
        greedy_B=greedy,
    )


def run(rounds: int) -> Result:
    """CPU time of one thread, so that whatever else runs on the machine counts little."""
    import torch

    from rlsys.algorithms import Algorithm
    from rlsys.algorithms.presets import presets
    from rlsys.config.models import AlgorithmConfig

    torch.set_num_threads(1)
    step_s = ROWS / MEASURED_ROWS * _cpu(_learner_step(), min(rounds, 3))
    made = batch(ROWS, TOKENS)
    rng = np.random.default_rng(1)
    shape = made.mask_BT.shape
    noise = rng.normal(0, 0.05, shape).astype(np.float32)
    entropy = rng.exponential(0.7, shape).astype(np.float32)
    curvature = rng.random((*shape, 3)).astype(np.float32)
    rows, figures = [], {}
    for name in presets():
        algorithm = Algorithm.from_config(AlgorithmConfig(preset=name))
        needs = algorithm.needs
        replay = algorithm.replay(made)
        start = StartOfStep(
            values=noise + 0.5 if needs.values else None,
            proximal=made.behavior_logprobs_BT + noise if needs.proximal else None,
            entropy=entropy if needs.start_entropy else None,
            curvature=curvature if needs.curvature else None,
            rescored=None if replay is None else replay.behavior_logprobs_BT,
            progress=Progress(3, 10),
        )
        before_s = _cpu(partial(algorithm.train_batches, made, start), min(rounds, 3))
        steps, _ = algorithm.train_batches(made, start)
        loss_s = sum(_cpu(_losses(algorithm, step, noise, entropy), 1) for step in steps)
        share = (before_s + loss_s) / step_s
        figures[name] = {"before": before_s / step_s, "loss": loss_s / step_s}
        rows.append((name, f"{share:.2%}", f"advantages {before_s / step_s:.2%}, loss {loss_s / step_s:.2%}"))
    rows.sort(key=lambda row: -float(row[1].rstrip("%")))
    over = [row[0] for row in rows if float(row[1].rstrip("%")) > 100 * WANTED]
    head = (
        ("learner step", f"{step_s:.0f} s", f"CPU time for {ROWS} x {TOKENS} tokens with the quickstart's model"),
        ("largest", rows[0][1], f"{rows[0][0]}; at most {WANTED:.0%} wanted; above: {', '.join(over) or 'none'}"),
    )
    return Result(
        "algorithms",
        "Algorithms: share of a learner step that is spent on advantages and loss",
        (*head, *rows),
        {"step_s": step_s, "presets": figures},
    )


def _cpu(work: Callable[[], object], rounds: int) -> float:
    """Least CPU seconds of this process."""
    found = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def _learner_step() -> Callable[[], None]:
    """Forward and backward pass of bare torch: the smallest that a step can be."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model(), dtype=torch.float32).train()
    ids = torch.randint(3, VOCABULARY, (MEASURED_ROWS, PROMPT + TOKENS))

    def step() -> None:
        for rows in ids.split(MICRO_BATCH):
            hidden = model.model(input_ids=rows, use_cache=False).last_hidden_state[:, PROMPT - 1 : -1]
            logprobs = model.lm_head(hidden).float().log_softmax(-1).gather(-1, rows[:, PROMPT:, None])
            logprobs.mean().backward()
        model.zero_grad()

    return step


def _losses(algorithm: Any, step: TrainBatch, noise: np.ndarray, entropy: np.ndarray) -> Callable[[], None]:
    """`prepare` and, micro-batch by micro-batch, the objective with its gradient by the log-probs."""
    import torch

    from rlsys.losses import LossInputs

    rollouts = step.rollouts
    count = len(rollouts.names_B)
    current = rollouts.behavior_logprobs_BT + noise[:count]

    def tensor(array: Any, rows: slice) -> Any:
        return None if array is None else torch.from_numpy(np.ascontiguousarray(array[rows]))

    def work() -> None:
        needs = algorithm.needs
        ready = algorithm.prepare(
            step,
            Progress(3, 10),
            current if needs.current else None,
            entropy[:count] if needs.current_entropy else None,
        )
        for first in range(0, count, MICRO_BATCH):
            rows = slice(first, first + MICRO_BATCH)
            logprobs = torch.from_numpy(current[rows]).requires_grad_()
            entropies = torch.from_numpy(entropy[:count][rows]).requires_grad_() if needs.entropy else None
            behavior = tensor(rollouts.behavior_logprobs_BT, rows)
            proximal = tensor(ready.proximal_logprobs_BT, rows)
            extras: Mapping[str, Any] = {name: tensor(extra, rows) for name, extra in ready.extras_BT.items()}
            out = algorithm.objective(
                LossInputs(
                    logprobs=logprobs,
                    behavior_logprobs=behavior,
                    proximal_logprobs=behavior if proximal is None else proximal,
                    reference_logprobs=tensor(rollouts.reference_logprobs_BT, rows),
                    entropy=entropies,
                    advantages=tensor(ready.advantages_BT, rows),
                    mask=tensor(rollouts.mask_BT, rows),
                    group=tensor(rollouts.group_B, rows),
                    expert=tensor(rollouts.expert_B, rows),
                    extras=extras,
                    progress=Progress(3, 10),
                )
            )
            (out.per_token * tensor(ready.loss_weights_BT, rows)).sum().backward()

    return work
