"""Credit by segment beside credit by response and by token: at equal sampled tokens, and at equal wall time.

    python -m benchmarks.segments              run what is missing, then write docs/segments.md
    python -m benchmarks.segments --write      only write it

One line per finished run in benchmarks/results/segments.jsonl; what is there is not run again. A step samples about as
many tokens in every case, continuations and branches counted, so that runs of equal length are comparable; what is left
of the difference is interpolated away. In one process and without Ray, as in `benchmarks.learning`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from rlsys.algorithms.presets import presets
from rlsys.config.models import Config

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "benchmarks" / "results" / "segments.jsonl"
PAGE = ROOT / "docs" / "segments.md"
POINTS = 4  # evaluations after the first
SEEDS, ABLATION_SEEDS = 5, 2

Demonstrations = Callable[[], Iterator[tuple[str, str]]]


@dataclass(frozen=True)
class Task:
    """Prompts, their reward, and demonstrations to start from, each of whose steps is wrong with a probability."""

    name: str
    title: str
    train: Mapping[str, Any]
    held_out: Mapping[str, Any]
    reward: Mapping[str, Any]
    max_length: int
    max_new_tokens: int
    warm_start: Mapping[str, Any]
    demonstrations: Demonstrations


def running_sums() -> Iterator[tuple[str, str]]:
    from rlsys.prompts.sums import demonstrations

    return demonstrations(0, (4, 8), 9, WRONG)


def chain_sums() -> Iterator[tuple[str, str]]:
    """reasoning-gym's chain_sum, worked: "4 - 1 + 7 =" is answered "3,10<a>10</a>"."""
    from reasoning_gym import create_dataset

    rng = random.Random(0)
    for seed in range(1_000, 2_000):
        data = create_dataset("chain_sum", size=2_000, seed=seed, **CHAIN_SUM)
        for entry in data:
            first, *rest = entry["metadata"]["expression"].split()
            total, steps = int(first), []
            for sign, term in zip(rest[::2], rest[1::2], strict=True):
                total += int(term) if sign == "+" else -int(term)
                if rng.random() < WRONG:
                    total += rng.choice([-2, -1, 1, 2])
                steps.append(str(total))
            yield entry["question"], f"{','.join(steps)}<a>{steps[-1]}</a>"


