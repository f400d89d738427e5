"""The reward worker: scores groups by the reward functions, which run in a child process.

    score(group) -> calls -> [socket] -> child -> [socket] -> Rewards -> ScoredGroup

A call is one function on one rollout. A child that hangs is killed, one that dies is replaced; every other call that
it had is run again, and only the culprit's rollout goes unscored (see `calls`).
"""

from __future__ import annotations

import asyncio
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from rlsys.config.models import RewardsConfig
from rlsys.errors import ConfigError, RewardError, RewardSetupError
from rlsys.rewards import LARGEST, RewardFunction, Sample
from rlsys.rewards.calls import Call, CallQueue
from rlsys.rewards.link import HEADER, pack
from rlsys.rewards.setup import applicable, build_functions
from rlsys.secrets import without_secrets
from rlsys.types import Reward, RewardStatus, RolloutGroup, ScoredGroup

_BOOT = "import sys; sys.path[:] = {path!r}; from rlsys.rewards.child import main; main({descriptor})"
_DRAIN_S = 1.0  # for what a killed child had still sent


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one function said of one rollout."""

    status: RewardStatus
    components: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""


@dataclass(slots=True)
class _Job:
    """A group that is being scored."""

    group: RolloutGroup
    functions: Sequence[int]
    finished: asyncio.Future[None]
    outcomes: dict[Call, _Outcome] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.outcomes) == len(self.functions) * len(self.group.rollouts)


class RewardWorker:
    """Scores groups; calls of `score` may overlap. Use it within one event loop, `start` first and `close` last.

    `search_path` is where the child looks for modules; by default this process' own path, then the
    working directory.
    """

    def __init__(
        self, config: RewardsConfig, name: str = "rewards-0", search_path: Sequence[str] | None = None
    ) -> None:
        self.name = name
        self._config = config
        self._functions = build_functions(config)
        self._search_path = list(search_path) if search_path is not None else default_search_path()
        self._jobs: dict[int, _Job] = {}
        self._next_job = 0
        self._child: _Child | None = None
        self._work = asyncio.Event()  # set while there is a reason to have a child
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._supervisor: asyncio.Task[None] | None = None
        self._ended_by: Exception = RuntimeError(f"{name} was closed")

    async def start(self) -> None:
        """Start the child, with every function imported. Raises RewardSetupError."""
        self._child, is_async = await _Child.start(self._functions, self._config, self._search_path)
        self._calls = CallQueue(is_async.__getitem__, self._config.timeout_s, self._config.concurrency)
        self._supervisor = asyncio.create_task(self._supervise(self._child), name=f"{self.name} supervisor")
        await asyncio.sleep(0)  # let it begin: cancelled before that, it would not end the child

    async def score(self, group: RolloutGroup) -> ScoredGroup:
        """Score every rollout by every function that applies to its task.

        Raises ConfigError when none applies, RewardError when one fails and `on_failure` is "stop", RewardSetupError
        when a function can no longer be imported.
        """
        if self._supervisor is None:
            raise RuntimeError(f"{self.name} was not started")
        if self._supervisor.done():
            raise self._ended_by
        chosen = applicable(self._config, group.prompt.task)
        if not chosen:
            raise ConfigError(f"rewards.functions: none applies to the task {group.prompt.task!r}")
        number, self._next_job = self._next_job, self._next_job + 1
        job = _Job(group, chosen, asyncio.get_running_loop().create_future())
        self._jobs[number] = job
        try:
            if group.rollouts:
                samples = range(len(group.rollouts))
                self._calls.add(number, (Call(number, sample, function) for sample in samples for function in chosen))
                self._dispatch()
                await job.finished
            return self._scored(number, job)
        finally:
            del self._jobs[number]
            self._calls.drop(number)
            if self._child is not None:
                self._child.forget(number)

    async def close(self) -> None:
        """End the child. Groups that are being scored raise RuntimeError."""
        if self._supervisor is None:
            return
        self._supervisor.cancel()
        await asyncio.wait([self._supervisor])

    @property
    def pid(self) -> int | None:
        """Of the child; None between two children."""
        return self._child.pid if self._child is not None else None

    async def _supervise(self, child: _Child) -> None:
        """Serve one child after the other."""
        try:
            while True:
                self._child = child
                self._dispatch()
                await self._receive(child)
                self._child = None
                code = await child.end()
                self._settle_lost(child.killed_at, code)
                if not self._calls.waiting:
                    self._work.clear()
                    await self._work.wait()
                child, _ = await _Child.start(self._functions, self._config, self._search_path)
        except Exception as failure:  # it reaches everyone who waits for a score, or will
            self._ended_by = failure
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._child = None
            await child.end()
            for job in self._jobs.values():
                if not job.finished.done():
                    job.finished.set_exception(self._ended_by)

    def _dispatch(self) -> None:
        """Send what can be sent."""
        self._work.set()
        child = self._child
        if child is None:
            return
        calls = self._calls.take(time.monotonic())
        for number in {call.job for call in calls} - child.groups:
            child.send_group(number, _samples(self._jobs[number].group))
        if calls:
            child.send(("call", calls))
        self._arm()

    def _arm(self) -> None:
        """Have `_expire` called at the next deadline; a timer that is set for an earlier time stays."""
        deadline = self._calls.deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), self._expire)

    def _expire(self) -> None:
        self._timer = None
        deadline = self._calls.deadline()
        if self._child is not None and deadline is not None and time.monotonic() >= deadline:
            self._child.kill()
        else:
            self._arm()

    async def _receive(self, child: _Child) -> None:
        """Take answers until the child is gone."""
        while (answer := await child.receive()) is not None:
            kind, call, content, at = answer
            self._calls.done(call, at)
            if kind == "value":
                self._record(call, self._valued(call, content))
            elif kind == "timeout":
                self._record(call, _Outcome("timeout", detail=f"took more than {self._config.timeout_s:g} s"))
            else:
                self._record(call, _Outcome("error", detail=content))
            if child.killed_at is None:
                self._dispatch()

    def _valued(self, call: Call, components: Mapping[str, float]) -> _Outcome:
        """A score outside the range that its function declares is none: neither cut off at the range nor 0."""
        declared, score = self._config.functions[call.function].range, components["score"]
        if declared is not None:
            low, high = declared
            # As float32, in which they travel on: a sum of parts that is 1 but for its last digit is 1.
            if not np.float32(low) <= np.float32(score) <= np.float32(high):
                return _Outcome("error", detail=f"returned {score}, outside of its range [{low:g}, {high:g}]")
        return _Outcome("ok", components)

    def _settle_lost(self, killed_at: float | None, code: int) -> None:
        """Give up the culprit of a lost child; the rest waits for the next one."""
        for call in self._calls.lost(killed_at if killed_at is not None else time.monotonic(), killed_at is not None):
            if killed_at is not None:
                detail = f"took more than {self._config.timeout_s:g} s; its process was killed"
                self._record(call, _Outcome("timeout", detail=detail))
            else:
                self._record(call, _Outcome("error", detail=f"its process died twice ({_exit_text(code)})"))

    def _record(self, call: Call, outcome: _Outcome) -> None:
        job = self._jobs.get(call.job)
        if job is None:
            return  # nobody waits for it any more
        job.outcomes[call] = outcome
        if job.complete and not job.finished.done():
            job.finished.set_result(None)

    def _scored(self, number: int, job: _Job) -> ScoredGroup:
        rewards = tuple(
            self._reward([(f, job.outcomes[Call(number, sample, f)]) for f in job.functions])
            for sample in range(len(job.group.rollouts))
        )
        if self._config.on_failure == "stop":
            for rollout, reward in zip(job.group.rollouts, rewards, strict=True):
                if reward.status != "ok":
                    raise RewardError(
                        f"rewards.on_failure is stop, and scoring {rollout.prompt_id}#{rollout.sample} failed "
                        f"({reward.status}): {reward.detail}"
                    )
        return ScoredGroup(job.group, rewards)

    def _reward(self, outcomes: Sequence[tuple[int, _Outcome]]) -> Reward:
        """The weighted sum over the functions; NaN if one of them failed."""
        components: dict[str, float] = {}
        failures = []
        score = 0.0
        for i, outcome in outcomes:
            function = self._config.functions[i]
            for component, value in outcome.components.items():
                components[function.name if component == "score" else f"{function.name}/{component}"] = value
            if outcome.status == "ok":
                score += function.weight * outcome.components["score"]
            else:
                failures.append((outcome.status, f"{function.name}: {outcome.detail}"))
        if not failures and not abs(score) <= LARGEST:
            failures.append(("error", f"the weighted sum of the functions is {score:g}, which float32 cannot hold"))
        if not failures:
            return Reward("ok", score, components)
        status: RewardStatus = "timeout" if any(s == "timeout" for s, _ in failures) else "error"
        return Reward(status, math.nan, components, "; ".join(detail for _, detail in failures))


class _Child:
    """The parent's end of one child process."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._reader = reader
        self._writer = writer
        self.groups: set[int] = set()  # those that the child holds
        self.killed_at: float | None = None
        self.pid = process.pid

    @classmethod
    async def start(
        cls, functions: Sequence[tuple[str, RewardFunction]], config: RewardsConfig, search_path: Sequence[str]
    ) -> tuple[Self, list[bool]]:
        """Start a child and wait until it has imported the functions; says which are async. Raises RewardSetupError."""
        ours, theirs = socket.socketpair()
        with theirs:
            boot = _BOOT.format(path=list(search_path), descriptor=theirs.fileno())
            # A session of its own: Ctrl-C reaches only the parent, which ends the child; and what the functions start
            # ends with it. Its output goes where ours goes. Not in a thread: Linux would end the child with that
            # thread.
            process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-c", boot],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=without_secrets(os.environ, config.secrets),
            )
        child = cls(process, *await asyncio.open_connection(sock=ours))
        try:
            return child, await child._handshake(functions, config)
        except BaseException:
            await child.end()
            raise

    async def _handshake(self, functions: Sequence[tuple[str, RewardFunction]], config: RewardsConfig) -> list[bool]:
        self.send((list(functions), config.timeout_s))
        try:
            async with asyncio.timeout(config.start_timeout_s):
                answer = await self.receive()
        except TimeoutError:
            names = ", ".join(name for name, _ in functions)
            raise RewardSetupError(
                f"rewards.functions: {names}: not imported within rewards.start_timeout_s = {config.start_timeout_s:g}"
            ) from None
        if answer is None:
            code = await self.end()
            raise RewardSetupError(f"rewards.functions: the process died while importing them ({_exit_text(code)})")
        if answer[0] == "failed":
            raise RewardSetupError(f"rewards.functions: {answer[1]}")
        is_async: list[bool] = answer[1]
        return is_async

    def send(self, message: Any) -> None:
        """Without waiting: what is unsent stays in memory, and is no more than the groups that are being scored."""
        if not self._writer.is_closing():
            self._writer.write(pack(message))

    def send_group(self, number: int, samples: Sequence[Sample]) -> None:
        self.groups.add(number)
        self.send(("group", number, samples))

    def forget(self, number: int) -> None:
        if number in self.groups:
            self.groups.remove(number)
            self.send(("forget", number))

    async def receive(self) -> Any:
        """The next message; None when the child is gone."""
        try:
            (length,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
            return pickle.loads(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    def kill(self) -> None:
        """For a deadline that has passed. `receive` still gives what was sent before."""
        self.killed_at = time.monotonic()
        self._signal()
        # Should a process that left the group hold the connection open, it ends here.
        asyncio.get_running_loop().call_later(_DRAIN_S, self._writer.transport.abort)

    def _signal(self) -> None:
        # Until it is waited for, its number is not given to another process.
        if self._process.returncode is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    async def end(self) -> int:
        """Make sure that the process is gone, and what it started in its group; returns its exit code."""
        self._signal()
        self._writer.close()
        # SIGKILL cannot be refused, so this takes milliseconds.
        return await asyncio.to_thread(self._process.wait)


def default_search_path() -> list[str]:
    """This process' own module path, then the working directory (last, so that nothing in it hides a library)."""
    return [*(entry for entry in sys.path if entry), os.getcwd()]


def _samples(group: RolloutGroup) -> list[Sample]:
    prompt = group.prompt
    return [
        Sample(
            prompt=prompt.text,
            response=rollout.text,
            answer=prompt.answer,
            metadata=prompt.metadata,
            token_ids=array("i", rollout.token_ids.tolist()),
            truncated=rollout.status == "truncated",
            task=prompt.task,
            prompt_id=prompt.id,
            sample=rollout.sample,
        )
        for rollout in group.rollouts
    ]


def _exit_text(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
