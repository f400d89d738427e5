"""Generators, rewarders, a reference and a learner that only take time.

What they produce is a pure function of weights, seeds and prompts, so that two runs can be compared: the learner's
"weights" are a hash over every batch it has trained on, and what a generator samples depends on them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlsys.durable import Files, writing
from rlsys.errors import DataError, EngineError, WorkerDied
from rlsys.metrics import Mean
from rlsys.roles import (
    Branch,
    Generated,
    Handle,
    Probe,
    ProcessReport,
    PromptReport,
    PublishedWeights,
    SampleRow,
    Sampling,
    Scored,
    StepReport,
    TrainItem,
    UpdateReport,
)
from rlsys.segments import Strategy, scored
from rlsys.storage import Place, deliver, fetch, let_go
from rlsys.types import FinishReason, Prompt, Reward, Rollout, RolloutGroup, ScoredGroup, VersionSpan, group_info


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things take, in seconds; `tokens_per_s` of one rollout, None: no time at all.

    Lengths are uniform between the two bounds, times exponential with the given mean (0: none).
    """

    lengths: tuple[int, int] = (4, 32)
    tokens_per_s: float | None = 16.0
    score_s: float = 0.2
    reference_s: float = 0.1
    step_s: float = 1.0
    publish_s: float = 0.1
    update_s: float = 0.2
    spawn_s: float = 2.0
    save_s: float = 0.0

    def slower(self, times: float) -> Timing:
        """Everything takes so many times as long."""
        rate = None if self.tokens_per_s is None else self.tokens_per_s / times
        names = {f.name for f in fields(self) if f.name.endswith("_s")} - {"tokens_per_s"}
        return replace(self, tokens_per_s=rate, **{name: times * getattr(self, name) for name in names})


