"""What `make chaos` has found, each as the smallest run that shows it."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from rlsys.curricula.predicted_difficulty import PredictedDifficulty
from rlsys.driver.checkpoints import Checkpoints
from rlsys.driver.waiting import give_up
from rlsys.errors import EngineError, HandleLost, LearnerError, WorkerDied
from rlsys.ledger.story import read_run
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.strategies.windows import Windows
from rlsys.sim.drive import SimPrompts, Simulation, at, sim_config, simulate
from rlsys.sim.roles import SimLearner, SimReference, SimRewarder, Timing
from rlsys.types import GroupInfo

NO_EVALUATION = {"before": False, "after": False}


def crashed(config: Any, directory: Path, when: float, **options: Any) -> None:
    def act(simulation: Simulation) -> None:
        at(when, simulation.driver.stop)
        at(when, simulation.driver.stop)

    with pytest.raises(asyncio.CancelledError):
        simulate(config, directory, act, **options)


def windows() -> dict[str, Any]:
    made = Windows(tokens=12)
    made.bind(FixedLength(), 40)
    return {"strategy": made, "prompts": SimPrompts(size=50)}


def test_what_goes_on_in_a_later_step_is_drawn_again_once(tmp_path: Path) -> None:
    """Steps are done again after a crash, in which responses are begun whose rest had been drawn, too."""
    config = sim_config(*(8, 2, 0), rollout={"max_new_tokens": 40}, checkpoint={"every": 0}, eval=NO_EVALUATION)
    whole, _ = simulate(config, tmp_path / "whole", **windows())
    crashed(config, tmp_path / "parts", 18.0, **windows())
    assert any(prompt.count("/") > 1 for prompt in read_run(tmp_path / "parts").first_prompts), "some go on"
    parts, summary = simulate(config, tmp_path / "parts", **windows())
    assert summary["fates"] == {"trained": 16, "dropped": {}, "pending": 0}
    assert parts.learner.state == whole.learner.state


@pytest.mark.parametrize("when", [8.0, 13.0, 18.0, 23.0])
def test_what_was_begun_since_the_checkpoint_goes_on_after_a_crash(tmp_path: Path, when: float) -> None:
    """What goes on in a later step is known to the checkpoint only."""
    config = sim_config(*(10, 2, 3), rollout={"max_new_tokens": 40}, checkpoint={"every": 4}, eval=NO_EVALUATION)
    slow = Timing(lengths=(4, 32), step_s=3.0)  # groups wait for the learner
    crashed(config, tmp_path, when, timing=slow, **windows())
    _, summary = simulate(config, tmp_path, timing=slow, **windows())
    assert summary["fates"]["trained"] == 20
    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as db:
        drawn = {prompt_id for (prompt_id,) in db.execute("SELECT id FROM prompts")}
    checkpoint = Checkpoints(tmp_path / "checkpoints").newest()
    assert checkpoint is not None
    carried = [choice for _, choice in checkpoint.manifest.drawing["carried"]]
    known = drawn | {f"sim/{choice['row']}@{choice['epoch']}" for choice in carried}
    unfinished = set()
    for path in (tmp_path / "rollouts").glob("step-*.parquet"):
        for row in pq.read_table(path).to_pylist():
            begun = row["prompt_id"].count("/") * 12  # every window of 12 tokens
            if row["finish_reason"] == "length" and begun < 40:
                unfinished.add(f"{row['prompt_id']}/{row['sample']}")
    assert unfinished
    assert unfinished <= known


@pytest.mark.parametrize("method", ["step", "publish"])
def test_a_learner_that_says_a_wrong_version_is_rebuilt(tmp_path: Path, method: str) -> None:
    class Confused(SimLearner):
        pass

    async def confused(self: SimLearner, *arguments: Any) -> Any:
        result = await getattr(SimLearner, method)(self, *arguments)
        return replace(result, version=result.version + 1 if self.version == 3 else result.version)

    def act(simulation: Simulation) -> None:
        setattr(Confused, method, confused)
        simulation.learner.__class__ = Confused

    config = sim_config(bound=0)
    whole, _ = simulate(config, tmp_path / "whole")
    hit, _ = simulate(config, tmp_path / "hit", act)
    assert len(hit.learners) == 2
    assert hit.learner.state == whole.learner.state
    [lost] = [note for note in read_run(tmp_path / "hit").notes if note.event == "worker lost"]
    assert "version 4, expected 3" in lost.detail["cause"]


def test_a_checkpoint_that_is_never_written_costs_the_learner_not_the_run(tmp_path: Path) -> None:
    class Stuck(SimLearner):
        async def save(self, directory: Path) -> Any:
            return asyncio.ensure_future(asyncio.sleep(1e9))

    def act(simulation: Simulation) -> None:
        simulation.learner.__class__ = Stuck

    config = sim_config(bound=0, learner={"step_timeout_s": 50.0})
    simulation, summary = simulate(config, tmp_path, act)
    assert summary["fates"]["trained"] == 20
    assert len(simulation.learners) == 2
    notes = {note.event: note.detail for note in read_run(tmp_path).notes}
    assert notes["worker lost"]["cause"] == "did not write checkpoint 2 within learner.step_timeout_s=50 s"
    assert notes["checkpoint lost"]["version"] == 2


@pytest.mark.parametrize("method", ["update", "save"])
def test_a_reference_that_dies_of_what_the_run_needs_is_asked_again(tmp_path: Path, method: str) -> None:
    """However few tries one prompt has: this is no work of a prompt's."""

    class Dies(SimReference):
        pass

    async def dies(self: SimReference, *arguments: Any) -> Any:
        self.kill("SIGKILL")
        return await getattr(SimReference, method)(self, *arguments)

    def act(simulation: Simulation) -> None:
        setattr(Dies, method, dies)
        simulation.reference.__class__ = Dies

    config = sim_config(bound=0, reference={"update": "every"}, rollout={"attempts": 1})
    simulation, summary = simulate(config, tmp_path, act, with_reference=True)
    assert summary["fates"]["trained"] == 20
    assert len(simulation.references) == 2


