"""Small run directories, by simulated roles with the real ledger, store and JSONL files."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
import yaml

from rlsys.config.loading import dump_config
from rlsys.ledger.codec import FATE_SCHEMA, read_rows, write_rows
from rlsys.ledger.evaluations import write_evaluation
from rlsys.sim.drive import Simulation, sim_config, simulate
from rlsys.trackers.fanout import Trackers
from rlsys.trackers.jsonl import JsonlTracker
from rlsys.trackers.timeline import TimelineTracker

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>&amp;"

BEGIN = 1_800_000_000.0  # when virtual time begins, in seconds since 1970

MakeRun = Callable[..., Path]


@contextmanager
def one_clock() -> Iterator[None]:
    """Ledger and timeline go by virtual time, as they both go by the real one in a real run."""
    ledger = SimpleNamespace(time=lambda: BEGIN + asyncio.get_running_loop().time())
    timeline = SimpleNamespace(time=lambda: BEGIN, monotonic=lambda: 0.0)
    with patch("rlsys.ledger.ledger.time", ledger), patch("rlsys.trackers.timeline.time", timeline):
        yield


@pytest.fixture(scope="session")
def make_run() -> MakeRun:
    """`make_run(path, seed=1, steps=4, driver={...}, options={"timeout_rate": 0.5})` makes a whole run there."""

    def make(path: Path, seed: int = 0, steps: int = 4, options: Mapping[str, Any] = {}, **sections: Any) -> Path:
        run = {"steps": steps, "seed": seed, "name": "small", **sections.pop("run", {})}
        options = dict(options)
        then = options.pop("act", lambda simulation: None)
        config = sim_config(**{"eval": {"prompts": 3, "every": 2}, "checkpoint": {"every": 0}, **sections}, run=run)

        def act(simulation: Simulation) -> None:
            trackers = Trackers({"jsonl": JsonlTracker(path), "timeline": TimelineTracker(path)}, pytest.fail)
            simulation.driver.tracker = simulation.driver.recorder.tracker = trackers
            then(simulation)

        path.mkdir(parents=True)
        dump_config(config, path / "config.yaml")
        with one_clock():
            simulate(config, path, act, seed=seed, **options)
        return path

    return make


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., None]:
    """`rewrite(run, 1, text=lambda row: ...)` changes columns of the rollouts of a step, row by row."""

    def change(run_dir: Path, step: int, **columns: Callable[[dict[str, Any]], Any]) -> None:
        path = run_dir / "rollouts" / f"step-{step:06d}.parquet"
        rows = read_rows(path, FATE_SCHEMA).to_pylist()
        changed = [row | {name: value(row) for name, value in columns.items()} for row in rows]
        write_rows(pa.Table.from_pylist(changed, schema=FATE_SCHEMA), path)

    return change


@pytest.fixture(scope="session")
def answered() -> Callable[..., None]:
    """`answered(run, {0: {"a": [0.0, None]}, 50: {"a": [1.0, 1.0]}})` writes evaluations by hand: prompt a was answered
    twice at each, and one of the rewards timed out. `columns` are of all rows."""

    def write(run_dir: Path, scores: Mapping[int, Mapping[str, Sequence[float | None]]], **columns: Any) -> None:
        for step, prompts in scores.items():
            rows = [
                {
                    **{"prompt_id": name, "task": "sums", "prompt": f"{name}?", "answer": "42", "sample": sample},
                    **{"text": f"{name} at {step}, #{sample}", "tokens": 7, "finish_reason": "stop"},
                    **{"version_spans": [{"version": step, "start": 0, "end": 7}], "components": "{}"},
                    "reward_status": "timeout" if score is None else "ok",
                    "reward_detail": "no answer" if score is None else "",
                    "score": float("nan") if score is None else score,
                    **columns,
                }
                for name, of_prompt in prompts.items()
                for sample, score in enumerate(of_prompt)
            ]
            write_evaluation(run_dir / "rollouts" / "evaluations" / f"step-{step:06d}.parquet", step, rows)

    return write


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


@pytest.fixture(scope="session")
def hostile_run(
    make_run: MakeRun,
    rewrite: Callable[..., None],
    answered: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Whatever can be text in it is an attack on who reads it; some rewards have failed."""
    folder = tmp_path_factory.mktemp("hostile") / HOSTILE.replace("/", "\u2215")
    run = make_run(folder, steps=3, options={"timeout_rate": 0.4}, rollout={"max_new_tokens": 16})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["run"]["name"] = HOSTILE
    (run / "config.yaml").write_text(yaml.safe_dump({**config, HOSTILE: HOSTILE}))
    texts = ("prompt", "answer", "text", "reward_detail")
    rewrite(run, 1, **{name: lambda row: HOSTILE for name in texts}, components=lambda row: json.dumps({HOSTILE: 1.0}))
    attack = dict.fromkeys(texts, HOSTILE) | {"components": json.dumps({HOSTILE: 1.0})}
    answered(run, {0: {HOSTILE: [0.0]}, 2: {HOSTILE: [1.0, None]}, 3: {HOSTILE: [0.5]}}, **attack)
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) | {HOSTILE: 1.0} for line in metrics.read_text().splitlines()]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + HOSTILE + "\n")
    with closing(sqlite3.connect(run / "ledger.sqlite")) as ledger, ledger:
        ledger.execute("DROP TRIGGER one_fate")
        ledger.execute("UPDATE prompts SET reason = ? WHERE state = 'dropped'", (HOSTILE,))
        ledger.execute(
            "INSERT INTO events SELECT max(position) + 1, 0, NULL, ?, ? FROM events",
            (HOSTILE, json.dumps({HOSTILE: HOSTILE})),
        )
    return run
