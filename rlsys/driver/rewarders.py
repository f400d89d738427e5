"""The pool of reward workers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlsys.driver.restarts import Restarts
from rlsys.driver.workers import PoolOptions, Run, WorkerPool
from rlsys.errors import BadRollout, EngineError
from rlsys.roles import Handle, Rewarder


@dataclass(frozen=True, slots=True)
class Rounds:
    """A prompt's groups, round by round: to be scored, or (`branch`) asked what comes next."""

    prompt_id: str
    groups: Sequence[Sequence[Handle]]
    training: bool
    branch: bool = False


class RewarderPool(WorkerPool[Rewarder, Rounds, Any]):
    """Reward workers. Their progress is the number of pieces of work they have done: `Scored`, or branches."""

    def __init__(
        self, options: PoolOptions, spawn: Callable[[str], Awaitable[Rewarder]], run: Run, restarts: Restarts
    ) -> None:
        self._scored: dict[str, int] = {}
        super().__init__(options, spawn, run, restarts)

    async def _start(self, worker: Rewarder, work: Sequence[Rounds]) -> Sequence[Awaitable[Any]]:
        return [
            worker.branch(piece.groups) if piece.branch else worker.score(piece.groups, piece.training)
            for piece in work
        ]

    async def _progress(self, worker: Rewarder) -> int:
        await worker.progress()  # a sign of life; what counts is what has come back
        return self._scored.get(worker.name, 0)

    def _called(self, work: Rounds) -> str:
        return work.prompt_id

    def _is_to_blame(self, worker: Rewarder, error: EngineError) -> bool:
        return not isinstance(error, BadRollout)  # which a generator made

    def _completed(self, name: str) -> None:
        self._scored[name] = self._scored.get(name, 0) + 1
