"""A learning study: every preset for a short run on one small task, and some of them with five seeds.

    python -m benchmarks.learning              run what is missing, then write docs/learning.md
    python -m benchmarks.learning --write      only write it

One line per finished run in benchmarks/results/learning.jsonl; what is there is not run again. The driver, vLLM, the
reward worker, the reference and the DeepSpeed learner are the real ones, in one process and without Ray, so that an
engine serves many runs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlsys.algorithms import describe
from rlsys.algorithms.presets import presets
from rlsys.config.models import Config

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "benchmarks" / "results" / "learning.jsonl"
PAGE = ROOT / "docs" / "learning.md"
REWARDS = Path(__file__).with_name("learning_rewards.py")
STEPS, ROLLOUTS, SAMPLES = 50, 256, 8  # of one run, of one step, of one prompt
SEEDS = 5


@dataclass(frozen=True)
class Case:
    """One line of the study. `config` has what differs from the common config, by section."""

    name: str
    preset: str
    seeds: int = 1
    config: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


EVALUATED = ("accuracy", "best_of_n", "prompts", "rollouts")
KEPT = ("learner/entropy_estimate", "advantages/nonzero", "staleness/mean", "learner/grad_norm")
LATE = 30  # last steps of which these are kept
STALE = {"driver": {"max_staleness": 4}}
NAMED = (
    "grpo", "aepo", "knapsack-rl", "spo-single-stream", "riskpo", "gtpo", "bnpo", "sec", "pcl",
)  # fmt: skip
OFF_POLICY = ("ppo", "grpo", "grpo-decoupled", "bapo", "opmd", "asymre", "rec")


def cases() -> list[Case]:
    """Those with five seeds first, seed by seed, so that a study that is cut short has something to say of each."""
    stale = [Case(f"{name}, staleness 4", name, SEEDS, STALE) for name in OFF_POLICY if name in presets()]
    free = Case("grpo without KL", "grpo", SEEDS, {"algorithm": {"regularize": []}})
    # At the published target of 0.5 the entropy of this task's GRPO ends by itself.
    held = Case("aepo, target 0.7", "aepo", SEEDS, {"algorithm": {"curriculum": {"target": 0.7}}})
    named = [free, held, *(Case(name, name, SEEDS) for name in NAMED)]
    return [*named, *stale, *(Case(name, name) for name in presets() if name not in NAMED)]


def jobs() -> list[tuple[Case, int]]:
    found = [(case, seed) for case in cases() for seed in range(case.seeds)]
    return sorted(found, key=lambda job: (job[0].seeds == 1, job[1]))


def config(case: Case, seed: int) -> Config:
    """A mix of easy and hard sums: two terms are right half of the time at first, four one time in eight."""
    sums = {"kind": "sums", "terms": [2, 4], "largest": 9}
    preset = presets()[case.preset]
    # As many noisy steps of an optimizer as there are updates in a step add up to the square root of their number.
    updates = preset.minibatches * preset.epochs
    staleness = int(preset.settings.get("driver.max_staleness", 1))
    samples = int(preset.settings.get("rollout.samples_per_prompt", SAMPLES))
    samples = samples if samples in (0, 1) else SAMPLES
    small: dict[str, dict[str, Any]] = {  # of what is meant for long responses
        "tree": {"breadth": [2, 2, 2], "segment_tokens": 4},
        "budgets": {"budgets": [4, 8], "summaries": 2, "summary_tokens": 8},
        "windows": {"tokens": 12},
    }
    rollout = small.get(describe(case.preset).composition["rollout"]["name"])
    advantage = {"drop_last": 1} if case.preset == "t-ppo" else None
    curriculum = {"key": "terms"} if "key" in describe(case.preset).composition["curriculum"] else None
    sections: dict[str, Any] = {
        "run": {"name": "learning", "seed": seed, "steps": STEPS},
        "model": {
            "max_length": 64,
            "tiny": {"warm_start": {"steps": 250, "learning_rate": 4e-3, "wrong_step": 0.5}},
        },
        "prompts": {"train": {**sums, "limit": 256}, "eval": {**sums, "held_out": True}},
        "rollout": {"samples_per_prompt": samples, "max_new_tokens": 20, "engine": {"threads": 1}},
        "rewards": {
            "functions": [
                {"name": "correct", "kind": "sums"},
                {"name": "difficulty", "kind": "python", "path": f"{REWARDS}:steps", "weight": 0.0},
            ]
        },
        "algorithm": {"preset": case.preset, "curriculum": curriculum, "rollout": rollout, "advantage": advantage},
        "learner": {
            "threads": 1,
            "micro_batch_tokens": 4096,
            "non_finite": "skip",
            "optimizer": {"learning_rate": 3e-4 / math.sqrt(updates), "warmup_steps": 5},
        },
        "driver": {
            "prompts_per_step": ROLLOUTS // max(1, samples) if samples else ROLLOUTS,
            "max_staleness": staleness,
        },
        "eval": {"prompts": 128, "samples_per_prompt": 8, "temperature": 1.0, "every": 10},
        "checkpoint": {"every": 0},
    }
    if case.preset == "pcl":  # whose critic has to know the prompts within some steps
        sections["algorithm"]["critic"] = {"learning_rate": 1e-3}
    for section, changes in case.config.items():
        sections[section] |= changes
    return Config.model_validate(sections)


# ---- running ------------------------------------------------------------------------------------------------------


async def run_all(todo: Sequence[tuple[Case, int]]) -> None:
    from benchmarks.inprocess import workers
    from rlsys.models.tiny import ensure_tiny_model
    from rlsys.prompts.sums import demonstrations

    base = config(Case("", "grpo"), 0)
    assert base.model.tiny is not None
    made = (0, (2, 4), 9, 0.5)
    model = ensure_tiny_model(base.model.tiny, 64, lambda: demonstrations(*made), f"sums {made}", None)
    async with workers(base, model) as (engine, worker):
        for number, (case, seed) in enumerate(todo, 1):
            started = time.monotonic()
            found = await run(case, seed, model, engine, worker)
            found["seconds"] = time.monotonic() - started
            with RUNS.open("a") as file:
                file.write(json.dumps(found) + "\n")
            after = found["evals"][-1]["accuracy"] if found["evals"] else math.nan
            print(f"{number}/{len(todo)} {case.name} seed {seed}: {after:.3f} ({found['seconds']:.0f} s)", flush=True)


async def run(case: Case, seed: int, model: Path, engine: Any, worker: Any) -> dict[str, Any]:
    from benchmarks.inprocess import run as run_in_process

    tracker, error = await run_in_process(config(case, seed), model, engine, worker)
    return {
        "name": case.name,
        "preset": case.preset,
        "seed": seed,
        "error": error,
        "evals": [{"step": step, **_rounded(metrics, EVALUATED)} for step, metrics in tracker.evals],
        "steps": len(tracker.steps),
        "late": {
            name: [round(metrics[name], 4) for _, metrics in tracker.steps[-LATE:] if name in metrics] for name in KEPT
        },
    }


def _rounded(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: round(metrics[name], 4) for name in names if name in metrics}


def finished() -> list[dict[str, Any]]:
    if not RUNS.exists():
        return []
    return [json.loads(line) for line in RUNS.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning", description=__doc__)
    parser.add_argument("--write", action="store_true", help="run nothing, only write the page")
    parser.add_argument("--most", type=int, help="runs to do at most")
    options = parser.parse_args()
    if not options.write:
        os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        done = {(found["name"], found["seed"]) for found in finished()}
        todo = [(case, seed) for case, seed in jobs() if (case.name, seed) not in done][: options.most]
        print(f"{len(done)} runs are done, {len(todo)} to do", flush=True)
        if todo:
            asyncio.run(run_all(todo))
    from benchmarks.learning_page import write

    write(finished(), PAGE)


if __name__ == "__main__":
    main()
