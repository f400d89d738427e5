"""Worlds of one and of two gloo ranks, started once for all tests of the learner, and batches for them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlsys.config.models import Config
from rlsys.types import RolloutBatch, TrainBatch

DEADLINE_S = 120


class World:
    """The ranks of one process group. `run` has all of them run one function of `rank_program.py`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        program = Path(__file__).with_name("rank_program.py")
        for rank in range(size):
            address = f"{self._folder.name}/{rank}"
            with Listener(address, family="AF_UNIX") as listener:
                listener._listener._socket.settimeout(DEADLINE_S)  # type: ignore[attr-defined]
                command = [sys.executable, str(program), address, str(rank), str(size), self._folder.name]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                self._processes.append(subprocess.Popen(command, env=environment))
                self._connections.append(listener.accept())
        self._answer(0)  # rank 0 has opened the rendezvous
        for connection in self._connections:
            connection.send(None)
        for rank in range(size):
            self._answer(rank)

    def _answer(self, rank: int) -> Any:
        if not self._connections[rank].poll(DEADLINE_S):
            raise TimeoutError(f"rank {rank} of {self.size} did not answer")
        kind, value = self._connections[rank].recv()
        if kind == "error":
            raise value
        return value

    def run(self, function: str, **arguments: Any) -> list[Any]:
        """Every rank's result; the first error, when all have answered."""
        for connection in self._connections:
            connection.send((function, arguments))
        answers: list[Any] = []
        errors: list[Exception] = []
        for rank in range(self.size):
            try:
                answers.append(self._answer(rank))
            except Exception as error:
                errors.append(error)
        if errors:
            assert len(errors) == self.size, f"only some ranks failed: {errors}"
            raise errors[0]
        return answers

    def close(self) -> None:
        for connection in self._connections:
            connection.send(None)
        for process in self._processes:
            process.wait(DEADLINE_S)
        self._folder.cleanup()


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[int, World]]:
    worlds: dict[int, World] = {}
    try:
        worlds[1], worlds[2] = World(1), World(2)
        yield worlds
    finally:
        for world in worlds.values():
            world.close()


def make_batch(rows: int, seed: int, *, version: int = 0, masked_row: bool = False) -> TrainBatch:
    """Random rollouts of 2 to 14 response tokens; weights are the token mean. With `masked_row`, one is untrained."""
    rng = np.random.default_rng(seed)
    prompts, responses = rng.integers(1, 8, rows), rng.integers(2, 15, rows)
    width, length = int(responses.max()), int((prompts + responses).max())
    columns = np.arange(width)[None]
    mask = columns < responses[:, None]
    mask[1, 1] = False  # a token that the policy did not choose
    if masked_row:
        mask[rows // 2] = False
    ids = rng.integers(2, 90, (rows, length)) * (np.arange(length)[None] < (prompts + responses)[:, None])

    def noise(scale: float, offset: float = 0.0) -> np.ndarray:
        return np.where(mask, offset + scale * rng.standard_normal(mask.shape), 0).astype(np.float32)

    rollouts = RolloutBatch(
        input_ids_BL=ids.astype(np.int64),
        prompt_lengths_B=prompts.astype(np.int64),
        response_lengths_B=responses.astype(np.int64),
        mask_BT=mask,
        behavior_logprobs_BT=noise(0.3, -4.5),
        versions_BT=np.where(columns < responses[:, None], version, -1).astype(np.int32),
        scores_B=rng.standard_normal(rows).astype(np.float32),
        scored_B=np.ones(rows, dtype=bool),
        group_B=np.arange(rows) // 2,
        names_B=tuple(f"row/{i}@0#0" for i in range(rows)),
        reference_logprobs_BT=noise(0.3, -4.5),
    )
    return TrainBatch(
        rollouts=rollouts,
        advantages_BT=noise(1.0),
        loss_weights_BT=(mask / mask.sum()).astype(np.float32),
        proximal_logprobs_BT=None,
        values_BT=noise(1.0),
        returns_BT=noise(1.0),
    )


def make_config(*, temperature: float = 1.0, steps: int = 100, **learner: Any) -> Config:
    """A config with the given `learner` keys, and defaults for what the learner does not read."""
    return Config.model_validate(
        {
            "run": {"steps": steps},
            "model": {"path": "unused"},
            "prompts": {"train": {"kind": "sums"}},
            "rewards": {"functions": [{"name": "sums", "kind": "sums"}]},
            "rollout": {"temperature": temperature},
            "learner": learner,
        }
    )


@pytest.fixture(name="make_config", scope="session")
def make_config_fixture() -> Any:
    return make_config


@pytest.fixture(name="make_batch", scope="session")
def make_batch_fixture() -> Any:
    return make_batch
