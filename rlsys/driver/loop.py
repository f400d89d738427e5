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
    evaluate  a list of prompts    figures, responses  generators, rewarders             their answers

With bound S >= 1 the loops overlap; with S = 0 the same loops take turns, since the gate opens B slots only when every
generator has version v, and all B prompts of a batch are handed over together. Every call to a role has a deadline;
work at generators and rewarders is leased against progress. What decides is in gate, buffer, router, leases and
restarts; where prompts stand is in books; here it is acted on. Roles that die come back by themselves: workers in their
pools, the learner and the reference as `training` says.

A run ends when `run.steps` batches are trained, or after `stop()`; in both cases with a checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rlsys.config.identity import config_hash
from rlsys.config.models import Config, Sizes
from rlsys.curricula import Curriculum
from rlsys.curricula.in_order import InOrder
from rlsys.driver import options
from rlsys.driver.alerts import Alert, Alerts
from rlsys.driver.books import Books, GroupFilter
from rlsys.driver.checkpoints import Checkpoint, Checkpoints
from rlsys.driver.comparing import Comparing
from rlsys.driver.drawing import Drawing, PromptStream
from rlsys.driver.evaluation import Evaluator
from rlsys.driver.generators import GeneratorPool
from rlsys.driver.incidents import Incidents
from rlsys.driver.production import Production
from rlsys.driver.progress import Recorder, Totals, packages
from rlsys.driver.recovery import recover
from rlsys.driver.restarts import Restarts
from rlsys.driver.rewarders import RewarderPool
from rlsys.driver.scaling import Scaling
from rlsys.driver.shelf import Shelf
from rlsys.driver.training import Training
from rlsys.driver.waiting import Bell
from rlsys.driver.weights import WeightRollout
from rlsys.errors import HandleLost, RunDirError, first_of
from rlsys.ledger.ledger import Ledger
from rlsys.metrics import reduce
from rlsys.roles import PublishedWeights, Roles, StepReport, Tracker, TrainItem
from rlsys.segments import Strategy
from rlsys.types import Prompt

logger = logging.getLogger(__name__)

WATCH_S = 15.0  # between two looks at how long the step takes


