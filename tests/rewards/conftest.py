"""Groups to score, and workers that end with their test."""

from __future__ import annotations

import os
import select
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config.models import RewardsConfig
from rlsys.rewards.worker import RewardWorker
from rlsys.types import Prompt, Rollout, RolloutGroup, VersionSpan

USER_FUNCTIONS = Path(__file__).with_name("user_functions.py")

MakeGroup = Callable[..., RolloutGroup]
StartWorker = Callable[..., Awaitable[RewardWorker]]
UserConfig = Callable[..., RewardsConfig]


@pytest.fixture(scope="session")
def group() -> MakeGroup:
    """`group("22,45", "3", answer="45")`: one rollout for each response."""

    def make(
        *responses: str,
        answer: str | None = "3",
        task: str = "sums",
        metadata: dict[str, Any] | None = None,
        row: int = 0,
    ) -> RolloutGroup:
        prompt = Prompt(
            id=f"sums/{row}@0",
            index=row,
            token_ids=np.array([1, 2, 3], dtype=np.int32),
            text="1+2=",
            task=task,
            answer=answer,
            seed=1,
            metadata={"level": 2} if metadata is None else metadata,
        )
        rollouts = (
            Rollout(
                prompt_id=prompt.id,
                sample=i,
                token_ids=np.array([7, 8], dtype=np.int32),
                action_mask=np.ones(2, dtype=bool),
                behavior_logprobs=np.zeros(2, dtype=np.float32),
                version_spans=(VersionSpan(0, 0, 2),),
                finish_reason="stop",
                text=response,
            )
            for i, response in enumerate(responses)
        )
        return RolloutGroup(prompt, tuple(rollouts), "generator-0")

    return make


@pytest.fixture(scope="session")
def user_config() -> UserConfig:
    """`user_config("length", "raises", timeout_s=1)`: functions of `user_functions.py` under their own names."""

    def make(*names: str, options: dict[str, Any] | None = None, **settings: Any) -> RewardsConfig:
        functions = [
            {"name": name, "kind": "python", "path": f"{USER_FUNCTIONS}:{name}", "options": options or {}}
            for name in names
        ]
        return RewardsConfig.model_validate({"functions": functions, **settings})

    return make


@pytest.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    async with AsyncExitStack() as stack:

        async def start(config: RewardsConfig) -> RewardWorker:
            worker = RewardWorker(config)
            await worker.start()
            stack.push_async_callback(worker.close)
            return worker

        yield start


@pytest.fixture(scope="session")
def wait_until_gone() -> Callable[[int, float], bool]:
    """`wait_until_gone(pid, seconds)`: whether the process has ended by then."""

    def wait(pid: int, seconds: float) -> bool:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            return bool(select.select([descriptor], [], [], seconds)[0])
        finally:
            os.close(descriptor)

    return wait