INSTANT = Timing((16, 16), None, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


async def pause(rng: random.Random, mean_s: float) -> None:
    if mean_s:
        await asyncio.sleep(rng.expovariate(1 / mean_s))


class Mortal:
    """A worker that can be killed (everything fails), made to stall (nothing ever comes back), or slowed down."""

    def __init__(self, name: str, timing: Timing) -> None:
        self.name = name
        self.stalled = False
        self._timing = self._usual = timing
        self._dead: str | None = None
        self._calls: set[asyncio.Future[Any]] = set()
        self._completed = 0

    def kill(self, cause: str = "killed") -> None:
        self._dead = self._dead or cause
        for call in list(self._calls):
            call.cancel()

    def stall(self) -> None:
        self.stalled = True

    def slow_down(self, times: float) -> None:
        """What begins from now on takes so many times as long as usual."""
        self._timing = self._usual.slower(times)

    @property
    def alive(self) -> bool:
        return self._dead is None

    def check(self) -> None:
        if self._dead is not None:
            raise WorkerDied(self.name, self._dead)

    async def living(self, work: Awaitable[Any]) -> Any:
        """The result of the work, unless the worker is killed or stalls first."""
        call = asyncio.ensure_future(work)
        self._calls.add(call)
        try:
            if self._dead is not None:
                call.cancel()
            result = await call
            if self.stalled:
                await asyncio.Future()  # until the caller gives up
        except asyncio.CancelledError:
            if self._dead is not None and call.cancelled():
                raise WorkerDied(self.name, self._dead) from None
            call.cancel()
            raise
        finally:
            self._calls.discard(call)
        self.check()
        self._completed += 1
        return result

    async def progress(self) -> int:
        """Completed calls; never comes back from a worker that stalls."""
        self.check()
        if self.stalled:
            await asyncio.Future()
        return self._completed

    async def inspect(self) -> list[ProcessReport]:
        stacks = "" if self._dead is not None else "stalled" if self.stalled else "alive"
        return [ProcessReport(self.name, "simulated", 0, stacks, "")]

    async def close(self) -> None:
        self.kill("closed")


class SimGenerator(Mortal):
    """Samples `lengths` tokens per rollout; tokens sampled after an update carry the new version."""

    def __init__(self, name: str, timing: Timing, seed: int, failure_rate: float = 0.0) -> None:
        super().__init__(name, timing)
        self._rng = random.Random(f"{name}/{seed}")
        self._failure_rate = failure_rate
        self._history: list[tuple[float, int, str]] = []  # when a version arrived, and its state
        self._running: dict[int, tuple[float, int]] = {}
        self._finished_tokens = 0
        self.calls: list[tuple[str, ...]] = []

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Sequence[Awaitable[Generated]]:
        self.check()
        if not self._history:
            raise EngineError(f"{self.name} has no weights")
        self.calls.append(tuple(prompt.id for prompt in prompts))
        return [asyncio.ensure_future(self.living(self._sample(prompt, sampling))) for prompt in prompts]

    async def progress(self) -> int:
        self.check()
        if self.stalled:
            return self._finished_tokens
        now, rate = asyncio.get_running_loop().time(), self._timing.tokens_per_s or 0.0
        return self._finished_tokens + sum(min(n, int((now - t) * rate)) for t, n in self._running.values())

    async def update(self, weights: PublishedWeights) -> UpdateReport:
        await self.living(pause(self._rng, self._timing.update_s))
        self._history.append((asyncio.get_running_loop().time(), weights.version, weights.payload))
        return UpdateReport(self.name, weights.version, 0.01, 0.02, 0.03, 1024, 0.0)

    async def _sample(self, prompt: Prompt, sampling: Sampling) -> Generated:
        started = asyncio.get_running_loop().time()
        first = len(self._history) - 1
        state = self._history[first][2]
        rng = random.Random(f"{state}/{prompt.seed}")
        wanted = [rng.randint(*self._timing.lengths) for _ in range(sampling.n)]
        lengths = [min(length, sampling.max_new_tokens) for length in wanted]
        rate = self._timing.tokens_per_s
        key = id(rng)
        if rate:
            self._running[key] = (started, max(lengths))
            try:
                await asyncio.sleep(max(lengths) / rate)
            finally:
                del self._running[key]
        self._finished_tokens += sum(lengths)
        if self._rng.random() < self._failure_rate:
            raise EngineError(f"{self.name} failed at {prompt.id}")
        history = self._history[first:]
        group = RolloutGroup(
            prompt,
            tuple(
                _rollout(prompt, i, n, rng, _spans(history, started, rate, n), "stop" if n == wanted[i] else "length")
                for i, n in enumerate(lengths)
            ),
            self.name,
        )
        return Generated(group_info(group), group)


def _spans(
    history: Sequence[tuple[float, int, str]], started: float, rate: float | None, length: int
) -> tuple[VersionSpan, ...]:
    """Token i is sampled at `started + i / rate`, by the newest version that had arrived then."""
    starts = [0] + [min(length, int(np.ceil((at - started) * (rate or 0.0)))) for at, _, _ in history[1:]]
    ends = [*starts[1:], length]
    return tuple(VersionSpan(v, a, b) for (_, v, _), a, b in zip(history, starts, ends, strict=True) if b > a)


def _rollout(
    prompt: Prompt, sample: int, n: int, rng: random.Random, spans: tuple[VersionSpan, ...], finish: FinishReason
) -> Rollout:
    tokens = np.frombuffer(rng.randbytes(n), np.uint8).astype(np.int32)
    return Rollout(
        prompt_id=prompt.id,
        sample=sample,
        token_ids=tokens,
        action_mask=np.ones(n, bool),
        behavior_logprobs=np.full(n, -1.0, np.float32),
        version_spans=spans,
        finish_reason=finish,
        text="x" * n,
    )


class SimRewarder(Mortal):
    """Scores 0 or 1 by the parity of the tokens' sum; now and then a reward times out."""

    def __init__(
        self, name: str, timing: Timing, seed: int, timeout_rate: float = 0.0, strategy: Strategy | None = None
    ) -> None:
        super().__init__(name, timing)
        self._rng = random.Random(f"{name}/{seed}")
        self._timeout_rate = timeout_rate
        self._strategy = strategy

    async def branch(self, rounds: Sequence[Sequence[Handle]]) -> Sequence[Branch]:
        self.check()
        return [] if self._strategy is None else self._strategy.branch(rounds)

    async def score(self, rounds: Sequence[Sequence[Handle]], training: bool) -> Scored:
        found = await self.living(scored(self._strategy if training else None, rounds, self._score))
        return Scored(group_info(found.group, found.rewards), found)

    async def _score(self, group: RolloutGroup) -> ScoredGroup:
        await pause(self._rng, self._timing.score_s)
        rewards = tuple(
            Reward("timeout", float("nan"), {}, "no answer")
            if self._rng.random() < self._timeout_rate
            else Reward("ok", float(int(r.token_ids.sum()) % 2), {"parity": float(int(r.token_ids.sum()) % 2)})
            for r in group.rollouts
        )
        return ScoredGroup(group, rewards)


class SimReference(Mortal):
    """Its log-probs depend on every version that it has taken in, in order."""

    def __init__(self, name: str, timing: Timing, seed: int) -> None:
        super().__init__(name, timing)
        self._rng = random.Random(f"{name}/{seed}")
        self.state = "initial"
        self.versions: list[int] = []  # that it has taken in

    async def logprobs(self, groups: Sequence[Handle]) -> Sequence[Handle]:
        await self.living(pause(self._rng, self._timing.reference_s))
        level = -1 - random.Random(self.state).random()
        return [tuple(np.full(len(r.token_ids), level, np.float32) for r in group.rollouts) for group in groups]

    async def update(self, weights: PublishedWeights) -> None:
        await self.living(pause(self._rng, self._timing.update_s))
        self.state = hashlib.sha256(f"{self.state}/{weights.payload}".encode()).hexdigest()
        self.versions.append(weights.version)

    async def save(self, place: Place) -> Files:
        await self.living(asyncio.sleep(0))
        text = json.dumps({"versions": self.versions, "state": self.state})
        return deliver(place, lambda folder: (folder / "reference.json").write_text(text))

    async def load(self, place: Place) -> int:
        self.check()
        saved = json.loads((fetch(place) / "reference.json").read_text())
        let_go(place)
        self.versions, self.state = saved["versions"], saved["state"]
        return self.versions[-1] if self.versions else 0


@dataclass(slots=True)
class TrainedBatch:
    """What one step was given."""

    version: int  # of the learner before the step
    prompt_ids: tuple[str, ...]
    oldest: int  # smallest version among the tokens


class SimLearner(Mortal):
    """Its weights are a hash over everything it was trained on, in order."""

    def __init__(self, name: str, timing: Timing, seed: int, skip: Callable[[int], bool] = lambda step: False) -> None:
        super().__init__(name, timing)
        self._rng = random.Random(f"{name}/{seed}")
        self._skip = skip
        self.version = 0
        self.state = "initial"
        self.batches: list[TrainedBatch] = []
        self._saving: asyncio.Future[Files] | None = None

    async def step(self, items: Sequence[TrainItem]) -> StepReport:
        return await self.living(self._step(items))

    async def _step(self, items: Sequence[TrainItem]) -> StepReport:
        await pause(self._rng, self._timing.step_s)
        groups: list[ScoredGroup] = [item.scored for item in items]
        oldest = min(int(r.versions.min()) for g in groups for r in g.rollouts)
        ids = tuple(group.prompt.id for group in groups)
        self.batches.append(TrainedBatch(self.version, ids, oldest))
        self.version += 1
        tokens = sum(item.info.tokens for item in items)
        if self._skip(self.version):
            return StepReport(self.version, {}, tokens, self._timing.step_s, skipped="non-finite gradient")
        digest = hashlib.sha256(self.state.encode())
        for group, item in zip(groups, items, strict=True):
            digest.update(f"{group.prompt.id} {[reward.score for reward in group.rewards]}".encode())
            for array in item.reference or ():
                digest.update(array.tobytes())
            for rollout in group.rollouts:
                digest.update(rollout.token_ids.tobytes())
        self.state = digest.hexdigest()
        prompts = {
            item.info.prompt_id: PromptReport(max(item.info.scores) - min(item.info.scores))
            for item in items
            if item.info.scores
        }
        return StepReport(self.version, {"learner/loss": Mean.of([0.5])}, tokens, self._timing.step_s, prompts=prompts)

    async def prompt_values(self, prompts: Sequence[Prompt]) -> list[float]:
        await self.living(pause(self._rng, self._timing.step_s))
        return [random.Random(f"{self.state}/{prompt.id}").random() for prompt in prompts]

    async def publish(self) -> PublishedWeights:
        await self.living(pause(self._rng, self._timing.publish_s))
        return PublishedWeights(self.version, {}, self.state, Probe((1, 2), (-0.5,)), gather_s=0.01)

    async def save(self, place: Place) -> Awaitable[Files]:
        if self._saving is not None:
            await self.living(asyncio.wait([self._saving]))
        await self.living(asyncio.sleep(0))
        text = json.dumps({"version": self.version, "state": self.state})
        self._saving = asyncio.ensure_future(self.living(self._write(place, text)))
        return self._saving

    async def _write(self, place: Place, text: str) -> Files:
        await pause(self._rng, self._timing.save_s)
        with writing(Path(f"{place}/learner.json")):
            return deliver(place, lambda folder: (folder / "learner.json").write_text(text))

    async def load(self, place: Place) -> int:
        self.check()
        saved = json.loads((fetch(place) / "learner.json").read_text())
        let_go(place)
        self.version, self.state = saved["version"], saved["state"]
        return self.version


@dataclass
class MemoryStore:
    """A rollout store that only counts."""

    pending: dict[str, Handle] = field(default_factory=dict)
    fates: dict[str, int] = field(default_factory=dict)

    async def buffered(self, group: Handle) -> None:
        self.pending[group.prompt.id] = group

    async def settled(
        self, prompt_ids: Sequence[str], fate: str, step: int, reference: Sequence[Handle | None] = ()
    ) -> None:
        for prompt_id in prompt_ids:
            del self.pending[prompt_id]
        self.fates[fate] = self.fates.get(fate, 0) + len(prompt_ids)

    async def load(self, prompt_ids: Sequence[str], step: int) -> Sequence[TrainItem]:
        raise DataError(f"step {step} is not kept")

    async def discard(self, prompt_ids: Sequence[str]) -> None:
        for prompt_id in prompt_ids:
            del self.pending[prompt_id]

    async def load_buffered(self) -> Mapping[str, Scored]:
        return {i: Scored(group_info(g.group, g.rewards), g) for i, g in self.pending.items()}

    async def responses(self, group: Handle) -> Sequence[Mapping[str, Any]]:
        return []

    async def evaluated(self, step: int, responses: Sequence[Mapping[str, Any]]) -> None:
        pass

    async def roll_back(self, version: int) -> None:
        pass

    async def samples(self, step: int, limit: int) -> Sequence[SampleRow]:
        return []

    async def close(self) -> None:
        pass
