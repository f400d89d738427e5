"""Starts a reward worker and waits for ever: idle, having printed the number of the child process; or, given the word
"lock", in a function that prints it and then lets no thread of its process run."""

import asyncio
import sys
from pathlib import Path

import numpy as np

from rlsys.config.models import RewardsConfig
from rlsys.rewards.worker import RewardWorker
from rlsys.types import Prompt, Rollout, RolloutGroup, VersionSpan


async def main() -> None:
    path = f"{Path(__file__).with_name('user_functions.py')}:announce_and_lock"
    functions = [{"name": "it", "kind": "python", "path": path}]
    worker = RewardWorker(RewardsConfig.model_validate({"functions": functions, "timeout_s": 1000}))
    await worker.start()
    if "lock" not in sys.argv:
        print(worker.pid, flush=True)
        await asyncio.Event().wait()
    prompt = Prompt("sums/0@0", 0, np.array([1], dtype=np.int32), "1+2=", "sums", "3", 1)
    spans = (VersionSpan(0, 0, 1),)
    rollout = Rollout(prompt.id, 0, prompt.token_ids, np.ones(1, bool), np.zeros(1, np.float32), spans, "stop", "x")
    await worker.score(RolloutGroup(prompt, (rollout,), "generator-0"))


asyncio.run(main())
