"""Where every prompt of a run stands: gate, buffer, ledger and rollout store, kept in step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from rlsys.config.models import Config
from rlsys.driver.buffer import GroupBuffer
from rlsys.driver.drawing import Drawing
from rlsys.driver.gate import StalenessGate
from rlsys.driver.progress import Recorder
from rlsys.driver.waiting import stored
from rlsys.errors import RlsysError
from rlsys.ledger.ledger import Ledger
from rlsys.roles import Handle, RolloutStore, SampleRow, Scored, StepReport, TrainItem
from rlsys.types import GroupInfo, Progress, Prompt

FRUITLESS_BATCHES = 100  # dropped groups in a row, in batches, without a step: then nothing is left to learn from


class GroupFilter(Protocol):
    def drop_reason(self, info: GroupInfo) -> str | None:
        """Why a scored group is to be dropped and replaced; None to keep it."""
        ...


class Books:
    """Prompts are drawn, buffered, taken, and get their fate here and nowhere else. `changed` is called each time."""

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        store: RolloutStore,
        drawing: Drawing,
        recorder: Recorder,
        filters: Sequence[GroupFilter],
        changed: Callable[[], None],
        run: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self.ledger = ledger
        self.store = store
        self.drawing = drawing
        self.batch = config.driver.prompts_per_step
        self.bound = config.driver.max_staleness
        self.steps = config.run.steps
        self.step = 0  # batches consumed, which is also the learner's version
        self.gate = StalenessGate(self.batch, self.bound)
        self.buffer: GroupBuffer[TrainItem] = GroupBuffer(self.batch, self.bound)
        self._recorder = recorder
        self._filters = filters
        self._changed = changed
        self._run = run
        self._writing: set[asyncio.Task[None]] = set()
        self._most = config.driver.max_groups_in_flight
        self._fruitless = 0

    def resume(self, step: int) -> None:
        """The learner stands at `step`; nothing is under way."""
        self.step = step
        self.gate = StalenessGate(self.batch, self.bound, self.steps * self.batch, step, step * self.batch)

    # ---- drawn ----

    def slots(self) -> int:
        """Prompts that may be started now."""
        if self.bound == 0 and self.buffer.under_way:
            return 0  # a batch is sampled in waves, so that its composition does not depend on timing
        slots = self.gate.open_slots()
        return slots if self._most is None else max(0, min(slots, self._most - self.buffer.under_way))

    def draw(self) -> list[Prompt]:
        """The prompts that are chosen to be next, not yet started."""
        return self.drawing.draw(self.slots(), Progress(self.step, self.steps))

    def start(self, prompts: Sequence[Prompt]) -> None:
        self.gate.start(len(prompts))
        for prompt in prompts:
            self.ledger.drawn(prompt, self.drawing.choice(prompt.index))
            self.buffer.start(prompt.index, self.gate.version)

    def again(self, groups: Sequence[Scored]) -> list[Prompt]:
        """Complete groups of an earlier process are under way again: what comes after scoring is missing."""
        self.gate.start(len(groups))
        prompts = [self.drawing.again(scored.info.index) for scored in groups]
        for prompt, scored in zip(prompts, groups, strict=True):
            self.buffer.start(prompt.index, scored.info.min_version)
        return prompts

    # ---- under way ----

    async def keep(self, group: Handle) -> None:
        """A group is complete: write it to disk."""
        await stored(self.store.buffered(group))

    def reject(self, info: GroupInfo) -> str | None:
        """Why a complete group is not to be trained on."""
        if "ok" not in info.reward_statuses:
            return f"rewards failed: {', '.join(sorted(set(info.reward_statuses)))}"
        if info.tokens == 0:
            return "no response tokens"
        return next((reason for f in self._filters if (reason := f.drop_reason(info))), None)

    async def drop(self, prompt: Prompt, reason: str, info: GroupInfo | None = None, on_disk: bool = False) -> None:
        """Record why a group under way is given up, and free its slot."""
        self.ledger.dropped(prompt.id, reason, self.step)
        self._recorder.traces.end(prompt.id)
        self.buffer.drop(prompt.index)
        self._recorder.arrived(prompt.id, dropped=True)
        self._dropped(prompt.index, info)
        self._fruitless += 1
        if self._fruitless >= FRUITLESS_BATCHES * self.batch:
            raise RlsysError(
                f"{self._fruitless} groups in a row were dropped since step {self.step}, the last for {reason!r}: "
                "nothing is left to train on"
            )
        if on_disk:
            await stored(self.store.settled([prompt.id], f"dropped: {reason}", self.step))

    def finish(self, prompt: Prompt, item: TrainItem) -> None:
        """The group waits for the learner."""
        self.ledger.buffered(item.info)
        self.buffer.finish(prompt.index, item.info.min_version, item)
        self._recorder.arrived(prompt.id)
        self._changed()

    # ---- taken ----

    @property
    def ready(self) -> bool:
        """Whether there is a batch to be taken."""
        return self.buffer.ready(self.step)

    def next(self) -> list[TrainItem]:
        """The batch that is ready."""
        return self.buffer.waiting(self.batch)

    def compared(self, item: TrainItem) -> None:
        """A group that waits for the learner has the reference's log-probs."""
        self.buffer.update(item.info.index, item)
        self._recorder.traces.passed(item.info.prompt_id, "reference", "reference")
        self._changed()

    async def give_up(self, info: GroupInfo, reason: str) -> None:
        """Drop a group that waits for the learner."""
        self.buffer.drop(info.index)
        await self._lose(info, reason)

    def take(self) -> list[TrainItem]:
        items = [entry.item for entry in self.buffer.take(self.step)]
        for item in items:
            self._recorder.traces.passed(item.info.prompt_id, "queue", "buffer")
        return items

    async def expire(self) -> None:
        """The hard bound on staleness: admission keeps groups from getting here; one that does is dropped and shown."""
        for entry in self.buffer.expire(self.step):
            reason = f"stale: its oldest token is of version {entry.version}, the learner is at {self.step}"
            await self._lose(entry.item.info, reason)

    async def _lose(self, info: GroupInfo, reason: str) -> None:
        """A complete group, which is on disk, is not trained on."""
        self.ledger.dropped(info.prompt_id, reason, self.step)
        self._recorder.traces.end(info.prompt_id)
        self._dropped(info.index, info)
        await stored(self.store.settled([info.prompt_id], f"dropped: {reason}", self.step))

    def settle(self, infos: Sequence[GroupInfo], report: StepReport) -> str:
        """Fates of a batch, and the next step; returns what `write` has to be told.

        A skipped step has used its prompts up, but trained on none of them.
        """
        self.step = report.version
        self._fruitless = 0
        if report.skipped is None:
            self.ledger.trained([info.prompt_id for info in infos], report.version)
            return "trained"
        for info in infos:
            self.ledger.dropped(info.prompt_id, f"step skipped: {report.skipped}", self.step)
        return f"dropped: step skipped: {report.skipped}"

    async def reread(self, prompt_ids: Sequence[str]) -> list[TrainItem]:
        """Groups without a fate, from disk: their handles are new."""
        return list(await stored(self.store.load(prompt_ids, self.step)))

    def write(self, items: Sequence[TrainItem], fate: str) -> asyncio.Task[None]:
        """Move the batch of the newest step to its final file, with the reference's log-probs."""
        writing = self._run(self._write(items, fate, self.step))
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        return writing

    async def _write(self, items: Sequence[TrainItem], fate: str, step: int) -> None:
        ids = [item.info.prompt_id for item in items]
        await stored(self.store.settled(ids, fate, step, [item.reference for item in items]))

    async def written(self) -> None:
        """Return when every batch is in its final file."""
        while self._writing:
            await asyncio.wait(self._writing)

    async def consumed(self, step: int) -> list[TrainItem]:
        """The batch that made version `step`, as it was. Raises DataError when the store does not have it any more."""
        await self.written()
        return list(await stored(self.store.load(self.ledger.consumed(step), step)))

    async def samples(self, step: int, limit: int) -> Sequence[SampleRow]:
        """A few rollouts of the newest step that is on disk, if that is `step`."""
        return await stored(self.store.samples(step, limit))

    # ---- small things ----

    def _dropped(self, index: int, info: GroupInfo | None) -> None:
        self.drawing.ended(index, info)
        self.gate.drop()
        self._recorder.dropped(info)
        self._changed()
