"""The reference's log-probs for the groups that wait for the learner: of all that are there in one call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from rlsys.driver.books import Books
from rlsys.driver.keeper import Keeper
from rlsys.driver.progress import Recorder
from rlsys.driver.waiting import Bell
from rlsys.driver.workers import WorkFailed
from rlsys.errors import HandleLost
from rlsys.roles import Reference, TrainItem

logger = logging.getLogger(__name__)


class Comparing:
    """Asks the reference ahead of the learner, a batch at most at a time; without a reference it does nothing.

    What is scored together decides the last bits of a result, and which groups are there is chance. So with a bound of
    0, where a run is to repeat exactly, the batch that the learner takes is scored as a whole.
    """

    def __init__(
        self, books: Books, reference: Keeper[Reference] | None, recorder: Recorder, bell: Bell, attempts: int
    ) -> None:
        """A group that the reference dies of `attempts` times is dropped."""
        self._books = books
        self._reference = reference
        self._recorder = recorder
        self._bell = bell
        self._attempts = attempts

    @property
    def ready(self) -> bool:
        """Whether there is a batch that the learner can take."""
        return self._books.ready and not self._lacking(self._books.next())

    async def run(self) -> None:
        """For ever."""
        while self._reference is not None:
            await self._bell.until(lambda: bool(self._due()), "groups to compare with the reference")
            await self._compare(self._due())

    async def again(self, items: Sequence[TrainItem]) -> list[TrainItem]:
        """A batch that was taken, with new handles: read from disk, and compared with the reference once more."""
        fresh = await self._books.reread([item.info.prompt_id for item in items])
        return fresh if self._reference is None else await self._scored(self._reference, fresh)

    def _due(self) -> list[TrainItem]:
        books = self._books
        if books.bound == 0 and not books.ready:
            return []
        return self._lacking(books.buffer.waiting())[: books.batch]

    def _lacking(self, items: Sequence[TrainItem]) -> list[TrainItem]:
        return [item for item in items if item.reference is None] if self._reference is not None else []

    async def _compare(self, items: Sequence[TrainItem], alone: bool = False) -> None:
        """When the reference dies of them again and again, the last attempt is at each by itself: so it is the one that
        is dropped."""
        assert self._reference is not None
        try:
            scored = await self._scored(self._reference, items, 1 if alone else max(1, self._attempts - 1))
        except WorkFailed as error:
            if alone:
                return await self._books.give_up(items[0].info, f"reference failed: {error}")
            for item in items:
                await self._compare([item], alone=True)
        else:
            for item in scored:
                self._books.compared(item)

    async def _scored(
        self, keeper: Keeper[Reference], items: Sequence[TrainItem], attempts: int | None = None
    ) -> list[TrainItem]:
        """With the reference's log-probs. Raises WorkFailed when it dies `attempts` times of them."""
        ids = [item.info.prompt_id for item in items]
        what = f"score {ids[0]}" + (f" and {len(ids) - 1} more" if ids[1:] else "")
        while True:
            try:
                handles = [item.scored for item in items]
                with self._recorder.span(f"score at {self._books.step}", "reference"):
                    found = await keeper.call(lambda reference: reference.logprobs(handles), what, attempts)  # noqa: B023
            except HandleLost as error:
                logger.warning("%s: read again from disk: %s", what, error)
                items = await self._books.reread(ids)
            else:
                keeper.worked()
                return [replace(item, reference=handle) for item, handle in zip(items, found, strict=True)]
