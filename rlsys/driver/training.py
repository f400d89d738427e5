"""The learner group, and the reference that follows it: steps, weights, checkpoints, and bringing them back.

    step(items) -> version + 1 -> publish -> (reference takes it, where it moves) -> generators

**Coming back.** A learner that died is started again, loads the newest checkpoint, and repeats the steps since then:
their batches are in the rollout store, in the order that the ledger has. What generators have keeps its version, since
the same steps give the same weights. A reference that moves is brought back together with the learner, for it has to
take the same versions again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

from rlsys.config.identity import config_hash
from rlsys.config.models import Config
from rlsys.driver.books import Books
from rlsys.driver.checkpoints import LEARNER, REFERENCE, Checkpoint, Checkpoints, Manifest
from rlsys.driver.keeper import Keeper, KeeperOptions
from rlsys.driver.progress import Recorder
from rlsys.driver.restarts import Restarts
from rlsys.driver.waiting import within
from rlsys.driver.workers import Run, WorkerEvents
from rlsys.durable import Files
from rlsys.errors import (
    DamagedFileError,
    DataError,
    HandleLost,
    LearnerError,
    PlacementError,
    StorageError,
    WorkerDied,
    WorkerStalled,
)
from rlsys.roles import Learner, PublishedWeights, Reference, Roles, StepReport, TrainItem

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Training:
    """Calls to the learner follow each other, and none is lost: what a dead learner was asked is asked again."""

    def __init__(
        self,
        config: Config,
        roles: Roles,
        books: Books,
        checkpoints: Checkpoints,
        recorder: Recorder,
        run: Run,
        restarts: Restarts,
        events: WorkerEvents,
    ) -> None:
        self.config = config
        self.pending: Config | None = None  # what the learner is to be like, from the next step on
        self.saved = -1  # version of the newest checkpoint
        self.position = 0  # of the ledger, at the end of the newest step
        self._books = books
        self._checkpoints = checkpoints
        self._recorder = recorder
        self._run = run
        self._spawn_learner = roles.spawn_learner
        self._events = events
        self._before: Config | None = None  # while the learner is given another shape: the one that it had
        self._saving: asyncio.Task[None] | None = None
        self._unsaved = False  # the storage did not take the newest checkpoint
        self._turn = asyncio.Lock()  # a step and its settlement are one
        self._taken: int | None = None  # newest version that the moving reference has taken
        self._follower: Reference | None = None  # a moving reference that is being brought back with the learner
        timeout = {"timeout_s": config.learner.step_timeout_s, "timeout_key": "learner.step_timeout_s"}
        common: dict[str, Any] = {**timeout, "silence": config.driver.silence_timeout_s, "events": events}
        self.learner: Keeper[Learner] = Keeper(
            KeeperOptions("learner", config.learner.start_timeout_s, **common),
            self._start_learner,
            self._catch_up,
            run,
            restarts,
        )
        self.reference: Keeper[Reference] | None = None
        if roles.spawn_reference is not None:
            self.reference = Keeper(
                KeeperOptions("reference", config.reference.start_timeout_s, **common),
                roles.spawn_reference,
                self._restore,
                run,
                restarts,
            )

    @property
    def keepers(self) -> list[Keeper[Any]]:
        return [self.learner] if self.reference is None else [self.learner, self.reference]

    @property
    def moving(self) -> Keeper[Reference] | None:
        """The reference, where it follows the policy."""
        return None if self.config.reference.update == "frozen" else self.reference

    # ---- steps ----

    async def step(self, items: Sequence[TrainItem]) -> tuple[StepReport, str]:
        """Train on a batch; what it says, and the fate that the books have for these prompts now.

        Raises HandleLost when the batch is not all there any more.
        """
        books = self._books
        step = books.step + 1

        async def take(learner: Learner) -> StepReport:
            report = await learner.step(items)
            self._check("made", report.version, step)
            return report

        async with self._turn:
            with self._recorder.span(f"step {step}", "learner"):
                report = await self._ask(take, f"take step {step}")
            fate = books.settle([item.info for item in items], report)
        self.learner.worked()
        self.position = books.ledger.position
        return report, fate

    async def publish(self) -> PublishedWeights:
        """The newest weights. May be asked for at any time: between two steps they are those of the step before."""
        async with self._turn:
            version = self._books.step

            async def publish(learner: Learner) -> PublishedWeights:
                weights = await learner.publish()
                self._check("published", weights.version, version)
                return weights

            with self._recorder.span(f"publish {version}", "learner"):
                weights = await self._ask(publish, f"publish version {version}")
        self._recorder.published(weights)
        return weights

    async def move_reference(self, weights: PublishedWeights) -> None:
        """These weights are new: a reference that follows the policy takes them when it is due.

        It does so before any generator has them: with a bound of 0, every group is scored by the reference of its step.
        """
        if self.moving is None or not self._due(weights.version):
            return
        with self._recorder.span(f"update to {weights.version}", "reference"):
            while True:
                try:
                    await self._move(self.moving, weights)
                    break
                except HandleLost:
                    weights = await self.publish()
        self._taken = weights.version
        self._recorder.reference(weights.version)

    async def _move(self, reference: Keeper[Reference], weights: PublishedWeights) -> None:
        await reference.call(lambda reference: reference.update(weights), f"take version {weights.version}")

    async def judge(self) -> None:
        """Ask the critic about the prompts that may come next, before the gate opens for them."""
        books = self._books
        candidates = books.drawing.candidates((books.bound + 1) * books.batch)
        prompts = list(candidates.values())
        values = await self._ask(lambda learner: learner.prompt_values(prompts), "judge prompts")
        books.drawing.curriculum.judged(dict(zip(candidates, values, strict=True)))

    # ---- checkpoints ----

    async def save(self) -> None:
        """Copy the learner's state, and where everything else stands. The files are written while the run goes on."""
        await self.saving()
        books, version = self._books, self._books.step
        manifest = Manifest(
            version=version,
            position=self.position,
            next_index=books.drawing.next_index,
            buffered=[item.info.prompt_id for item in books.buffer.waiting()],
            seed=self.config.run.seed,
            config=config_hash(self.config),
            totals=self._recorder.snapshot(),
            drawing=books.drawing.state_dict(),
        )

        async def copy(learner: Learner) -> tuple[Learner, Awaitable[Files]]:
            place = await asyncio.to_thread(self._checkpoints.begin, version)
            return learner, await learner.save(place)

        async def save(reference: Reference) -> Files:
            return await reference.save(self._checkpoints.place(version, REFERENCE))

        files: Files = {}
        try:
            with self._recorder.span(f"copy {version}", "learner"):
                writer, writing = await self._ask(copy, "save a checkpoint")
                if self.moving is not None:
                    files = _named(REFERENCE, await self.moving.call(save, "save a checkpoint"))
        except StorageError as error:
            self._give_up(version, error)
            return
        except BaseException:
            self._checkpoints.abandon(version)
            raise
        self._saving = self._run(self._commit(manifest, files, writer, writing))

    async def saving(self) -> None:
        """Return when no checkpoint is being written."""
        if self._saving is not None:
            await asyncio.wait([self._saving])

    async def _commit(self, manifest: Manifest, files: Files, writer: Learner, writing: Awaitable[Files]) -> None:
        version, limit = manifest.version, self.config.learner.step_timeout_s
        late = WorkerStalled("learner", f"did not write checkpoint {version} within learner.step_timeout_s={limit:g} s")
        with self._recorder.span(f"checkpoint {version}", "checkpoints"):
            try:
                files = {**files, **_named(LEARNER, await within(limit, writing, late))}
                await self._books.written()  # what it counts as trained is on disk, too
                await self._books.ledger.flush()
                await asyncio.to_thread(self._checkpoints.commit, manifest, files)
            except WorkerDied as error:
                self._lost(version, error)
                self.learner.lose(writer, error)
                return
            except StorageError as error:
                self._give_up(version, error)
                return
            except BaseException:
                self._checkpoints.abandon(version)
                raise
        self.saved, self._unsaved = version, False
        self._books.ledger.note("checkpoint", version=version)

    def _give_up(self, version: int, error: StorageError) -> None:
        """A storage that cannot be reached costs a checkpoint; two in a row end the run."""
        self._lost(version, error)
        if self._unsaved:
            raise error
        self._unsaved = True

    def _lost(self, version: int, error: Exception) -> None:
        """The checkpoint before still stands."""
        self._checkpoints.abandon(version)
        logger.warning("checkpoint %d is given up: %s", version, error)
        self._books.ledger.note("checkpoint lost", version=version, cause=str(error))

    # ---- coming back ----

    async def start(self, checkpoint: Checkpoint | None) -> None:
        """Start the learner and the reference, from the newest checkpoint where there is one."""
        self.saved = -1 if checkpoint is None else checkpoint.manifest.version
        for keeper in self.keepers:
            keeper.open()
        for keeper in self.keepers:
            await keeper.ready()
        if self.moving is not None and checkpoint is None:
            await self.save()  # or there would be nothing to bring a reference back from

    async def reshape(self) -> None:
        """Go on with another number of ranks or ZeRO stage, from a checkpoint made for it.

        Where the cluster has no room for it any more, with those that it had.
        """
        await self.save()
        await self.saving()
        if self.pending is None:  # somebody has thought better of it meanwhile
            return
        self._before, self.config, self.pending = self.config, self.pending, None
        await self.learner.renew()
        self._before = None

    async def _start_learner(self) -> Learner:
        try:
            return await self._spawn_learner(self.config)
        except PlacementError as error:
            if self._before is None:
                raise
            self.config, self._before = self._before, None
            self._events.unplaced("learner", error)
        return await self._spawn_learner(self.config)

    async def _catch_up(self, learner: Learner) -> None:
        """Bring a new learner to where the run stands, and the reference that follows it."""
        started, books = self._recorder.now(), self._books

        async def load(checkpoint: Checkpoint) -> int:
            version = await self._in_time(learner.load(checkpoint.learner), f"load {checkpoint.path}")
            if version != checkpoint.manifest.version:
                raise LearnerError(f"{checkpoint.path} holds version {version}, expected {checkpoint.manifest.version}")
            await self._lead(lambda reference: reference.load(checkpoint.reference))
            return version

        loaded = version = await self._load_newest(load)
        while version < books.step:
            version += 1
            await self._repeat(learner, version)
            if self._follower is not None and self._due(version) and version <= (self._taken or 0):
                weights = await self._in_time(learner.publish(), f"publish version {version}")
                await self._lead(lambda reference, weights=weights: reference.update(weights))  # type: ignore[misc]
        if version > loaded:
            seconds = self._recorder.now() - started
            books.ledger.note("learner rebuilt", version=version, checkpoint=loaded, seconds=round(seconds, 3))
            self._recorder.event(f"rebuild {version} from {loaded}", started, self._recorder.now(), "learner")
            logger.info("the learner repeated %d steps in %.1f s: it is at %d", version - loaded, seconds, version)

    async def _load_newest(self, load: Callable[[Checkpoint], Awaitable[int]]) -> int:
        """What `load` makes of the newest checkpoint; 0 without one. One that it finds damaged is passed over."""
        while (checkpoint := await asyncio.to_thread(self._checkpoints.newest)) is not None:
            try:
                return await load(checkpoint)
            except DamagedFileError as error:
                self._checkpoints.pass_over(checkpoint.manifest.version, str(error))
        return 0

    async def _repeat(self, learner: Learner, version: int) -> None:
        try:
            items = await self._books.consumed(version)
        except DataError as error:
            raise LearnerError(
                f"step {version} cannot be repeated, so the learner cannot be rebuilt: {error}; "
                "the same command goes on from the newest checkpoint, with new samples"
            ) from error
        report = await self._in_time(learner.step(items), f"repeat step {version}")
        self._check("made", report.version, version)

    async def _lead(self, ask: Callable[[Reference], Awaitable[Any]]) -> None:
        """Have the follower do something; one that dies of it is left behind, and no fault of the learner."""
        if self._follower is None:
            return
        try:
            await self._in_time(ask(self._follower), "follow")
        except WorkerDied as error:
            logger.warning("the reference was lost while it was brought back: %s", error)
            self._follower = None

    async def _restore(self, reference: Reference) -> None:
        """Bring a new reference to where the run stands. One that moves follows the learner there once more."""
        if self.moving is None:
            return
        loaded = await self._load_newest(
            lambda checkpoint: self._in_time(reference.load(checkpoint.reference), f"load {checkpoint.path}")
        )
        if self._taken is None:
            step = self._books.step  # that of the newest checkpoint, which may have been passed over in loading it
            self._taken = step - step % self.config.reference.every
            self._recorder.reference(self._taken)
        if not any(self._due(version) for version in range(loaded + 1, self._taken + 1)):
            return
        self._follower = reference
        await self.learner.renew()
        follower, self._follower = self._follower, None
        if follower is None:
            raise WorkerDied("reference", "it was lost while it was brought back")

    def _due(self, version: int) -> bool:
        return version % self.config.reference.every == 0

    # ---- small things ----

    def _check(self, did: str, version: int, expected: int) -> None:
        """A learner that is not where the run stands is given up, as a dead one is."""
        if version != expected:
            raise WorkerDied("learner", f"it {did} version {version}, expected {expected}")

    async def _ask(self, ask: Callable[[Learner], Awaitable[T]], what: str) -> T:
        return await self.learner.call(ask, what)

    async def _in_time(self, call: Awaitable[T], what: str) -> T:
        """A call that is part of bringing a role up: past its time, the role is started once more."""
        seconds = self.config.learner.step_timeout_s
        return await within(seconds, call, WorkerStalled("learner", f"did not {what} within {seconds:g} s"))


def _named(part: str, files: Files) -> Files:
    """By their names in the checkpoint."""
    return {f"{part}/{name}": found for name, found in files.items()}