class Driver:
    """Starts the roles and runs the whole loop over them.

    Closes neither roles, store nor ledger: whoever gave the means to make them does.
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
        shelf: Shelf | None = None,
    ) -> None:
        """Prompts come in order without a `curriculum`, and are sampled and no more without a `strategy`.

        `with_greedy`, `with_expert`: groups hold a greedy rollout, a demonstration, beside the samples. Checkpoints are
        in the run directory without another `shelf`.
        """
        self.config = config
        self.ledger = ledger
        self.tracker = tracker
        keep = config.checkpoint
        # Learner and reference write there, and may have another working directory.
        self.checkpoints = Checkpoints(
            run_dir.absolute() / "checkpoints", keep.keep_last, keep.keep_best, keep.keep_every, shelf
        )
        self.recorder = Recorder(tracker)
        self.bell = Bell(options.patience(config), self._state)
        sampling = options.training_sampling(config, with_greedy, with_expert)
        if strategy is not None:
            sampling = strategy.first(sampling)
        self.drawing = Drawing(prompts, curriculum or InOrder(), sampling, config.run.seed)
        self.books = Books(
            *(config, ledger, roles.store, self.drawing, self.recorder, filters), self.bell.ring, self._spawn
        )
        self.incidents = Incidents(ledger, self.recorder, self.bell.ring, lambda: self.weights.report(), roles.release)
        self.incidents.state = self._state
        self.alerts = Alerts(config.trackers.alerts)
        self.restarts = Restarts(config.driver.restarts)
        events, common = self.incidents.events, (self._spawn, self.restarts)
        self.generators = GeneratorPool(
            options.generator_options(config, events),
            *(roles.spawn_generator, *common, config.weights.timeout_s, self.recorder.updated, self._publish_again),
        )
        self.rewarders = RewarderPool(options.rewarder_options(config, events, strategy), roles.spawn_rewarder, *common)
        self.weights = WeightRollout(self.generators, self.bell, self._rolled_out)
        self.training = Training(config, roles, self.books, self.checkpoints, self.recorder, *common, events)
        self.scaling = Scaling(
            *(self.generators, self.rewarders, self.training, self.incidents),
            *(roles.check_room, run_dir, self.bell.ring, config.driver.autoscale),
        )
        self.production = Production(*(self.books, self.generators, self.rewarders, strategy, self.recorder))
        self.comparing = Comparing(
            self.books, self.training.reference, self.recorder, self.bell, config.rollout.attempts
        )
        self.evaluator = Evaluator(
            *(self.generators, self.rewarders, self.weights, self.recorder, ledger, roles.store, eval_prompts),
            *(options.evaluation_sampling(config), config.eval.timeout_s, config.eval.keep_responses),
        )
        self.started = False  # every role is there
        self._stops = 0
        self._held = False  # S = 0: no new prompts during an evaluation or a checkpoint
        self._main: asyncio.Task[Any] | None = None
        self._tasks: asyncio.TaskGroup
        self._background: set[asyncio.Task[None]] = set()

    @property
    def step(self) -> int:
        """Batches consumed, which is also the learner's version."""
        return self.books.step

    async def run(self) -> dict[str, Any]:
        """Train until the last step or `stop()`; returns the summary, which the tracker has been given, too.

        Raises the first RlsysError that ends the run; whatever was done is in ledger, store and checkpoints.
        """
        self._main = asyncio.current_task()
        summary: dict[str, Any] = {}
        failure: str | None = None
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
            error = first_of(group)
            failure = f"{type(error).__name__}: {error}"
            self.tracker.incident("the run has failed", failure)
            raise error from None
        finally:
            try:
                summary = {**self._summary(), "failure": failure}
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

    def scale(self, sizes: Sizes) -> list[str]:
        """Begin to have these sizes; returns what is changed. See `Scaling.scale`."""
        return self.scaling.scale(sizes)

    def status(self) -> dict[str, Any]:
        """How things stand, for people: in JSON's types."""
        books, pools, keepers = self.books, (self.generators, self.rewarders), self.training.keepers
        workers = [*(status for pool in pools for status in pool.status()), *(keeper.status() for keeper in keepers)]
        return {
            "run": self.config.run.name,
            "time": time.time(),
            "started": self.started,
            "stopping": self._stops > 0,
            "step": self.step,
            "steps": self.config.run.steps,
            "checkpoint": self.training.saved,
            "versions": {"learner": self.step, "gate": books.gate.version},
            "groups": {
                "open_slots": books.gate.open_slots(),
                "under_way": books.buffer.under_way,
                "buffered": books.buffer.finished,
            },
            "queued": {pool.options.kind: pool.queued for pool in pools},
            "learner": {
                "ranks": self.training.config.learner.ranks,
                "zero_stage": self.training.config.learner.zero_stage,
            },
            "workers": [asdict(status) for status in workers],
            "doing": self.recorder.doing(),
            "newest_incident": self.incidents.newest,
        }

    # ---- the loops ----

    async def admit(self) -> None:
        """Start as many prompts as there are slots, for ever."""
        while True:
            await self.bell.until(lambda: self._slots() > 0, "an open slot of the staleness gate")
            for producing in self.production.begin(self.books.draw()):
                self._spawn(producing)

    async def consume(self) -> None:
        """Train on one batch after the other. The roll-out of the new weights goes on behind it."""
        while self.step < self.config.run.steps and (items := await self._take()) is not None:
            await self._train(items)
            due = self.config.eval.every, self.config.checkpoint.every
            evaluate, save = (
                every > 0 and self.step % every == 0 and self.step < self.config.run.steps for every in due
            )
            self._held = self.books.bound == 0 and (evaluate or save)  # before the gate can open
            await self._publish(new=True)
            if evaluate:
                evaluation = self._spawn(self._evaluate_meanwhile(self.step))
                if self._held:
                    await self._unless_stopped(evaluation)
            if save:
                await self.training.save()
            if self.training.pending is not None:
                await self.training.reshape()
            self._held = False
            self.bell.ring()

    # ---- parts of the loops ----

    def _slots(self) -> int:
        """Prompts to start now."""
        return 0 if self._stops or self._held else self.books.slots()

    async def _take(self) -> list[TrainItem] | None:
        """The next batch; None when the run is stopped first."""
        started = self.recorder.now()
        while not self._stops:
            await self.books.expire()
            if self.comparing.ready:
                self.recorder.waited(started)
                return self.books.take()
            if self.training.pending is not None:
                await self.training.reshape()
            await self.bell.until(
                lambda: self._stops > 0 or self.comparing.ready or self.training.pending is not None, "a full batch"
            )
        return None

    async def _train(self, items: Sequence[TrainItem]) -> None:
        while True:
            try:
                report, fate = await self.training.step(items)
                break
            except HandleLost as error:
                logger.warning("the batch of step %d is read again from disk: %s", self.step + 1, error)
                items = await self.comparing.again(items)
        infos = [item.info for item in items]
        figures = reduce(report.metrics)
        self.recorder.traces.trained(infos, figures)
        chosen = {**self.drawing.observe(report, infos, figures), **self.scaling.figures()}
        record = self.recorder.step(report, infos, chosen, self.books.buffer.under_way, self.books.buffer.finished)
        self._alert(self.alerts.step(report.version, record, report.skipped))
        if not self._stops:
            self.scaling.step(record)
        self._spawn(self._show(self.books.write(items, fate), report))

    async def _show(self, writing: asyncio.Task[None], report: StepReport) -> None:
        """A few of the rollouts of a step, for people to read, once it is on disk."""
        await writing
        step, prompts = report.version, report.prompts
        every, rows = self.config.trackers.wandb.table_every, self.config.trackers.wandb.table_rows
        if every and step % every == 0 and (samples := await self.books.samples(step, rows)):
            advantages = (prompts[row.prompt_id].advantage if row.prompt_id in prompts else None for row in samples)
            rows_shown = [replace(row, advantage=a) for row, a in zip(samples, advantages, strict=True)]
            self.tracker.log_samples(step, rows_shown)

    def _alert(self, alerts: Sequence[Alert]) -> None:
        for alert in alerts:
            self.incidents.alert(alert)

    async def _watch(self) -> None:
        """Notice a step that does not end."""
        while True:
            await asyncio.sleep(WATCH_S)
            if self.step < self.config.run.steps and not self._stops:
                self._alert(self.alerts.waiting(self.recorder.since_step))

    async def _publish(self, new: bool = False) -> None:
        """Have the newest weights rolled out; `new`: by a step just made."""
        weights = await self.training.publish()
        if new:
            await self.training.move_reference(weights)
        if self.drawing.curriculum.needs_values:
            await self.training.judge()
        self.weights.publish(weights)

    async def _publish_again(self) -> PublishedWeights:
        return await self.training.publish()

    async def _evaluate_meanwhile(self, step: int) -> None:
        await self._rate(await self.evaluator.meanwhile(step, self.config.eval.every_prompts))

    async def _evaluate_once(self, key: str) -> None:
        await self._rate(await self.evaluator.once(key, self.step))

    async def _rate(self, result: Mapping[str, float] | None) -> None:
        """The best checkpoints are kept by the held-out accuracy."""
        if result is not None and "accuracy" in result:
            self._alert(self.alerts.evaluated(int(result["step"]), result))
            await asyncio.to_thread(self.checkpoints.rate, int(result["step"]), result["accuracy"])

    # ---- start and end ----

    async def _start(self) -> None:
        """From the newest checkpoint, or from nothing, to generators that have the learner's weights."""
        checkpoint = await asyncio.to_thread(self.checkpoints.newest)
        self._check_resume(checkpoint)
        used = checkpoint is not None or self.ledger.position > 0
        if checkpoint is not None:
            self.recorder.resume(Totals(**checkpoint.manifest.totals))
        plan = await recover(
            *(checkpoint, self.ledger, self.books.store, self.books.batch, self.books.bound, self.config.run.steps),
            defers=self.production.defers,
        )
        self.books.resume(plan.version)
        await asyncio.to_thread(self.checkpoints.forget_after, plan.version)
        if used:
            self.tracker.resumed(self.step)
        self.training.position = self.ledger.position
        self.drawing.resume(plan, {} if checkpoint is None else checkpoint.manifest.drawing)
        self.generators.resize(self.config.rollout.generators)
        self.rewarders.resize(self.config.rewards.workers)
        await self.training.start(checkpoint)
        await self.bell.until(self._staffed, "the workers to start")
        self.started = True
        self._spawn(self.weights.run())
        self._spawn(self.comparing.run())
        self._spawn(self._watch())
        await self._publish()
        await self._unless_stopped(self._spawn(self.weights.reached(self.step)))
        if self.step == 0 and self.config.eval.before:
            await self._unless_stopped(self._spawn(self._evaluate_once("before")))
        self.recorder.begin_step()
        counted = set(checkpoint.manifest.buffered) if checkpoint is not None else set()
        for prompt, scored in zip(self.books.again(plan.reuse), plan.reuse, strict=True):
            if scored.info.prompt_id not in counted:  # sampled after the checkpoint, whose totals do not know of it
                self.recorder.totals.tokens_generated += scored.info.sampled_tokens
            self._spawn(self.production.finish(prompt, scored))

    def _check_resume(self, checkpoint: Checkpoint | None) -> None:
        if (checkpoint is not None or self.ledger.position > 0) and self.config.run.resume == "never":
            raise RunDirError("run.resume is never, but the run directory has been used: choose another run.dir")
        if checkpoint is not None and checkpoint.manifest.config != config_hash(self.config):
            raise RunDirError(f"{checkpoint.path} was made with another config: choose another run.dir")

    def _staffed(self) -> bool:
        """Enough workers to begin. With a bound of 0 all of them: how many share a batch decides its rounding."""
        pools = (self.generators, self.rewarders)
        return all(pool.complete if self.books.bound == 0 else pool.healthy for pool in pools)

    async def _finish(self) -> None:
        """Checkpoint first, so that nothing that can still fail costs the run its end."""
        await self.training.saving()
        while self.training.saved != self.step:
            await self.training.save()
            await self.training.saving()
        if self.config.eval.after:
            await self._unless_stopped(self._spawn(self._evaluate_once("after")))
        await self.books.written()

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

    def _rolled_out(self, version: int) -> None:
        self.books.gate.advance(version)
        self.bell.ring()

    def _state(self) -> str:
        books = self.books
        return (
            f"step {self.step}, gate at version {books.gate.version} with {books.gate.open_slots()} open slots, "
            f"{books.buffer.under_way} groups under way, {books.buffer.finished} buffered, "
            f"healthy: {', '.join([*self.generators.healthy, *self.rewarders.healthy]) or 'nobody'}; "
            f"going on: {', '.join(self.recorder.doing()) or 'nothing'}"
        )
