"""The simulated learner saves as the real one does: a copy now, the files later."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

from rlsys.sim.clock import run_virtually
from rlsys.sim.roles import INSTANT, SimLearner


def test_what_is_saved_is_what_there_was(tmp_path: Path) -> None:
    async def main() -> list[float]:
        learner = SimLearner("learner", replace(INSTANT, save_s=10.0), seed=0)
        loop = asyncio.get_running_loop()
        times = []
        for step in (1, 2):
            learner.version, learner.state = step, f"state {step}"
            (tmp_path / str(step)).mkdir()
            written = await learner.save(tmp_path / str(step))
            times.append(loop.time())
            learner.version = 9
        await written
        return [*times, loop.time()]

    first, second, end = run_virtually(main())
    assert first == 0.0
    assert 0.0 < second < end, "the second save waits until the first is written"
    for step in (1, 2):
        saved = json.loads((tmp_path / str(step) / "learner.json").read_text())
        assert saved == {"version": step, "state": f"state {step}"}
