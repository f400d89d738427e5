"""The whole loop on simulated roles: for tests of the driver, and for the driver's own cost."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.config.models import Config
from rlsys.curricula import Curriculum
from rlsys.driver.loop import Driver, GroupFilter
from rlsys.driver.shelf import Shelf
from rlsys.ledger.ledger import Ledger
from rlsys.ledger.store import RolloutStore
from rlsys.roles import Roles, SampleRow
from rlsys.roles import RolloutStore as RolloutStoreProtocol
from rlsys.segments import Strategy
from rlsys.sim.clock import VirtualLoop, run_virtually
from rlsys.sim.roles import INSTANT, MemoryStore, Mortal, SimGenerator, SimLearner, SimReference, SimRewarder, Timing
from rlsys.types import Prompt

DAY_S = 86_400.0
LEDGER_LINGER_S = 0.05  # as long as the thread of the real one


def sim_config(
    steps: int = 5,
    batch: int = 4,
    bound: int = 1,
    generators: int = 2,
    samples: int = 2,
    **sections: Mapping[str, Any],
) -> Config:
    """A small config for simulated roles; `sections` add to it, such as `rollout={"attempts": 2}`."""
    small: dict[str, dict[str, Any]] = {
        "run": {"steps": steps},
        "model": {"path": "none"},
        "prompts": {"train": {"kind": "sums"}},
        "rollout": {"generators": generators, "samples_per_prompt": samples, "stall_timeout_s": 20.0},
        "rewards": {"functions": [{"name": "parity", "kind": "python", "path": "none:none"}]},
        "driver": {"prompts_per_step": batch, "max_staleness": bound},
        "eval": {"prompts": 3},
        "checkpoint": {"every": 2},
    }
    return Config.model_validate(
        {name: {**small.get(name, {}), **sections.get(name, {})} for name in {*small, *sections}}
    )


@dataclass(frozen=True, slots=True)
class SimPrompts:
    """Endless prompts."""

    name: str = "sim"

    size: int | None = None

    def at(self, place: int) -> tuple[int, str]:
        return (place, "") if self.size is None else (place % self.size, str(place // self.size))

    def attribute(self, row: int, key: str) -> Any:
        return row % 4

    def draw(self, index: int, row: int | None = None, epoch: str = "") -> Prompt:
        row, epoch = self.at(index) if row is None else (row, epoch)
        return Prompt(
            f"{self.name}/{row}" + (f"@{epoch}" if epoch else ""),
            index,
            np.array([1, 2, 3], np.int32),
            "?",
            "sim",
            None,
            seed=1000 * index,
        )


@dataclass(slots=True)
class RecordingTracker:
    """Keeps everything in lists."""

    steps: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    evals: list[tuple[int, Mapping[str, float]]] = field(default_factory=list)
    scores: list[Sequence[float]] = field(default_factory=list)  # of the evaluations
    samples: list[SampleRow] = field(default_factory=list)
    events: list[tuple[str, float, float, str]] = field(default_factory=list)
    traced: list[tuple[str, float, float, str, str]] = field(default_factory=list)  # the stages of prompts
    resumes: list[int] = field(default_factory=list)
    incidents: list[tuple[str, str]] = field(default_factory=list)
    summaries: list[Mapping[str, Any]] = field(default_factory=list)

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append((step, metrics))

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        self.evals.append((step, metrics))
        self.scores.append(scores)

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        self.samples.extend(rows)

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        if trace:
            self.traced.append((name, start, end, lane, trace))
        else:
            self.events.append((name, start, end, lane))

    def incident(self, title: str, text: str) -> None:
        self.incidents.append((title, text))

    def resumed(self, step: int) -> None:
        self.resumes.append(step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.summaries.append(summary)


class _OnTheSpot(ThreadPoolExecutor):
    """No thread: whatever it is given is done at once."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


