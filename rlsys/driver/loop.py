"""The driver: prompts go round, weights come back.

    prompt source ──> admit ──> produce (one coroutine per prompt in flight) ──> buffer ──> consume ──> weights
                        ^          generate > score > store > filter > reference               |          |
                        |                                                                      |          v
                        +───────────────── gate <── every generator has pulled version v <── roll-out <── publish

    loop      consumes             produces            waits for                         is unblocked by
    admit     gate slots, prompts  groups under way    an open slot                      a roll-out, a dropped group
    produce   one prompt           a buffered group    generator, rewarder, reference    their answers, or their leases
    consume   B buffered groups    weight version v+1  a batch that leaves none behind   produce
    roll-out  the newest version   a higher gate       each generator's update           consume
    evaluate  a list of prompts    figures             generators, rewarders             their answers

With bound S >= 1 the loops overlap; with S = 0 the same loops take turns, since the gate opens B slots only when every
generator has version v, and all B prompts of a batch are handed over together. Every call to a role has a deadline;
work at generators and rewarders is leased against progress. What decides is in gate, buffer, router and leases; here it
is acted on.

A run ends when `run.steps` batches are trained, or after `stop()`; in both cases with a checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from rlsys.config.identity import config_hash
from rlsys.config.models import Config
from rlsys.curricula import Curriculum
from rlsys.curricula.in_order import InOrder
from rlsys.driver import options
from rlsys.driver.buffer import GroupBuffer
from rlsys.driver.checkpoints import REFERENCE, Checkpoints, Manifest
from rlsys.driver.drawing import Drawing, PromptStream
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.gate import StalenessGate
from rlsys.driver.progress import Recorder, Totals, packages
from rlsys.driver.recovery import recover
from rlsys.driver.waiting import Bell, gathered, within
from rlsys.driver.weights import WeightRollout
from rlsys.driver.workers import GeneratorPool, PoolEvents, Request, RewarderPool, Rounds, WorkFailed
from rlsys.errors import EngineError, LearnerError, RlsysError, RunDirError, SegmentError, WorkerDied, first_of
from rlsys.ledger.ledger import Ledger
from rlsys.metrics import reduce
from rlsys.roles import Branch, Generated, Handle, Reference, Roles, Scored, StepReport, Tracker, TrainItem
from rlsys.segments import Strategy
from rlsys.types import GroupInfo, Progress, Prompt

logger = logging.getLogger(__name__)

FRUITLESS_BATCHES = 100  # dropped groups in a row, in batches, without a step: then nothing is left to learn from

T = TypeVar("T")


class GroupFilter(Protocol):
    def drop_reason(self, info: GroupInfo) -> str | None:
        """Why a scored group is to be dropped and replaced; None to keep it."""
        ...


class Driver:
    """Runs the whole loop over the given roles.

    Closes neither roles, store nor ledger: whoever made them does. `roles.generators` and `roles.rewarders` are kept up
    to date when workers are restarted.
    """

    def __init__(
        self,
        config: Config,
        roles: Roles,
        ledger: Ledger,
        prompts: PromptStream,
        tracker: Tracker,
        run_dir: Path,
        eval_prompts: Sequence[Prompt] = (),
        filters: Sequence[GroupFilter] = (),
        curriculum: Curriculum | None = None,
        strategy: Strategy | None = None,
        with_greedy: bool = False,
        with_expert: bool = False,
    ) -> None:
        """Prompts come in order without a `curriculum`, and are sampled and no more without a `strategy`.

        `with_greedy`, `with_expert`: groups hold a greedy rollout, a demonstration, beside the samples.
        """
        self.config = config
        self.roles = roles
        self.ledger = ledger
        self.tracker = tracker
        self.filters = filters
        self.batch = config.driver.prompts_per_step
        self.bound = config.driver.max_staleness
        self.steps = config.run.steps
        self.step = 0  # batches consumed, which is also the learner's version
        self.gate = StalenessGate(self.batch, self.bound)
        self.buffer: GroupBuffer[TrainItem] = GroupBuffer(self.batch, self.bound)
        keep = config.checkpoint
        self.checkpoints = Checkpoints(run_dir / "checkpoints", keep.keep_last, keep.keep_best, keep.keep_every)
        self.bell = Bell(options.patience(config), self._state)
        events = PoolEvents(self.bell.ring, self._assigned, self._failed, self._lost, self._restarted)
        self.recorder = Recorder(tracker)
        self.generators = GeneratorPool(
            options.generator_options(config, events),
            roles.generators,
            roles.spawn_generator,
            self._spawn,
            config.weights.timeout_s,
            self.recorder.updated,
        )
        self.rewarders = RewarderPool(
            options.rewarder_options(config, events, strategy), roles.rewarders, roles.spawn_rewarder, self._spawn
        )
        self.weights = WeightRollout(self.generators, self.bell, self._rolled_out)
        self.evaluator = Evaluator(
            *(self.generators, self.rewarders, self.weights, self.recorder, ledger, eval_prompts),
            options.evaluation_sampling(config),
            config.eval.timeout_s,
        )
        self.strategy = strategy
        sampling = options.training_sampling(config, with_greedy, with_expert)
        if strategy is not None:
            sampling = strategy.first(sampling)
        self.drawing = Drawing(prompts, curriculum or InOrder(), sampling, config.run.seed)
        self._stops = 0
        self._held = False  # S = 0: no new prompts during an evaluation or a checkpoint
        self._fruitless = 0
        self._saved = -1  # version of the newest checkpoint
        self._position = 0  # of the ledger, at the end of the newest step
        self._main: asyncio.Task[Any] | None = None
        self._tasks: asyncio.TaskGroup
        self._background: set[asyncio.Task[None]] = set()
        self._writing: set[asyncio.Task[None]] = set()

    async def run(self) -> dict[str, Any]:
        """Train until the last step or `stop()`; returns the summary, which the tracker has been given, too.

        Raises the first RlsysError that ends the run; whatever was done is in ledger, store and checkpoints.
        """
        self._main = asyncio.current_task()
        summary: dict[str, Any] = {}
        self.recorder.begin()
        try:
            async with asyncio.TaskGroup() as self._tasks:
                try:
                    await self._start()
                    admission = self._spawn(self.admit())
                    await self.consume()
                    admission.cancel()
                    await self._finish()
                finally:
                    self._end()
        except BaseExceptionGroup as group:
            raise first_of(group) from None
        finally:
            try:
                summary = self._summary()
            finally:
                self.tracker.finish(summary)
        return summary

    def stop(self) -> None:
        """First call: end after the current step, with a checkpoint. Second call: end at once."""
        self._stops += 1
        if self._stops == 1:
            self.bell.ring()
        elif self._main is not None:
            self._main.cancel()

    # ---- the loops ----

    async def admit(self) -> None:
        """Start as many prompts as there are slots, for ever."""
        while True:
            await self.bell.until(lambda: self._slots() > 0, "an open slot of the staleness gate")
            prompts = self.drawing.draw(self._slots(), Progress(self.step, self.steps))
            if self.strategy is not None:
                prompts = [self.strategy.start(prompt) for prompt in prompts]
            self.gate.start(len(prompts))
            for prompt in prompts:
                self.ledger.drawn(prompt, self.drawing.choice(prompt.index))
                self.buffer.start(prompt.index, self.gate.version)
            self.recorder.sampling(len(prompts))
            answers = self.generators.submit(
                [Request(prompt, self.drawing.sampling(prompt), training=True) for prompt in prompts]
            )
            for prompt, answer in zip(prompts, answers, strict=True):
                self._spawn(self.produce(prompt, answer))

    async def produce(self, prompt: Prompt, generating: Awaitable[Any]) -> None:
        """One prompt from its samples to the buffer, or to the reason why it is dropped."""
        try:
            generated, _ = await generating
        except WorkFailed as error:
            return await self._drop(prompt, f"generation failed: {error}")
        finally:
            self.recorder.sampling(-1)
        info: GroupInfo = generated.info
        self.recorder.generated(info)
        self.ledger.sampled(info)
        try:
            rounds, later = await self._branch(prompt, generated)
            [scoring] = self.rewarders.submit([Rounds(rounds, training=True)])
            scored, rewarder = await scoring
        except SegmentError as error:
            return await self._drop(prompt, f"segments failed: {error}", info)
        except WorkFailed as error:
            return await self._drop(prompt, f"rewards failed: {error}", info)
        self.ledger.scored(scored.info, rewarder)
        await self._store(self.roles.store.buffered(scored.payload))
        self.drawing.carry(prompt.index, later)
        await self._buffer(prompt, scored)

    async def consume(self) -> None:
        """Train on one batch after the other. The roll-out of the new weights goes on behind it."""
        while self.step < self.steps and (items := await self._take()) is not None:
            await self._train(items)
            due = self.config.eval.every, self.config.checkpoint.every
            evaluate, save = (every > 0 and self.step % every == 0 and self.step < self.steps for every in due)
            self._held = self.bound == 0 and (evaluate or save)  # before the gate can open
            await self._publish(moves_reference=True)
            if evaluate:
                evaluation = self._spawn(self.evaluator.meanwhile(self.step, self.config.eval.every_prompts))
                if self._held:
                    await self._unless_stopped(evaluation)
            if save:
                await self._checkpoint()
            self._held = False
            self.bell.ring()

    # ---- parts of producing ----

    def _slots(self) -> int:
        """Prompts to start now."""
        if self._stops or self._held or (self.bound == 0 and self.buffer.under_way):
            return 0  # S = 0: a batch is sampled in waves, so that its composition does not depend on timing
        slots, most = self.gate.open_slots(), self.config.driver.max_groups_in_flight
        return slots if most is None else max(0, min(slots, most - self.buffer.under_way))

    async def _branch(self, prompt: Prompt, generated: Generated) -> tuple[list[list[Handle]], Sequence[Branch]]:
        """Sample on from what there is, round by round, for as long as the strategy asks for more.

        Returns the rounds, and what is to go on in a later step.
        """
        rounds = [[generated.payload]]
        while self.strategy is not None and (self.strategy.branches or self.strategy.defers):
            [asked] = self.rewarders.submit([Rounds(rounds, training=True, branch=True)])
            branches, _ = await asked
            if not branches:
                break
            if self.strategy.defers:
                return rounds, branches
            base = self.drawing.sampling(prompt)
            requests = [
                Request(b.prompt, replace(base, n=b.n, max_new_tokens=b.max_new_tokens), training=True, root=prompt.id)
                for b in branches
            ]
            self.recorder.sampling(len(requests))
            try:
                answers = await gathered(self.generators.submit(requests))
            finally:
                self.recorder.sampling(-len(requests))
            infos = [found.info for found, _ in answers]
            self.ledger.branched(prompt.id, len(infos), sum(info.sampled_tokens for info in infos))
            for info in infos:
                self.recorder.generated(info)
            rounds.append([found.payload for found, _ in answers])
        return rounds, ()

    async def _buffer(self, prompt: Prompt, scored: Scored) -> None:
        """A scored group that is on disk: filter it, have the reference score it, let the learner have it."""
        info = scored.info
        if reason := self._reject(info):
            return await self._drop(prompt, reason, info, on_disk=True)
        reference = None
        if self.roles.reference is not None:
            reference = await self._reference(self.roles.reference.logprobs(scored.payload), f"score {prompt.id}")
        self.ledger.buffered(info)
        self.buffer.finish(prompt.index, info.min_version, TrainItem(info, scored.payload, reference))
        self.bell.ring()

    def _reject(self, info: GroupInfo) -> str | None:
        if "ok" not in info.reward_statuses:
            return f"rewards failed: {', '.join(sorted(set(info.reward_statuses)))}"
        if info.tokens == 0:
            return "no response tokens"
        return next((reason for f in self.filters if (reason := f.drop_reason(info))), None)

    async def _drop(self, prompt: Prompt, reason: str, info: GroupInfo | None = None, on_disk: bool = False) -> None:
        """Record why a group under way is given up, and free its slot."""
        self.ledger.dropped(prompt.id, reason, self.step)
        self.buffer.drop(prompt.index)
        self.drawing.ended(prompt.index, info)
        self.gate.drop()
        self._fruitless += 1
        self.recorder.dropped(info)
        self.bell.ring()
        if self._fruitless >= FRUITLESS_BATCHES * self.batch:
            raise RlsysError(
                f"{self._fruitless} groups in a row were dropped since step {self.step}, the last for {reason!r}: "
                "nothing is left to train on"
            )
        if on_disk:
            await self._store(self.roles.store.settled([prompt.id], f"dropped: {reason}", self.step))

    # ---- parts of consuming ----

    async def _take(self) -> list[TrainItem] | None:
        """The next batch; None when the run is stopped first."""
        started = self.recorder.now()
        while not self._stops:
            await self._expire()
            if self.buffer.ready(self.step):
                self.recorder.waited(self.recorder.now() - started)
                return [entry.item for entry in self.buffer.take(self.step)]
            await self.bell.until(lambda: self._stops > 0 or self.buffer.ready(self.step), "a full batch")
        return None

    async def _expire(self) -> None:
        """The hard bound on staleness: admission keeps groups from getting here; one that does is dropped and shown."""
        for entry in self.buffer.expire(self.step):
            info = entry.item.info
            reason = f"stale: its oldest token is of version {entry.version}, the learner is at {self.step}"
            self.ledger.dropped(info.prompt_id, reason, self.step)
            self.drawing.ended(info.index, info)
            self.gate.drop()
            self.recorder.dropped(info)
            self.bell.ring()
            await self._store(self.roles.store.settled([info.prompt_id], f"dropped: {reason}", self.step))

    async def _train(self, items: Sequence[TrainItem]) -> None:
        started = self.recorder.now()
        report = await self._learner(self.roles.learner.step(items), "take a step")
        if report.version != self.step + 1:
            raise LearnerError(f"the learner made version {report.version}, expected {self.step + 1}")
        self.step = report.version
        self._fruitless = 0
        infos = [item.info for item in items]
        fate = self._settle(infos, report)
        self._position = self.ledger.position
        self.recorder.event(f"step {self.step}", started, self.recorder.now(), "learner")
        chosen = self.drawing.observe(report, infos, reduce(report.metrics))
        self.recorder.step(report, infos, chosen, self.buffer.under_way, self.buffer.finished)
        writing = self._spawn(self._to_disk([info.prompt_id for info in infos], fate, self.step))
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)

    def _settle(self, infos: Sequence[GroupInfo], report: StepReport) -> str:
        """Fates of a batch. A skipped step has used its prompts up, but trained on none of them."""
        if report.skipped is None:
            self.ledger.trained([info.prompt_id for info in infos], report.version)
            return "trained"
        for info in infos:
            self.ledger.dropped(info.prompt_id, f"step skipped: {report.skipped}", self.step)
        return f"dropped: step skipped: {report.skipped}"

    async def _to_disk(self, prompt_ids: Sequence[str], fate: str, step: int) -> None:
        every, rows = self.config.trackers.wandb.table_every, self.config.trackers.wandb.table_rows
        await self._store(self.roles.store.settled(prompt_ids, fate, step))
        if every and step % every == 0 and (samples := await self._store(self.roles.store.samples(step, rows))):
            self.tracker.log_samples(step, samples)

    async def _publish(self, moves_reference: bool = False) -> None:
        """`moves_reference`: these weights are new, so a reference that follows the policy takes them when it is due.

        It does so before any generator has them: with a bound of 0, every group is scored by the reference of its step.
        """
        started = self.recorder.now()
        weights = await self._learner(self.roles.learner.publish(), "publish its weights")
        self.recorder.published(weights)
        self.recorder.event(f"publish {weights.version}", started, self.recorder.now(), "learner")
        if moves_reference and self._moving is not None and weights.version % self.config.reference.every == 0:
            started = self.recorder.now()
            await self._reference(self._moving.update(weights), f"take version {weights.version}")
            self.recorder.reference(weights.version)
            self.recorder.event(f"update to {weights.version}", started, self.recorder.now(), "reference")
        if self.drawing.curriculum.needs_values:
            await self._judge()
        self.weights.publish(weights)

    async def _judge(self) -> None:
        """Ask the critic about the prompts that may come next, before the gate opens for them."""
        candidates = self.drawing.candidates((self.bound + 1) * self.batch)
        values = await self._learner(self.roles.learner.prompt_values(list(candidates.values())), "judge prompts")
        self.drawing.curriculum.judged(dict(zip(candidates, values, strict=True)))

    @property
    def _moving(self) -> Reference | None:
        """The reference, where it follows the policy."""
        return None if self.config.reference.update == "frozen" else self.roles.reference

    async def _checkpoint(self) -> None:
        """Save the learner, and where everything else stands. Production goes on meanwhile."""
        started = self.recorder.now()
        directory = await asyncio.to_thread(self.checkpoints.begin, self.step)
        manifest = Manifest(
            version=self.step,
            position=self._position,
            next_index=self.drawing.next_index,
            buffered=[item.info.prompt_id for item in self.buffer.waiting()],
            seed=self.config.run.seed,
            config=config_hash(self.config),
            totals=self.recorder.snapshot(),
            drawing=self.drawing.state_dict(),
        )
        try:
            writing = await self._learner(self.roles.learner.save(directory), "copy its state for a checkpoint")
            if self._moving is not None:
                place = directory.parent / REFERENCE
                await asyncio.to_thread(place.mkdir)
                await self._reference(self._moving.save(place), "save a checkpoint")
            await self._learner(writing, "save a checkpoint")
            if self._writing:  # what the checkpoint counts as trained is in the store
                await self._store(asyncio.wait(self._writing))
            await self.ledger.flush()
        except BaseException:
            self.checkpoints.abandon(manifest.version)
            raise
        await asyncio.to_thread(self.checkpoints.commit, manifest)
        self._saved = self.step
        self.recorder.event(f"checkpoint {self.step}", started, self.recorder.now(), "learner")
        self.ledger.note("checkpoint", version=self.step)

    # ---- start and end ----

    async def _start(self) -> None:
        """From the newest checkpoint, or from nothing, to generators that have the learner's weights."""
        checkpoint = await asyncio.to_thread(self.checkpoints.newest)
        used = checkpoint is not None or self.ledger.position > 0
        if used and self.config.run.resume == "never":
            raise RunDirError("run.resume is never, but the run directory has been used: choose another run.dir")
        taken = 0  # version of the policy that the reference has
        if checkpoint is not None:
            manifest = checkpoint.manifest
            if manifest.config != config_hash(self.config):
                raise RunDirError(f"{checkpoint.path} was made with another config: choose another run.dir")
            version = await self._learner(self.roles.learner.load(checkpoint.learner), f"load {checkpoint.path}")
            if version != manifest.version:
                raise LearnerError(f"{checkpoint.path} holds version {version}, expected {manifest.version}")
            if self._moving is not None:
                taken = await self._reference(self._moving.load(checkpoint.reference), f"load {checkpoint.path}")
            self._saved = version
            self.recorder.resume(Totals(**manifest.totals))
        if self._moving is not None:
            self.recorder.reference(taken)
        plan = await recover(checkpoint, self.ledger, self.roles.store, self.batch, self.bound, self.steps)
        self.step = plan.version
        if used:
            self.tracker.resumed(self.step)
        self._position = self.ledger.position
        self.drawing.resume(plan, {} if checkpoint is None else checkpoint.manifest.drawing)
        self.gate = StalenessGate(self.batch, self.bound, self.steps * self.batch, self.step, self.step * self.batch)
        self.generators.open()
        self.rewarders.open()
        self._spawn(self.weights.run())
        await self._publish()
        await self._unless_stopped(self._spawn(self.weights.reached(self.step)))
        if self.step == 0 and self.config.eval.before:
            await self._unless_stopped(self._spawn(self.evaluator.once("before", 0)))
        self.recorder.begin_step()
        self.gate.start(len(plan.reuse))
        counted = set(checkpoint.manifest.buffered) if checkpoint is not None else set()
        for scored in plan.reuse:
            if scored.info.prompt_id not in counted:  # sampled after the checkpoint, whose totals do not know of it
                self.recorder.totals.tokens_generated += scored.info.sampled_tokens
            prompt = self.drawing.again(scored.info.index)
            self.buffer.start(prompt.index, scored.info.min_version)
            self._spawn(self._buffer(prompt, scored))

    async def _finish(self) -> None:
        """Checkpoint first, so that nothing that can still fail costs the run its end."""
        if self._saved != self.step:
            await self._checkpoint()
        if self.config.eval.after:
            await self._unless_stopped(self._spawn(self.evaluator.once("after", self.step)))
        while self._writing:
            late = EngineError(f"the rollout store did not finish in {options.STORE_TIMEOUT_S:g} s")
            await within(options.STORE_TIMEOUT_S, asyncio.wait(self._writing), late)

    def _end(self) -> None:
        self.generators.close()
        self.rewarders.close()
        for task in list(self._background):
            task.cancel()

    def _summary(self) -> dict[str, Any]:
        evaluations = {key: self.evaluator.result(key) for key in ("before", "after")}
        versions = {"learner": self.step, "generators": self.generators.versions, "packages": packages()}
        return self.recorder.summary(evaluations, self.step, self.ledger.fates(), versions)

    # ---- small things ----

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._tasks.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def _unless_stopped(self, task: asyncio.Task[None]) -> None:
        """Wait for the task; give it up when the run is stopped."""
        task.add_done_callback(lambda _: self.bell.ring())
        await self.bell.until(lambda: task.done() or self._stops > 0, "what is being waited for")
        task.cancel()

    async def _learner(self, call: Awaitable[T], what: str) -> T:
        seconds = self.config.learner.step_timeout_s
        late = LearnerError(f"step {self.step}: the learner did not {what} within learner.step_timeout_s={seconds:g} s")
        try:
            return await within(seconds, call, late)
        except WorkerDied as error:
            raise LearnerError(
                f"{error} (asked to {what}, step {self.step}); the same command goes on from the newest checkpoint"
            ) from error

    async def _reference(self, call: Awaitable[T], what: str) -> T:
        seconds = self.config.learner.step_timeout_s
        late = EngineError(f"the reference did not {what} within learner.step_timeout_s={seconds:g} s")
        return await within(seconds, call, late)

    async def _store(self, call: Awaitable[T]) -> T:
        late = EngineError(f"the rollout store did not answer in {options.STORE_TIMEOUT_S:g} s")
        return await within(options.STORE_TIMEOUT_S, call, late)

    def _rolled_out(self, version: int) -> None:
        self.gate.advance(version)
        self.bell.ring()

    def _assigned(self, work: Any, worker: str, attempt: int) -> None:
        if isinstance(work, Request) and work.training and work.root is None:
            self.ledger.assigned(work.prompt.id, worker, attempt)

    def _failed(self, work: Any, worker: str, cause: str) -> None:
        if isinstance(work, Request) and work.training:
            self.ledger.failed(work.root or work.prompt.id, worker, cause)

    def _lost(self, worker: str, cause: str) -> None:
        logger.warning("%s is lost: %s; it is restarted and its work goes elsewhere", worker, cause)
        self.ledger.note("worker lost", worker=worker, cause=cause)
        self.weights.report()

    def _restarted(self, worker: str) -> None:
        logger.info("%s is back", worker)
        self.ledger.note("worker restarted", worker=worker)
        self.weights.report()

    def _state(self) -> str:
        return (
            f"step {self.step}, gate at version {self.gate.version} with {self.gate.open_slots()} open slots, "
            f"{self.buffer.under_way} groups under way, {self.buffer.finished} buffered, "
            f"healthy: {', '.join([*self.generators.healthy, *self.rewarders.healthy]) or 'nobody'}"
        )
