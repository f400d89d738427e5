"""Faults of simulated roles: at a moment in virtual time, or with a certain call.

driver ──> Shell ──> the simulated role
             |
           Faults: does this call meet a fault?  die, hang, wedge, slow, fail, corrupt
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlsys.config.models import Sizes
from rlsys.driver.checkpoints import MANIFEST
from rlsys.errors import BadRollout, EngineError, HandleLost, LearnerError, RlsysError, WorkerDied
from rlsys.roles import Scored
from rlsys.sim.drive import Simulation, at
from rlsys.sim.roles import Mortal
from rlsys.types import Reward, ScoredGroup, group_info

What = Literal["flip", "truncate", "delete", "no manifest", "half-written"]
Kind = Literal[
    "die", "hang", "wedge", "slow", "fail", "corrupt", "refuse", "lose", "scale", "damage", "stop", "interrupt", "kill"
]

DAMAGE: tuple[What, ...] = ("flip", "truncate", "delete", "no manifest", "half-written")
MARK = "(chaos)"  # in the messages of errors that were made on purpose
SLOWER = 50.0
WORK = ("answer", "score", "branch", "logprobs", "step", "prompt_values")  # what roles are there for


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    | kind | what happens |
    | --- | --- |
    | die | the worker's process ends |
    | hang | nothing ever comes back from the worker, no sign of life either |
    | wedge | this one call never comes back |
    | slow | what the worker begins takes 50 times as long, for `value` seconds; a start takes `value` seconds longer |
    | fail | this call raises EngineError (of the learner: LearnerError); at a time: every call for `value` seconds |
    | corrupt | this call says what cannot be: a wrong version, a refused answer, rewards that all timed out |
    | refuse | a reward worker finds that what a generator has made cannot be right |
    | lose | what the call was given is gone, with the node that had it |
    | scale | the pool of this role is to have `value` workers, the learner so many ranks |
    | damage | a file of a checkpoint is damaged while the run goes on; `value` (0 to 1) says which, and how |
    | stop, interrupt, kill | the driver gets one Ctrl-C, gets two, ends as by SIGKILL |

    `moment` is the call that meets it: "step" before it is worked on, "step done" when there is a result, "spawn" for
    the start. Of the `disk`, "work" is any piece of work for a thread; of the `driver`, "step", "checkpoint" and
    "gate" are the instants at which a step is counted, a checkpoint stands, the gate has moved. `when` counts these
    calls, from 1. Without a moment, `when` is the time in seconds, and `which` says which of the role's living workers.
    """

    kind: Kind
    role: Literal["generator", "rewarder", "learner", "reference", "driver", "disk"]
    moment: str = ""
    when: float = 0.0
    which: int = 0
    value: float = 0.0

    def __str__(self) -> str:
        when = f"{self.moment} {self.when:g}" if self.moment else f"{self.when:.1f} s"
        return f"{self.kind} {self.role} at {when}" + (f" ({self.value:g})" if self.value else "")


@dataclass(frozen=True, slots=True)
class Damage:
    """What happens to a file of the run."""

    what: What
    where: Literal["checkpoint", "pending"]
    place: float  # 0 to 1: which file, and where in it

    def __str__(self) -> str:
        return f"{self.what}: {self.where}"


@dataclass(slots=True)
class Fired:
    """A fault that was met: who met it, when, and when the work went on."""

    fault: Fault
    name: str
    at: float
    step: int
    # Seconds until the worker's next finished piece of work; the learner's and the driver's: next step; of a pool that
    # was scaled: all are there
    recovered: float | None = None