class VirtualLedger(Ledger):
    """Written by the virtual loop instead of a thread: what a kill loses then depends on nothing but virtual time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._thread = _OnTheSpot()
        self.lost = False  # with the process: nothing is written any more

    def _write_soon(self) -> None:
        asyncio.get_running_loop().call_later(LEDGER_LINGER_S, self._write)

    def _write_queue(self) -> None:
        if self.lost:
            self._queue.clear()
        super()._write_queue()


async def _spawned(name: str, spawning: Awaitable[Any]) -> Any:
    return await spawning


class Simulation:
    """Roles, ledger, store and driver of one process of a run. Make it inside the event loop."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        timing: Timing = INSTANT,
        seed: int = 0,
        failure_rate: float = 0.0,
        timeout_rate: float = 0.0,
        with_reference: bool = False,
        skip: Callable[[int], bool] = lambda step: False,
        filters: Sequence[GroupFilter] = (),
        curriculum: Curriculum | None = None,
        strategy: Strategy | None = None,
        prompts: SimPrompts = SimPrompts(),
        store: RolloutStoreProtocol | None = None,
        ledger: Callable[[Path], Ledger] = Ledger,
        ready: bool = True,
        spawned: Callable[[str, Awaitable[Any]], Awaitable[Any]] = _spawned,
        shelf: Shelf | None = None,
    ) -> None:
        """`ready`: the first worker of each name takes no time to start, and is there from the beginning.

        `spawned(name, spawning)` makes of a worker what the driver is to see of it.
        """
        self.generators: list[SimGenerator] = []  # those that died, too
        self.rewarders: list[SimRewarder] = []
        self.learners: list[SimLearner] = []
        self.references: list[SimReference] = []
        self.spawns = 0  # but for the first ones
        self.spawn_fails: Callable[[str], Exception | None] = lambda name: None
        self.room: Callable[[Config], None] = lambda config: None  # raises where the cluster has none
        self._ready: dict[str, Mortal] = {}  # the first of each name, there from the start for tests to get at

        def make(name: str, number: int) -> Mortal:
            kind = name.partition("-")[0]
            worker: Mortal
            if kind == "generator":
                worker = SimGenerator(name, timing, seed + number, failure_rate)
                self.generators.append(worker)
            elif kind == "rewarder":
                worker = SimRewarder(name, timing, seed + number, timeout_rate, strategy)
                self.rewarders.append(worker)
            elif kind == "reference":
                worker = SimReference(name, timing, seed + number)
                self.references.append(worker)
            else:
                worker = SimLearner(name, timing, seed + number, skip)
                self.learners.append(worker)
            return worker

        async def spawn(name: str) -> Any:
            if first := self._ready.pop(name, None):
                return first
            self.spawns += 1
            number = self.spawns
            await asyncio.sleep(timing.spawn_s)
            if error := self.spawn_fails(name):
                raise error
            return make(name, number)

        async def start(name: str) -> Any:
            return await spawned(name, spawn(name))

        names = [
            *(f"generator-{i}" for i in range(config.rollout.generators)),
            *(f"rewarder-{i}" for i in range(config.rewards.workers)),
            *(["learner", "reference"] if with_reference else ["learner"]),
        ]
        self._ready = {name: make(name, 0) for name in names} if ready else {}
        self.store = store or RolloutStore(run_dir / "rollouts")
        self.roles = Roles(
            store=self.store,
            spawn_generator=start,
            spawn_rewarder=start,
            spawn_learner=lambda config: start("learner"),
            spawn_reference=(lambda: start("reference")) if with_reference else None,
            check_room=lambda config: self.room(config),
        )
        self.ledger = ledger(run_dir / "ledger.sqlite")
        self.killed = False
        self.tracker = RecordingTracker()
        eval_prompts = [SimPrompts("eval").draw(i) for i in range(config.eval.prompts)]
        self.driver = Driver(
            *(config, self.roles, self.ledger, prompts, self.tracker, run_dir, eval_prompts, filters),
            curriculum=curriculum,
            strategy=strategy,
            shelf=shelf,
        )

    @property
    def learner(self) -> SimLearner:
        """The present one."""
        return self.learners[-1]

    @property
    def reference(self) -> SimReference:
        return self.references[-1]

    def kill(self) -> None:
        """End the driver's process as SIGKILL does: what is not on disk yet never gets there.

        Needs a `VirtualLoop` and a `VirtualLedger`.
        """
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        assert isinstance(self.ledger, VirtualLedger)
        self.killed = loop.halted = self.ledger.lost = True
        self.driver.stop()
        self.driver.stop()

    async def run(self) -> dict[str, Any]:
        try:
            return await self.driver.run()
        finally:
            try:
                if not self.killed:
                    await self.store.close()
            finally:
                self.ledger.close()


def simulate(
    config: Config, run_dir: Path, act: Callable[[Simulation], None] = lambda simulation: None, **options: Any
) -> tuple[Simulation, dict[str, Any]]:
    """One process of a run in virtual time, to its end.

    `act` is called first, and may schedule what is to happen: `at(3.0, simulation.driver.stop)`. `options` are those
    of `Simulation`. Raises what ends the run, TimeoutError after a day of virtual time.
    """
    made: list[Simulation] = []

    async def main() -> dict[str, Any]:
        simulation = Simulation(config, run_dir, **{"timing": Timing(), **options})
        made.append(simulation)
        act(simulation)
        async with asyncio.timeout(DAY_S):
            return await simulation.run()

    summary = run_virtually(main())
    return made[0], summary


def at(seconds: float, action: Callable[[], Any]) -> None:
    """Do something later, in virtual seconds."""
    asyncio.get_running_loop().call_later(seconds, action)


@dataclass(frozen=True, slots=True)
class Cost:
    """Time of the whole loop, divided by the rollouts that went through. CPU time is over all threads."""

    rollouts: int
    seconds: float
    per_rollout_us: float
    per_step_ms: float
    cpu_per_rollout_us: float


def drive(
    steps: int,
    prompts_per_step: int,
    samples: int,
    generators: int = 2,
    tokens: int = 16,
    on_disk: bool = True,
    step_s: float = 0.0,
    **options: Any,
) -> Cost:
    """What the driver itself costs: the loop over roles that take no time, but for the learner's `step_s` seconds.

    `on_disk`: with the Parquet store. `options` are those of `Simulation`.
    """
    config = sim_config(
        *(steps, prompts_per_step, 1, generators, samples),
        eval={"before": False, "after": False, "prompts": 1},
        checkpoint={"every": 0},
    )
    timing = Timing((tokens, tokens), None, 0.0, 0.0, step_s, 0.0, 0.0, 0.0)

    async def main(directory: Path) -> tuple[float, float]:
        simulation = Simulation(config, directory, timing, store=None if on_disk else MemoryStore(), **options)
        started, cpu = time.perf_counter(), time.process_time()
        await simulation.run()
        return time.perf_counter() - started, time.process_time() - cpu

    with tempfile.TemporaryDirectory() as directory:
        seconds, cpu_s = asyncio.run(main(Path(directory)))
    rollouts = steps * prompts_per_step * samples
    return Cost(rollouts, seconds, 1e6 * seconds / rollouts, 1e3 * seconds / steps, 1e6 * cpu_s / rollouts)
