"""What a step was made of, read back beside the process that writes it: its batch, and the groups of that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlsys.errors import DataError, RunDirError
from rlsys.ledger.ledger import Ledger
from rlsys.ledger.store import read_settled, step_file
from rlsys.ledger.story import Consumed, read_consumed
from rlsys.sim.drive import Simulation, sim_config, simulate
from rlsys.types import GroupInfo, Prompt

STEPS, BATCH = 6, 4
SKIPPED = (3, STEPS)  # in between, and at the end, where no file of a later step follows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Simulation, Path]:
    path = tmp_path_factory.mktemp("run")
    config = sim_config(steps=STEPS, batch=BATCH, bound=1, generators=2)
    simulation, _ = simulate(config, path, with_reference=True, skip=lambda step: step in SKIPPED)
    return simulation, path


def test_every_batch_comes_back_in_the_order_that_the_learner_had(run: tuple[Simulation, Path]) -> None:
    simulation, path = run
    writer = Ledger(path / "ledger.sqlite")  # which keeps everybody else from writing
    try:
        consumed = read_consumed(path, range(1, STEPS + 1))
        ours = {step: writer.consumed(step) for step in consumed}
    finally:
        writer.close()
    given = {batch.version + 1: list(batch.prompt_ids) for batch in simulation.learner.batches}
    assert {step: batch.prompt_ids for step, batch in consumed.items()} == given == ours
    reasons = {step: batch.skipped for step, batch in consumed.items()}
    assert reasons == {step: "non-finite gradient" if step in SKIPPED else None for step in range(1, STEPS + 1)}


@pytest.mark.parametrize("skipped", [None, "the gradient is not finite: over 3 rollouts"])
def test_the_order_is_that_of_the_batch_and_not_that_of_drawing(tmp_path: Path, skipped: str | None) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    for index in range(4):
        ledger.drawn(Prompt(f"p{index}", index, np.array([1], np.int32), "", "", None, seed=0))
        ledger.buffered(GroupInfo(f"p{index}", index, "generator-0", (1,), 0, 0))
    ledger.dropped("p1", "stale", 1)
    batch = ["p2", "p0", "p3"]
    if skipped is None:
        ledger.trained(batch, 1)
    for prompt_id in batch if skipped else []:
        ledger.dropped(prompt_id, f"step skipped: {skipped}", 1)
    assert ledger.consumed(1) == batch
    assert read_consumed(tmp_path, [1]) == {1: Consumed(batch, skipped)}
    ledger.close()


def test_groups_come_back_whole_with_their_reference(run: tuple[Simulation, Path]) -> None:
    _, path = run
    for step, batch in read_consumed(path, range(1, STEPS + 1)).items():
        settled = read_settled(path / "rollouts", batch.prompt_ids, step)
        assert [group.prompt.id for group, _ in settled] == batch.prompt_ids
        for group, reference in settled:
            assert reference is not None
            assert [len(logprobs) for logprobs in reference] == [len(r.token_ids) for r in group.rollouts]
            assert {logprobs.dtype for logprobs in reference} == {np.dtype(np.float32)}
            assert all((logprobs == reference[0][0]).all() for logprobs in reference), "as the simulated one has it"
            assert len(group.rewards) == len(group.rollouts)


def test_what_is_not_there_is_named(run: tuple[Simulation, Path], tmp_path: Path) -> None:
    _, path = run
    with pytest.raises(DataError, match=r"ledger\.sqlite has no batch of step 7"):
        read_consumed(path, range(1, 8))
    with pytest.raises(RunDirError, match="no run directory"):
        read_consumed(tmp_path, [1])
    with pytest.raises(DataError, match="sim/0 of step 6 is in no file there"):  # it was trained before
        read_settled(path / "rollouts", ["sim/0"], STEPS)
    step_file(tmp_path, 2).write_bytes(b"half a fi")
    with pytest.raises(DataError, match=r"step-000002\.parquet is damaged"):
        read_settled(tmp_path, ["sim/0"], 2)