class Faults:
    """The faults of one process. Counts, and notes what was met."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.fired: list[Fired] = []
        self.calls = 0  # that have ended
        self.scored: dict[str, set[str]] = {}  # prompt -> digests of what reward workers have made of it
        self.given: list[tuple[int, str, str]] = []  # to the learner: version, prompt, digest
        self._timed = [fault for fault in faults if not fault.moment]
        self._moments = [fault for fault in faults if fault.moment]
        self._counts: Counter[tuple[str, str]] = Counter()
        self._been: dict[str, int] = {}
        self._failing: dict[Mortal, float] = {}  # until when
        self._simulation: Simulation

    def arm(self, simulation: Simulation) -> None:
        """The process begins."""
        self._simulation = simulation
        for fault in self._timed:
            at(fault.when, lambda fault=fault: self._on_time(fault))  # type: ignore[misc]

    async def spawned(self, name: str, spawning: Awaitable[Any]) -> Any:
        """For `Simulation`: workers in shells."""
        role = name.partition("-")[0]
        started = False
        try:
            for fault in self._due(role, "spawn"):
                self._met(fault, name)
                match fault.kind:
                    case "slow":
                        await asyncio.sleep(fault.value)
                    case "die":
                        raise WorkerDied(name, f"SIGKILL {MARK}")
                    case "hang" | "wedge":
                        await asyncio.Future()
                    case "fail" | "corrupt":
                        raise EngineError(f"{name} cannot start {MARK}")
                    case _:
                        await self._driver(fault)
            started = True
        finally:
            if not started and asyncio.iscoroutine(spawning):
                spawning.close()
        return Shell(await spawning, self)

    def work(self) -> None:
        """For the loop: a thread is given something to do."""
        for fault in self._due("disk", "work"):
            self._met(fault, "disk")
            self._order(fault)

    def quiet(self) -> None:
        """For the loop, before time moves on: what the driver has got to."""
        driver = self._simulation.driver
        for fired in self.fired:
            if fired.recovered is None:
                if fired.fault.kind == "scale" and fired.name != "learner":
                    back = (driver.generators if fired.name == "generator" else driver.rewarders).complete
                else:
                    back = fired.name in ("learner", "driver", "disk") and driver.step > fired.step
                if back:
                    self._recovered(fired)
        here = {"step": driver.step, "checkpoint": driver.training.saved, "gate": driver.books.gate.version}
        for moment in [m for m, number in here.items() if driver.started and number != self._been.get(m, number)]:
            for fault in self._due("driver", moment):
                self._met(fault, "driver")
                self._order(fault)
        self._been = here if driver.started else {}

    # ---- for shells ----

    async def meet(self, worker: Mortal, method: str, call: Callable[[], Awaitable[Any]], *args: Any) -> Any:
        """The call, and what befalls it."""
        wrong = await self._strike(worker, method)
        if method == "step":
            self.given += [(worker.version, i.info.prompt_id, digest(i.scored)) for i in args[0]]  # type: ignore[attr-defined]
        result = await call()
        wrong = await self._strike(worker, f"{method} done") or wrong
        if wrong:
            result = _corrupted(worker, method, result)
        if method == "generate":
            return [asyncio.ensure_future(self._later(worker, "answer", answer)) for answer in result]
        if method == "save" and worker.name == "learner":
            return asyncio.ensure_future(self._later(worker, "written", result))
        if method == "score":
            self.scored.setdefault(result.info.prompt_id, set()).add(digest(result.payload))
        self._done(worker, method)
        return result

    async def _later(self, worker: Mortal, method: str, result: Awaitable[Any]) -> Any:
        """What a call has returned to be awaited."""
        future = asyncio.ensure_future(result)
        try:
            return await self.meet(worker, method, lambda: future)
        finally:
            future.cancel()

    async def _strike(self, worker: Mortal, moment: str) -> bool:
        """Whether the result is to be wrong; the other faults are acted on."""
        wrong = False
        if self._failing.get(worker, 0.0) > self._now() and moment in WORK:
            raise EngineError(f"{worker.name} fails for a while {MARK}")
        for fault in self._due(worker.name.partition("-")[0], moment):
            self._met(fault, worker.name)
            match fault.kind:
                case "die":
                    worker.kill(f"SIGKILL {MARK}")
                    worker.check()
                case "hang":
                    worker.stall()
                    await asyncio.Future()
                case "wedge":
                    await asyncio.Future()
                case "slow":
                    self._slow(worker, fault.value)
                case "fail":
                    raise (LearnerError if worker.name == "learner" else EngineError)(f"{moment} failed {MARK}")
                case "corrupt":
                    wrong = True
                case "refuse":
                    raise BadRollout(f"a group is refused {MARK}", kind="shape", generator="generator-0")
                case "lose":
                    raise HandleLost(f"{worker.name} cannot have what it was given {MARK}")
                case _:
                    await self._driver(fault)
        return wrong

    def _done(self, worker: Mortal, method: str) -> None:
        self.calls += method != "progress"
        if method in WORK:
            for fired in self.fired:
                if fired.recovered is None and fired.name == worker.name != "learner":
                    self._recovered(fired)

    # ---- small things ----

    def _on_time(self, fault: Fault) -> None:
        simulation = self._simulation
        if fault.kind in ("scale", "damage", "stop", "interrupt", "kill"):
            if fault.kind != "scale" or simulation.driver.started:
                self._met(fault, fault.role if fault.kind == "scale" else "driver")
                self._order(fault)
            return
        workers: list[Mortal] = [w for w in getattr(simulation, f"{fault.role}s") if w.alive and not w.stalled]
        if not workers:
            return
        worker = workers[fault.which % len(workers)]
        self._met(fault, worker.name)
        match fault.kind:
            case "die":
                worker.kill(f"SIGKILL {MARK}")
            case "hang":
                worker.stall()
            case "slow":
                self._slow(worker, fault.value)
            case "fail":
                self._failing[worker] = self._now() + fault.value

    async def _driver(self, fault: Fault) -> None:
        self._order(fault)
        if self._simulation.killed:
            await asyncio.Future()

    def _order(self, fault: Fault) -> None:
        """To the driver."""
        driver = self._simulation.driver
        match fault.kind:
            case "kill":
                self._simulation.kill()
            case "stop":
                driver.stop()
            case "interrupt":
                driver.stop()
                driver.stop()
            case "damage":
                hurt(
                    Damage(DAMAGE[int(100 * fault.value) % len(DAMAGE)], "checkpoint", fault.value),
                    driver.checkpoints.directory.parent,
                )
            case "scale":
                key = {"generator": "generators", "rewarder": "reward_workers", "learner": "learner_ranks"}[fault.role]
                driver.scale(Sizes.model_validate({key: int(fault.value)}))

    def _slow(self, worker: Mortal, seconds: float) -> None:
        worker.slow_down(SLOWER)
        at(seconds, lambda: worker.slow_down(1.0))

    def _due(self, role: str, moment: str) -> list[Fault]:
        self._counts[role, moment] += 1
        count = self._counts[role, moment]
        return [f for f in self._moments if (f.role, f.moment, f.when) == (role, moment, count)]

    def _met(self, fault: Fault, name: str) -> None:
        self.fired.append(Fired(fault, name, self._now(), self._simulation.driver.step))

    def _recovered(self, fired: Fired) -> None:
        fired.recovered = self._now() - fired.at

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


class Shell:
    """A worker as the driver sees it, with faults in between."""

    def __init__(self, worker: Mortal, faults: Faults) -> None:
        self.name = worker.name
        self._worker = worker
        self._faults = faults

    def __getattr__(self, method: str) -> Callable[..., Awaitable[Any]]:
        call = getattr(self._worker, method)

        async def met(*args: Any) -> Any:
            return await self._faults.meet(self._worker, method, lambda: call(*args), *args)

        return met


def digest(scored: ScoredGroup) -> str:
    """Of the tokens, versions and scores of a group."""
    out = hashlib.sha256(scored.group.prompt.id.encode())
    for rollout, reward in zip(scored.group.rollouts, scored.rewards, strict=True):
        out.update(rollout.token_ids.tobytes() + rollout.behavior_logprobs.tobytes())
        spans = [tuple(span) for span in rollout.version_spans]
        out.update(f"{spans} {reward.status} {reward.score}".encode())
    return out.hexdigest()


def _corrupted(worker: Mortal, method: str, result: Any) -> Any:
    """What a worker says that has gone wrong without knowing it. Raises what the boundary says to it."""
    match worker.name.partition("-")[0], method:
        case ("generator", "update") | ("learner", "publish"):
            return replace(result, version=result.version - 1)
        case "learner", "step":
            return replace(result, version=result.version + 1)
        case "learner", "load":
            return result + 1
        case "rewarder", "score":
            rewards = tuple(Reward("timeout", float("nan"), {}, MARK) for _ in result.payload.rewards)
            group = replace(result.payload, rewards=rewards)
            return Scored(group_info(group.group, rewards), group)
        case "generator", "answer":
            raise EngineError(f"{worker.name}: refused: a log-prob is not finite {MARK}")
    raise RlsysError(f"{worker.name} cannot be wrong in {method}")


def hurt(damage: Damage, run_dir: Path) -> bool:
    """Do damage to a file, if there is one of its kind."""
    rng = random.Random(damage.place)
    checkpoints = sorted((run_dir / "checkpoints").glob("step-*"))
    if damage.where == "pending":
        files = sorted((run_dir / "rollouts" / "pending").glob("*.parquet"))
    elif not checkpoints:
        return False
    else:
        hit = checkpoints[-1] if rng.random() < 0.7 else rng.choice(checkpoints)
        if damage.what == "no manifest":
            (hit / MANIFEST).unlink(missing_ok=True)
            return True
        if damage.what == "half-written":
            aside = hit.parent / f".step-{int(hit.name[5:]) + 1:06d}.tmp" / "learner"
            aside.mkdir(parents=True, exist_ok=True)
            (aside / "learner.json").write_text('{"version": ')
            return True
        files = sorted(p for p in hit.rglob("*") if p.is_file())
    if not files:
        return False
    file = rng.choice(files)
    content = file.read_bytes()
    place = rng.randrange(len(content))
    match damage.what:
        case "flip":
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        case "truncate":
            file.write_bytes(content[:place])
        case "delete":
            file.unlink()
    return True
