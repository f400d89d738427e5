"""Check the reward functions of a config before a run starts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from rlsys.config.models import RewardsConfig
from rlsys.errors import ConfigError
from rlsys.rewards.setup import applicable
from rlsys.rewards.worker import RewardWorker


def check(config: RewardsConfig, tasks: Iterable[str] = ()) -> None:
    """Import every reward function in a child process, without running it. Not from within an event loop.

    Raises ConfigError, also when no function applies to one of `tasks`, and RewardSetupError.
    """
    for task in tasks:
        if not applicable(config, task):
            raise ConfigError(
                f"rewards.functions: none applies to the task {task!r}; add one, or it to a function's tasks"
            )

    async def start_and_close() -> None:
        worker = RewardWorker(config, name="rewards")
        try:
            await worker.start()
        finally:
            await worker.close()

    asyncio.run(start_and_close())
