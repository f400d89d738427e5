"""One rank of the learner group: scored groups in, a new weight version out. A plain class; no Ray.

    step(groups):  collate -> (values, proximal log-probs) -> advantages -> epochs x minibatches of updates
                   -> version + 1

Every rank is given the same groups and works out the same batch, so that nothing but scores, gradients and metrics has
to travel between the ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from rlsys.batches import collate
from rlsys.config.models import Config, CriticConfig
from rlsys.errors import NonFiniteError
from rlsys.learner import checkpoint, distributed
from rlsys.learner.core import Learner, Objective
from rlsys.metrics import Metric, Metrics, Sum, merge
from rlsys.models.loading import load_tokenizer
from rlsys.roles import Probe, PromptReport, PublishedWeights, StepReport
from rlsys.types import Progress, Prompt, RolloutBatch, ScoredGroup, StartOfStep, TrainBatch
from rlsys.weights.nccl import Sender
from rlsys.weights.publish import pack

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PROBE_TEXT = "The quick brown fox jumps over 12 lazy dogs."
PROBE_TOKENS = 32

log = logging.getLogger(__name__)


class Needs(Protocol):
    """What the algorithm asks the learner to compute before the advantages."""

    @property
    def values(self) -> bool: ...
    @property
    def proximal(self) -> bool: ...
    @property
    def entropy(self) -> bool: ...
    @property
    def start_entropy(self) -> bool: ...
    @property
    def curvature(self) -> bool: ...
    @property
    def current(self) -> bool: ...
    @property
    def current_entropy(self) -> bool: ...


class Algorithm(Protocol):
    """The part of `rlsys.algorithms.Algorithm` that the learner uses."""

    @property
    def needs(self) -> Needs: ...
    @property
    def epochs(self) -> int: ...
    @property
    def critic(self) -> CriticConfig | None: ...
    @property
    def objective(self) -> Objective: ...

    def replay(self, batch: RolloutBatch) -> RolloutBatch | None: ...

    def train_batches(self, batch: RolloutBatch, start: StartOfStep) -> tuple[list[TrainBatch], dict[str, Metric]]: ...

    def prepare(
        self, batch: TrainBatch, progress: Progress, current: np.ndarray | None, entropy: np.ndarray | None
    ) -> TrainBatch: ...

    def prompt_value(self, prompt_id: str) -> float | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class LearnerRank:
    """Joins the group when it is made, which needs all ranks. Every method but `write` is collective.

    `model_path` is a folder in Hugging Face format with weights and tokenizer (or a hub name).
    """

    def __init__(
        self,
        config: Config,
        model_path: str | Path,
        algorithm: Algorithm,
        rank: int,
        world_size: int,
        address: str,
        port: int,
        store: TCPStore | None = None,
        sender: Sender | None = None,
    ) -> None:
        """`sender` is rank 0's with `weights.engine: nccl`: it keeps what is published, instead of packing it."""
        device = distributed.join(
            config.profile,
            rank,
            world_size,
            address,
            port,
            store=store,
            threads=config.learner.threads,
            timeout_s=config.learner.step_timeout_s,
        )
        torch.manual_seed(config.run.seed)
        self._algorithm = algorithm
        self._sender = sender
        self._tokenizer = load_tokenizer(model_path)
        self.learner = Learner(config, model_path, device, algorithm.critic)
        self._probe_ids: list[int] = self._tokenizer.encode(PROBE_TEXT)[:PROBE_TOKENS]

    @property
    def version(self) -> int:
        return self.learner.version

    def step(
        self, groups: Sequence[ScoredGroup], reference: Sequence[Sequence[np.ndarray]] | None = None
    ) -> StepReport:
        """Train on one batch. `reference[i][j]` is the reference log-probs of rollout j of group i, where needed.

        The batch is consumed whatever becomes of it: the version goes up by one even when every update was skipped.
        Raises NonFiniteError when an update is refused and `learner.non_finite` is `stop`.
        """
        started = time.perf_counter()
        try:
            train_batches, metrics = self._prepare(groups, reference)
        except NonFiniteError as error:  # on every rank alike
            if self.learner.config.learner.non_finite == "stop":
                raise
            log.warning("learner step %d: %s", self.version, error)
            self.learner.version += 1
            return StepReport(self.version, {}, 0, time.perf_counter() - started, skipped=str(error))
        prepared = time.perf_counter()
        parts: list[Metrics] = [metrics]
        reasons: list[str] = []
        updates = 0
        for _ in range(self._algorithm.epochs):
            for train_batch in train_batches:
                update, refused = self.learner.update(
                    self._prepared(train_batch),
                    self._algorithm.objective,
                    entropy=self._algorithm.needs.entropy,
                    fresh=updates == 0,
                )
                parts.append(update)
                updates += 1
                if refused is not None:
                    reasons.append(refused)
                    log.warning("%s", refused)
        self.learner.version += 1
        ended = time.perf_counter()
        parts.append({"learner/prepare_s": Sum(prepared - started), "learner/update_s": Sum(ended - prepared)})
        skipped = None
        if len(reasons) == updates:
            skipped = reasons[0] if reasons else "no rollout of the batch has a token to train on"
        return StepReport(
            version=self.version,
            metrics=merge(parts),
            tokens=int(sum(train_batch.rollouts.mask_BT.sum() for train_batch in train_batches)),
            seconds=ended - started,
            skipped=skipped,
            prompts=self._prompts(train_batches),
        )

    def _prompts(self, batches: Sequence[TrainBatch]) -> dict[str, PromptReport]:
        """What curricula want to know of each prompt."""
        sums: dict[str, tuple[float, int]] = {}
        for batch in batches:
            mask = batch.rollouts.mask_BT
            sizes = np.where(mask, np.abs(batch.advantages_BT), 0).sum(axis=1)
            rows = zip(batch.rollouts.prompt_ids_B, sizes.tolist(), mask.sum(axis=1).tolist(), strict=True)
            for prompt_id, size, tokens in rows:
                total, count = sums.get(prompt_id, (0.0, 0))
                sums[prompt_id] = total + size, count + tokens
        return {
            prompt_id: PromptReport(total / max(1, count), self._algorithm.prompt_value(prompt_id))
            for prompt_id, (total, count) in sums.items()
        }

    def _prepare(
        self, groups: Sequence[ScoredGroup], reference: Sequence[Sequence[np.ndarray]] | None
    ) -> tuple[list[TrainBatch], dict[str, Metric]]:
        batch = collate(groups, reference)
        needs = self._algorithm.needs
        values = self.learner.values(batch) if needs.values else None
        proximal, entropy = None, None
        if needs.proximal or needs.start_entropy:
            proximal, entropy = self.learner.logprobs(batch, entropy=needs.start_entropy)
        replay = self._algorithm.replay(batch)
        start = StartOfStep(
            values=values,
            proximal=proximal if needs.proximal else None,
            entropy=entropy,
            curvature=self.learner.curvature(batch) if needs.curvature else None,
            rescored=None if replay is None else self.learner.logprobs(replay)[0],
            progress=self._progress,
        )
        return self._algorithm.train_batches(batch, start)

    def _prepared(self, batch: TrainBatch) -> TrainBatch:
        """With what the loss has to know of all rows before an update."""
        needs = self._algorithm.needs
        current, entropy = None, None
        if needs.current:
            current, entropy = self.learner.logprobs(batch.rollouts, entropy=needs.current_entropy)
        return self._algorithm.prepare(batch, self._progress, current, entropy)

    @property
    def _progress(self) -> Progress:
        return Progress(self.version, self.learner.config.run.steps)

    def prompt_values(self, prompts: Sequence[Prompt]) -> list[float]:
        """The critic's value at the end of each prompt."""
        return [float(value) for value in self.learner.values(_asked(prompts))[:, 0]]

    def publish(self) -> PublishedWeights | None:
        """The current weights as one block of bytes (uint8 array; none with a sender), with a probe.

        None on ranks other than 0. Raises NonFiniteError for weights whose log-probs are not finite: a generator that
        finds others could not be told from one that finds the same.
        """
        started = time.perf_counter()
        weights = self.learner.policy.weights()
        payload: np.ndarray | None = None
        manifest: Mapping[str, Any] = {}
        if self._sender is not None:
            manifest = self._sender.keep(weights, self.version)
        elif dist.get_rank() == 0:
            payload, manifest = pack(weights, self.version)
        else:
            for _ in weights:  # takes part in gathering; nothing is yielded here
                pass
        gather_s = time.perf_counter() - started
        logprobs = self.learner.probe(self._probe_ids)
        if not np.isfinite(logprobs).all():
            raise NonFiniteError(
                f"learner: its log-probs of the probe are not finite with version {self.version}: these weights are of "
                "no use. Take smaller steps (learner.optimizer), in a new run",
                kind="probe",
            )
        if dist.get_rank() != 0:
            return None
        return PublishedWeights(
            version=self.version,
            manifest=manifest,
            payload=payload,
            probe=Probe(tuple(self._probe_ids), tuple(logprobs)),
            gather_s=gather_s,
        )

    def snapshot(self) -> checkpoint.Snapshot | None:
        """Copy everything that has state; None on ranks other than 0. See `checkpoint.snapshot` for what that takes."""
        return checkpoint.snapshot(self.learner, self._algorithm.state_dict())

    def write(self, snapshot: checkpoint.Snapshot, directory: Path) -> None:
        """Write a snapshot below `directory`. Rank 0 alone, from another thread while steps are taken.

        Raises DiskFullError.
        """
        checkpoint.write(snapshot, self.learner.model, self._tokenizer, directory)

    def load(self, directory: Path) -> int:
        """Load what `write` wrote, from any number of ranks and any ZeRO stage; return the version."""
        self._algorithm.load_state_dict(checkpoint.load(self.learner, directory))
        return self.version

    def close(self) -> None:
        self.learner.close()
        distributed.leave()


def _asked(prompts: Sequence[Prompt]) -> RolloutBatch:
    """The prompts as rows with a response of one token, before which the critic gives its value."""
    lengths = np.array([len(prompt.token_ids) for prompt in prompts], dtype=np.int64)
    ids = np.zeros((len(prompts), int(lengths.max()) + 1), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, : lengths[row]] = prompt.token_ids
    one = np.ones((len(prompts), 1))
    return RolloutBatch(
        input_ids_BL=ids,
        prompt_lengths_B=lengths,
        response_lengths_B=np.ones(len(prompts), dtype=np.int64),
        mask_BT=one.astype(bool),
        behavior_logprobs_BT=np.zeros_like(one, dtype=np.float32),
        versions_BT=np.zeros_like(one, dtype=np.int32),
        scores_B=np.zeros(len(prompts), dtype=np.float32),
        scored_B=np.ones(len(prompts), dtype=bool),
        group_B=np.arange(len(prompts)),
        names_B=tuple(f"{prompt.id}#0" for prompt in prompts),
        reference_logprobs_BT=None,
    )
