"""Learner steps of a run once more, from its rollout store, without Ray.

A single rank is this process, so that a debugger stops in it. Several are its children, in which breakpoints do
nothing. Every rank reads the batches itself.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
from torch.distributed import TCPStore
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from rlsys.algorithms.compose import NOTHING, Algorithm
from rlsys.batches import collate
from rlsys.config.models import Config
from rlsys.errors import LearnerError, RlsysError
from rlsys.learner.distributed import open_rendezvous
from rlsys.learner.role import LearnerRank
from rlsys.ledger.store import read_settled
from rlsys.metrics import Metric
from rlsys.roles import StepReport
from rlsys.types import RolloutBatch, ScoredGroup, StartOfStep, TrainBatch

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Repetition:
    """What is to be repeated: `batches` are the ids of the prompts of each step, rising without a gap.

    The learner begins with what it saved in `checkpoint` after the step before the first of them, or with the `model`
    where that is None. `traced`: the log-probs before and after the last step are wanted, too.
    """

    config: Config
    model: Path
    rollouts: Path
    checkpoint: Path | None
    batches: Mapping[int, Sequence[str]]
    traced: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The last step from inside. Log-probs are float32 [B, T] of all rows of the batch, at the sampling temperature."""

    batch: RolloutBatch
    updates: Sequence[TrainBatch]
    before: np.ndarray
    after: np.ndarray


@dataclass(frozen=True, slots=True)
class Repeated:
    reports: Sequence[StepReport]
    trace: Trace | None


def repeat(work: Repetition) -> Repeated:
    """Take the steps with `config.learner.ranks` ranks on this machine, printing a line after each but the last.

    Raises DataError for a batch that is not in the store, LearnerError when a process ends, and what the learner
    raises, NonFiniteError included.
    """
    store = open_rendezvous(HOST, work.config.learner.start_timeout_s)
    ranks = work.config.learner.ranks
    if ranks == 1:
        return _rank(work, 0, store.port, store)
    with TemporaryDirectory(prefix="rlsys-replay-") as name:
        folder = Path(name)
        arguments = (work, store.port, folder)
        group = start_processes(_process, arguments, nprocs=ranks, join=False, daemon=True, start_method="spawn")
        try:
            while not group.join():  # until one of them ends; when it has failed, the others are ended
                pass
        except ProcessExitedException as error:
            raise LearnerError(f"learner-{error.error_index}: {error.msg}") from error
        except ProcessRaisedException as error:
            for path in sorted(folder.glob("error-?*")):  # of every rank alike, most likely
                raise pickle.loads(path.read_bytes()) from error
            raise LearnerError(f"learner-{error.error_index}: {error.msg.strip()}") from error
        finally:
            for process in group.processes:
                process.kill()
        repeated: Repeated = pickle.loads((folder / "repeated").read_bytes())
        return repeated


def _process(rank: int, work: Repetition, port: int, folder: Path) -> None:
    """One of several ranks. What it raises on purpose, and what rank 0 has found, is left in `folder`."""
    os.environ["PYTHONBREAKPOINT"] = "0"  # there is no terminal
    if work.config.profile == "gpu":
        devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(rank + 1)))
        os.environ["CUDA_VISIBLE_DEVICES"] = devices.split(",")[rank]
    try:
        repeated = _rank(work, rank, port)
        if rank == 0:
            (folder / "repeated").write_bytes(pickle.dumps(repeated))
    except RlsysError as error:
        aside = folder / f"aside-{rank}"
        aside.write_bytes(pickle.dumps(error))
        aside.rename(folder / f"error-{rank}")
        raise


def _rank(work: Repetition, rank: int, port: int, store: TCPStore | None = None) -> Repeated:
    algorithm = _Watched.from_config(work.config.algorithm)
    assert isinstance(algorithm, _Watched)
    ranks = work.config.learner.ranks
    learner = LearnerRank(work.config, work.model, algorithm, rank, ranks, HOST, port, store=store)
    reports: list[StepReport] = []
    try:
        version = 0 if work.checkpoint is None else learner.load(work.checkpoint)
        if version + 1 != min(work.batches):
            raise LearnerError(f"{work.checkpoint} holds version {version}, expected {min(work.batches) - 1}")
        for step, prompt_ids in work.batches.items():
            groups, reference = _batch(work.rollouts, prompt_ids, step)
            if step == max(work.batches):
                break
            reports.append(learner.step(groups, reference))
            if rank == 0:
                print(f"step {step} repeated in {reports[-1].seconds:.1f} s", flush=True)
        if not work.traced:
            return Repeated([*reports, learner.step(groups, reference)], None)
        batch = collate(groups, reference)
        before, _ = learner.learner.logprobs(batch)
        reports.append(learner.step(groups, reference))
        after, _ = learner.learner.logprobs(batch)
        return Repeated(reports, Trace(batch, algorithm.batches, before, after))
    finally:
        learner.close()