WRONG = 0.35  # steps of a demonstration
WARM_START = {"steps": 250, "learning_rate": 4e-3, "wrong_step": WRONG}
CHAIN_SUM = {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 1}
TASKS = {
    task.name: task
    for task in (
        Task(
            "sums",
            "running sums of four to eight terms",
            {"kind": "sums", "terms": [4, 8], "largest": 9},
            {"kind": "sums", "terms": [4, 8], "largest": 9, "held_out": True},
            {"name": "correct", "kind": "sums"},
            *(64, 28, WARM_START, running_sums),
        ),
        Task(
            "chain_sum",
            "reasoning-gym's chain_sum of three to five terms",
            {"kind": "reasoning_gym", "dataset": "chain_sum", "parameters": CHAIN_SUM, "size": 20_000},
            {"kind": "reasoning_gym", "dataset": "chain_sum", "parameters": CHAIN_SUM, "size": 1_000, "seed": 1},
            {"name": "correct", "kind": "reasoning_gym", "options": {"tag": "a"}},
            *(128, 32, WARM_START, chain_sums),
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """`steps` of `prompts`, each with `samples`; `algorithm` has what differs from the preset."""

    name: str
    preset: str
    steps: int
    prompts: int
    samples: int
    algorithm: Mapping[str, Any] = field(default_factory=dict)
    task: str = "sums"
    group: str = "methods"

    @property
    def seeds(self) -> int:
        return SEEDS if self.group == "methods" else ABLATION_SEEDS


def cases() -> list[Case]:
    """Steps are such that a case samples some 200,000 tokens."""
    found = []
    for task, plain, chain, tree in (("sums", 110, 57, 108), ("chain_sum", 90, 44, 80)):
        found += [Case(name, name, plain, 16, 8, task=task) for name in ("grpo", "ppo")]
        # As published it does not clip, and a staleness of 1 then costs it what it had to begin with.
        found.append(Case("rloo", "rloo", plain, 16, 8, {"loss": {"name": "ppo-clip"}}, task))
        found += [_chain("spo-chain", chain, task=task), _tree("spo-tree", tree, task=task)]
    interval, samples, mask, shape = "cutpoint interval", "continuations", "probability mask", "tree shape"
    return [
        *found,
        *(_chain(f"every {k}", steps, every=k, group=interval) for k, steps in ((1, 21), (2, 37), (8, 78))),
        *(_chain(f"{n} continuations", steps, n, group=samples) for n, steps in ((1, 130), (2, 92), (8, 33))),
        _chain("no mask", 57, group=mask, adjust=[{"name": "whiten", "over": "tokens"}]),
        _tree("16", 73, [16], group=shape),
        _tree("8-2", 95, [8, 2], group=shape),
        _tree("2-8", 119, [2, 8], group=shape),
        _tree("2-2-4", 135, [2, 2, 4], 4, group=shape),
    ]


def _chain(name: str, steps: int, continuations: int = 4, every: int = 4, task: str = "sums", **more: Any) -> Case:
    group = more.pop("group", "methods")
    algorithm = {"rollout": {"continuations": continuations}, "partition": {"every": every}, **more}
    return Case(name, "spo-chain", steps, 16, 4, algorithm, task, group)


def _tree(
    name: str, steps: int, breadth: Sequence[int] = (4, 4), tokens: int = 6, task: str = "sums", group: str = "methods"
) -> Case:
    rollout = {"breadth": list(breadth), "segment_tokens": tokens}
    return Case(name, "spo-tree", steps, 12, 8, {"rollout": rollout}, task, group)


def config(case: Case, seed: int) -> Config:
    task, preset = TASKS[case.task], presets()[case.preset]
    learning_rate = 3e-4 / math.sqrt(preset.minibatches * preset.epochs)  # as in benchmarks.learning
    return Config.model_validate(
        {
            "run": {"name": "segments", "seed": seed, "steps": case.steps},
            "model": {"max_length": task.max_length, "tiny": {"warm_start": task.warm_start}},
            "prompts": {"train": task.train, "eval": task.held_out},
            "rollout": {
                "samples_per_prompt": case.samples,
                "max_new_tokens": task.max_new_tokens,
                "temperature": 1.0,
                "engine": {"threads": 1},
            },
            "rewards": {"functions": [task.reward]},
            "algorithm": {"preset": case.preset, "regularize": [], **case.algorithm},
            "learner": {
                "threads": 1,
                "micro_batch_tokens": 4096,
                "optimizer": {"learning_rate": learning_rate, "warmup_steps": 5},
            },
            "driver": {"prompts_per_step": case.prompts, "max_staleness": 1},
            "eval": {"prompts": 200, "samples_per_prompt": 4, "temperature": 1.0, "every": case.steps // POINTS},
            "checkpoint": {"every": 0},
        }
    )


# ---- running ------------------------------------------------------------------------------------------------------


async def run_all(task: Task, todo: Sequence[tuple[Case, int]]) -> None:
    from benchmarks.inprocess import run, workers
    from rlsys.models.tiny import ensure_tiny_model

    base = config(todo[0][0], 0)
    assert base.model.tiny is not None
    model = ensure_tiny_model(base.model.tiny, task.max_length, task.demonstrations, f"segments {task.train}", None)
    async with workers(base, model) as (engine, worker):
        for number, (case, seed) in enumerate(todo, 1):
            started = time.monotonic()
            tracker, error = await run(config(case, seed), model, engine, worker)
            found = record(case, seed, tracker.steps, tracker.evals, error)
            with RUNS.open("a") as file:
                file.write(json.dumps(found) + "\n")
            seen = " ".join(f"{100 * e['accuracy']:.1f}" for e in found["evals"])
            took = f"{found['evals'][-1]['tokens']} tokens, {time.monotonic() - started:.0f} s"
            print(f"{number}/{len(todo)} {case.task} {case.name} seed {seed}: {seen} ({took})", flush=True)


def record(case: Case, seed: int, steps: Sequence[Any], evals: Sequence[Any], error: str | None) -> dict[str, Any]:
    """Evaluations with the tokens sampled and the seconds passed until then."""
    tokens = [0, *accumulate(int(metrics["tokens/generated"]) for _, metrics in steps)]
    trained = [0, *accumulate(int(metrics["tokens/trained"]) for _, metrics in steps)]
    seconds = [0.0, *accumulate(metrics["time/step_s"] for _, metrics in steps)]
    return {
        "name": case.name,
        "task": case.task,
        "group": case.group,
        "seed": seed,
        "error": error,
        "trained": trained[-1],
        "evals": [
            {
                "step": step,
                "tokens": tokens[step],
                "seconds": round(seconds[step], 2),
                "accuracy": round(metrics["accuracy"], 4),
            }
            for step, metrics in evals
        ],
    }


def finished() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def jobs() -> list[tuple[Case, int]]:
    """Methods before ablations, task by task; then seed by seed, so that times of neighbours are comparable."""
    found = [(case, seed) for case in cases() for seed in range(case.seeds)]
    return sorted(found, key=lambda job: (job[0].group != "methods", list(TASKS).index(job[0].task), job[1]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.segments", description=__doc__)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the page")
    parser.add_argument("--most", type=int, help="runs to do at most")
    options = parser.parse_args()
    if not options.write:
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        done = {(found["task"], found["name"], found["seed"]) for found in finished()}
        todo = [job for job in jobs() if (job[0].task, job[0].name, job[1]) not in done][: options.most]
        print(f"{len(done)} runs are done, {len(todo)} to do", flush=True)
        for name, part in groupby(todo, key=lambda job: job[0].task):
            asyncio.run(run_all(TASKS[name], list(part)))
    from benchmarks.segments_page import write

    write(finished(), TASKS, PAGE)


if __name__ == "__main__":
    main()