def test_a_learner_that_cannot_follow_a_reference_back_ends_the_run(tmp_path: Path) -> None:
    """It is started for the reference's sake, but its failures are its own."""

    async def no_more(self: SimLearner, directory: Path) -> int:
        raise LearnerError("the checkpoint is of another model")

    class Cursed(list[SimLearner]):
        def append(self, learner: SimLearner) -> None:
            learner.load = no_more.__get__(learner)  # type: ignore[method-assign]
            super().append(learner)

    def act(simulation: Simulation) -> None:
        simulation.learners = Cursed(simulation.learners)
        at(6.0, lambda: simulation.reference.kill("SIGKILL"))

    config = sim_config(bound=0, reference={"update": "every"}, checkpoint={"every": 0}, driver={"restarts": 2})
    message = "^learner failed 3 times in a row, and there is no other: the checkpoint is of another model$"
    with pytest.raises(EngineError, match=message):
        simulate(config, tmp_path, act, with_reference=True)
    failed = [note.detail["worker"] for note in read_run(tmp_path).notes if note.event == "start failed"]
    assert failed == ["learner"] * 3


def test_what_is_given_up_may_fail_unheard() -> None:
    said: list[Any] = []

    async def fails() -> None:
        try:
            await asyncio.Future()
        except asyncio.CancelledError:
            raise WorkerDied("learner", "closed") from None

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        task = asyncio.ensure_future(fails())
        await asyncio.sleep(0)
        give_up(task)
        await asyncio.wait([task])
        del task

    asyncio.run(main())
    assert said == []


def test_a_skipped_step_is_on_disk_with_its_checkpoint(tmp_path: Path, check_fates: Callable[[Path], Any]) -> None:
    """The file of the step after it goes when that is done again, and nothing of the skipped one with it."""
    config = sim_config(*(4, 2, 0), checkpoint={"every": 2}, eval=NO_EVALUATION)
    crashed(config, tmp_path, 12.0, skip=lambda step: step == 2)
    assert [p.name for p in sorted((tmp_path / "checkpoints").glob("step-*"))] == ["step-000002"]
    assert (tmp_path / "rollouts" / "step-000003.parquet").exists()
    simulate(config, tmp_path, skip=lambda step: step == 2)
    assert check_fates(tmp_path) == {"trained": 6, "dropped": {"step skipped": 2}, "pending": 0}
    rows = [row for path in (tmp_path / "rollouts").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert {row["prompt_id"] for row in rows if "skipped" in row["fate"]} == {"sim/2", "sim/3"}


class Fourth:
    def drop_reason(self, info: GroupInfo) -> str | None:
        return "every fourth" if info.index % 4 == 3 else None


@pytest.mark.parametrize("when", [8.0, 16.0])
def test_what_replaces_a_dropped_prompt_is_chosen_as_without_a_crash(tmp_path: Path, when: float) -> None:
    """The critic judges what is drawn again, too: its values choose what is drawn in place of a dropped one."""
    config = sim_config(*(8, 4, 0), checkpoint={"every": 2}, eval=NO_EVALUATION)

    def parts() -> dict[str, Any]:
        return {"curriculum": PredictedDifficulty(), "prompts": SimPrompts(size=50), "filters": [Fourth()]}

    whole, _ = simulate(config, tmp_path / "whole", **parts())
    crashed(config, tmp_path / "parts", when, **parts())
    second, _ = simulate(config, tmp_path / "parts", **parts())
    assert second.learner.state == whole.learner.state


def test_a_prompt_of_an_evaluation_that_is_lost_with_its_node_is_sampled_again(tmp_path: Path) -> None:
    class Loses(SimRewarder):
        lost = 0

        async def score(self, rounds: Any, training: bool) -> Any:
            if not training and Loses.lost < 2:
                Loses.lost += 1
                raise HandleLost("rewarder-0 cannot have what it was given")
            return await super().score(rounds, training)

    def act(simulation: Simulation) -> None:
        simulation.rewarders[0].__class__ = Loses

    _, summary = simulate(sim_config(bound=0), tmp_path, act, timing=Timing(lengths=(4, 8)))
    assert Loses.lost == 2
    assert summary["eval"]["before"]["failed"] == 0
    assert summary["eval"]["before"]["rollouts"] == 3