def _batch(
    rollouts: Path, prompt_ids: Sequence[str], step: int
) -> tuple[list[ScoredGroup], list[Sequence[np.ndarray]] | None]:
    settled = read_settled(rollouts, prompt_ids, step)
    reference = [logprobs for _, logprobs in settled if logprobs is not None]
    return [group for group, _ in settled], reference if len(reference) == len(settled) else None


class _Watched(Algorithm):
    """Keeps what it made of the newest batch."""

    batches: Sequence[TrainBatch] = ()

    def train_batches(
        self, batch: RolloutBatch, start: StartOfStep = NOTHING
    ) -> tuple[list[TrainBatch], dict[str, Metric]]:
        batches, metrics = super().train_batches(batch, start)
        self.batches = batches
        return batches, metrics


# ---- the last step as a table ---------------------------------------------------------------------------------------


def table_of(trace: Trace) -> pa.Table:
    """One row per rollout of the batch, in its order.

    prompt_id, sample, text, score        as in the rollout store; score is NaN where unscored
    update                                which optimizer update of a pass it is in, from 0; null: not trained on
    advantage                             mean over its trained tokens

    and lists with an element per response token: token_ids, trained, versions, behavior_logprobs (by the weights that
    sampled it), reference_logprobs, logprobs (by the weights before the step), logprobs_after (the step), ratio
    (exp(logprobs - behavior_logprobs)), and advantages, loss_weights, proximal_logprobs, values, returns and extras of
    the algorithm, null where the rollout or the algorithm has none.
    """
    batch, real = trace.batch, pa.float32()
    lengths = batch.response_lengths_B.tolist()
    places = {
        name: (update, row)
        for update, part in enumerate(trace.updates)
        for row, name in enumerate(part.rollouts.names_B)
    }

    def of_batch(array: np.ndarray | None, dtype: pa.DataType = real) -> pa.Array:
        cut = [None if array is None else array[b, :n] for b, n in enumerate(lengths)]
        return pa.array(cut, pa.list_(dtype))

    def of_updates(pick: Callable[[TrainBatch], np.ndarray | None], dtype: pa.DataType = real) -> pa.Array:
        arrays = [pick(part) for part in trace.updates]
        cut: list[np.ndarray | None] = []
        for name, n in zip(batch.names_B, lengths, strict=True):
            update, row = places.get(name, (0, None))
            array = arrays[update] if row is not None else None
            cut.append(None if array is None else array[row, :n])
        return pa.array(cut, pa.list_(dtype))

    starts = batch.prompt_lengths_B.tolist()
    trained, advantages = (
        of_updates(lambda part: part.rollouts.mask_BT, pa.bool_()),
        of_updates(lambda p: p.advantages_BT),
    )
    columns: dict[str, Any] = {
        "prompt_id": batch.prompt_ids_B,
        "sample": pa.array([int(name.rpartition("#")[2]) for name in batch.names_B], pa.int32()),
        "text": batch.texts_B,
        "score": pa.array(batch.scores_B),
        "update": pa.array([places[name][0] if name in places else None for name in batch.names_B], pa.int32()),
        "advantage": pa.array(
            [
                None if mask is None else float(np.mean(np.array(values)[np.array(mask)]))
                for mask, values in zip(trained.to_pylist(), advantages.to_pylist(), strict=True)
            ]
        ),
        "token_ids": pa.array(
            [
                batch.input_ids_BL[b, start : start + n]
                for b, (start, n) in enumerate(zip(starts, lengths, strict=True))
            ],
            pa.list_(pa.int32()),
        ),
        "trained": trained,
        "versions": of_batch(batch.versions_BT, pa.int32()),
        "behavior_logprobs": of_batch(batch.behavior_logprobs_BT),
        "reference_logprobs": of_batch(batch.reference_logprobs_BT),
        "logprobs": of_batch(trace.before),
        "logprobs_after": of_batch(trace.after),
        "ratio": of_batch(np.exp(trace.before - batch.behavior_logprobs_BT)),
        "advantages": advantages,
        "loss_weights": of_updates(lambda part: part.loss_weights_BT),
        "proximal_logprobs": of_updates(lambda part: part.proximal_logprobs_BT),
        "values": of_updates(lambda part: part.values_BT),
        "returns": of_updates(lambda part: part.returns_BT),
    }
    for name in sorted({name for part in trace.updates for name in part.extras_BT}):
        columns[f"extra/{name}"] = of_updates(lambda part, name=name: part.extras_BT.get(name))  # type: ignore[misc]
    return pa.table(columns)
