"""A full disk, and damage between two processes of a run, on simulated roles."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlsys.driver.checkpoints import Manifest
from rlsys.durable import Files, fingerprints, writing
from rlsys.errors import DiskFullError, RunDirError
from rlsys.sim.drive import Simulation, at, sim_config, simulate
from rlsys.sim.roles import SimLearner
from rlsys.storage import Place


class Heavy(SimLearner):
    """Saves 128 KiB, too."""

    async def save(self, place: Place) -> Awaitable[Files]:
        written = await super().save(place)

        async def more() -> Files:
            assert isinstance(place, Path)
            await written
            path = place / "policy.safetensors"
            with writing(path):
                path.write_bytes(bytes(128 * 1024))
            return fingerprints(place)

        return more()


def trained_once(*parts: list[Any]) -> list[str]:
    ids = [prompt_id for part in parts for batch in part for prompt_id in batch.prompt_ids]
    assert max(Counter(ids).values()) == 1
    return ids


def steps(run_dir: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (run_dir / "checkpoints").glob("step-*"))


def test_a_run_goes_on_once_there_is_room(tmp_path: Path, small_disk: Callable, check_fates: Callable) -> None:
    """Wherever the disk is found to be full: by ledger, rollout store or checkpoint."""
    config = sim_config(steps=10, bound=0, samples=8, checkpoint={"every": 2}, eval={"before": False})
    whole, _ = simulate(config, tmp_path / "whole")
    messages: list[str] = []
    for heavy in (False, True):
        for kib in range(110, 700 if heavy else 350, 40):
            disk = small_disk(kib=kib)
            run_dir = disk.path / "run"
            began: list[Simulation] = []

            def act(simulation: Simulation, heavy: bool = heavy, began: list[Simulation] = began) -> None:
                began.append(simulation)
                if heavy:
                    simulation.learner.__class__ = Heavy

            try:
                simulate(config, run_dir, act)
                continue
            except DiskFullError as error:
                messages.append(str(error).removeprefix(f"{run_dir}/"))
            done = max(steps(run_dir), default=0)
            disk.grow(kib=20_000)
            second, summary = simulate(config, run_dir, act)
            assert second.tracker.resumes in ([done], [] if done == 0 else [done])
            batches = [began[0].learner.batches[:done] if began else [], second.learner.batches]
            assert len(trained_once(*batches)) == 40
            assert summary["fates"] == {"trained": 40, "dropped": {}, "pending": 0}
            check_fates(run_dir)
            assert second.learner.state == whole.learner.state
    for culprit in ("ledger.sqlite", "rollouts/", "checkpoints/"):
        assert any(message.startswith(culprit) for message in messages)
    for message in messages:
        assert re.search("cannot be written: the disk is full.*the same command goes on", message)


@pytest.mark.parametrize("bound", [0, 2])
def test_a_run_goes_on_after_the_loss_of_the_wal(tmp_path: Path, check_fates: Callable, bound: int) -> None:
    """The ledger's file alone, as it was at any moment, knows all that the newest checkpoint needs."""
    config = sim_config(steps=8, bound=bound, batch=3, checkpoint={"every": 2}, eval={"before": False})
    for when in (5.0, 9.0, 14.0):
        run_dir, copy = tmp_path / f"run-{when}", tmp_path / f"copy-{when}"

        def crash(run_dir: Path = run_dir, copy: Path = copy) -> None:
            shutil.copytree(run_dir, copy, ignore=shutil.ignore_patterns("*-wal", "*-shm", "*.lock"))

        first, _ = simulate(config, run_dir, lambda s, when=when, crash=crash: at(when, crash))
        done = max(steps(copy), default=0)
        second, summary = simulate(config, copy, seed=3)
        assert second.tracker.resumes in ([done], [] if done == 0 else [done])
        assert len(trained_once(first.learner.batches[:done], second.learner.batches)) == 24
        assert summary["fates"]["trained"] == 24
        check_fates(copy)


def test_a_ledger_that_was_replaced_is_refused(tmp_path: Path) -> None:
    config = sim_config(steps=4, checkpoint={"every": 2})
    simulate(config, tmp_path)
    for path in tmp_path.glob("ledger.sqlite*"):
        path.unlink()
    with pytest.raises(RunDirError, match="was replaced or is damaged"):
        simulate(config, tmp_path)


def test_what_a_checkpoint_counts_as_trained_is_in_the_store_before(tmp_path: Path) -> None:
    """A crash in between would lose the rollouts of its last step: a resumed run does not train them again."""
    found: list[bool] = []

    def act(simulation: Simulation) -> None:
        settled, commit = simulation.store.settled, simulation.driver.checkpoints.commit

        async def slowly(prompt_ids: Sequence[str], fate: str, step: int, *more: Any) -> None:
            await asyncio.sleep(30.0)
            await settled(prompt_ids, fate, step)

        def looking(manifest: Manifest, files: Files) -> Place:
            found.append((tmp_path / "rollouts" / f"step-{manifest.version:06d}.parquet").is_file())
            return commit(manifest, files)

        simulation.store.settled = slowly  # type: ignore[method-assign]
        simulation.driver.checkpoints.commit = looking  # type: ignore[method-assign]

    simulate(sim_config(steps=4, checkpoint={"every": 2}), tmp_path, act)
    assert found == [True, True]
