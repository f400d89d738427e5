"""Every preset through the real parts, in one process: vLLM, reward worker, reference, DeepSpeed learner, new weights.

    python presets_program.py MODEL REWARDS.py    ->  one JSON line per preset: {"preset", "steps": [metrics], ...}

The engine starts once; each preset gets a learner of its own, whose versions go on where the last one's ended.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from dataclasses import replace
from typing import Any

from rlsys.algorithms import describe
from rlsys.algorithms.compose import Algorithm
from rlsys.algorithms.presets import presets
from rlsys.algorithms.rollout import bound_strategy
from rlsys.config.models import Config
from rlsys.driver.drawing import Drawing
from rlsys.driver.options import training_sampling
from rlsys.learner.distributed import open_rendezvous
from rlsys.learner.role import LearnerRank
from rlsys.metrics import reduce
from rlsys.models.loading import load_tokenizer
from rlsys.prompts.stream import PromptStream
from rlsys.reference.server import ReferenceServer
from rlsys.rewards.worker import RewardWorker
from rlsys.roles import Branch, Sampling
from rlsys.rollouts.engine import VllmGenerator
from rlsys.segments import scored
from rlsys.types import Progress, RolloutGroup, group_info

STEPS, PROMPTS, SAMPLES = 3, 4, 4


def config(model: str, rewards: str, preset: str) -> Config:
    functions = [
        {"name": "correct", "kind": "python", "path": f"{rewards}:correct"},
        {"name": "difficulty", "kind": "python", "path": f"{rewards}:difficulty", "weight": 0.0},
    ]
    of_terms = "key" in describe(preset).composition["curriculum"]
    curriculum = {"key": "terms"} if of_terms else None  # the metadata that sums have
    small: dict[str, dict[str, Any]] = {  # of what is meant for long responses
        "tree": {"breadth": [2, 2], "segment_tokens": 4},
        "budgets": {"budgets": [3, 6], "summaries": 2, "summary_tokens": 4},
        "windows": {"tokens": 10},
    }
    strategy = describe(preset).composition["rollout"]["name"]
    rollout = small.get(strategy)
    advantage = {"drop_last": 1} if strategy == "windows" else None  # as long as a window is here
    # A model with random weights hardly ever ends by itself, and what is cut off has no value.
    stop = ["1", "5", "+"] if strategy in ("chain", "tree") else []
    return Config.model_validate(
        {
            "run": {"steps": STEPS},
            "model": {"path": model, "max_length": 256},
            "prompts": {"train": {"kind": "sums"}},
            "rollout": {
                "samples_per_prompt": SAMPLES,
                "max_new_tokens": 12,
                "stop": stop,
                "engine": {"kv_cache_gib": 0.05, "threads": 1},
            },
            "rewards": {"functions": functions},
            "algorithm": {
                "preset": preset,
                "minibatches": 1,
                "curriculum": curriculum,
                "rollout": rollout,
                "advantage": advantage,
            },
            "learner": {"threads": 1, "optimizer": {"learning_rate": 1e-3}},
        }
    )


async def main(model: str, rewards: str) -> None:
    base = config(model, rewards, "grpo")
    generator, worker = VllmGenerator("generator-0", base, model), RewardWorker(base.rewards)
    await generator.start()
    await worker.start()
    reference = ReferenceServer(base, model)
    stream = PromptStream.from_config(base.prompts.train, base.prompts, load_tokenizer(model), 200, seed=0)
    try:
        for preset in presets():
            found: dict[str, Any] = {"preset": preset, "steps": [], "differences": []}
            try:
                await run(config(model, rewards, preset), model, generator, worker, reference, stream, found)
            except Exception:
                found["error"] = traceback.format_exc()
            print(json.dumps(found), flush=True)
    finally:
        await worker.close()
        await generator.close()


async def sample(generator: VllmGenerator, branch: Branch, base: Sampling) -> RolloutGroup:
    sampling = replace(base, n=branch.n, max_new_tokens=branch.max_new_tokens)
    [answer] = await generator.generate([branch.prompt], sampling)
    return await answer


async def run(
    settings: Config,
    model: str,
    generator: VllmGenerator,
    worker: RewardWorker,
    reference: ReferenceServer,
    stream: PromptStream,
    found: dict[str, Any],
) -> None:
    algorithm = Algorithm.from_config(settings.algorithm)
    store = open_rendezvous("127.0.0.1", 60.0)
    rank = LearnerRank(settings, model, algorithm, 0, 1, "127.0.0.1", store.port, store=store)
    try:
        first = rank.learner.version = generator.version
        strategy = bound_strategy(algorithm, settings, model)
        sampling = strategy.first(training_sampling(settings, algorithm.needs.greedy, algorithm.needs.expert))
        drawing = Drawing(stream, algorithm.curriculum, sampling, seed=0)
        for step in range(STEPS + 1):
            weights = rank.publish()
            assert weights is not None
            found["differences"].append((await generator.update(weights)).probe_difference)
            if step == STEPS:
                break
            if algorithm.curriculum.needs_values:
                candidates = drawing.candidates(PROMPTS)
                values = rank.prompt_values(list(candidates.values()))
                algorithm.curriculum.judged(dict(zip(candidates, values, strict=True)))
            prompts = [strategy.start(prompt) for prompt in drawing.draw(PROMPTS, Progress(step, STEPS))]
            answers = [(await generator.generate([p], drawing.sampling(p)))[0] for p in prompts]
            groups = []
            for answer, prompt in zip(answers, prompts, strict=True):
                rounds = [[await answer]]
                while branches := strategy.branch(rounds):
                    if strategy.defers:
                        drawing.carry(prompt.index, branches)
                        break
                    base = drawing.sampling(prompt)
                    rounds.append([await sample(generator, branch, base) for branch in branches])
                groups.append(await scored(strategy, rounds, worker.score))
            logprobs = reference.logprobs(groups) if algorithm.needs.reference else None
            report = rank.step(groups, logprobs)
            assert report.version == first + step + 1
            logged = reduce(report.metrics)
            infos = [group_info(group.group, group.rewards) for group in groups]
            found["steps"].append({**logged, **drawing.observe(report, infos, logged), "skipped": report.skipped})
        memory = [algorithm.state_dict(), algorithm.curriculum.state_dict()]
        found["state"] = json.loads(json.dumps(memory)) == memory
    finally:
        rank.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    asyncio.run(main(*sys.argv[1:]))
