"""The learner of one rank: scoring, optimizer updates, metrics. Every rank holds the whole batch and works on its rows.

    update(batch):  rows -> ranks -> micro-batches
                    per micro-batch: log-probs, per-token loss, sum(loss * weights), backward
                    then one optimizer update for policy and critic together, or none

Weights carry the global normaliser of the whole batch, so losses and gradients simply add up, and the update does not
depend on ranks, micro-batches, packing or padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlsys.batches import select_rows, split
from rlsys.config.models import Config, CriticConfig
from rlsys.errors import NonFiniteError
from rlsys.learner.distributed import gather_objects
from rlsys.learner.engine import Engine
from rlsys.learner.optimizer import Update, learning_rate
from rlsys.losses import LossInputs, TokenLoss
from rlsys.losses.measure import token_max, token_means
from rlsys.losses.value import value_loss
from rlsys.metrics import Last, Max, Mean, Metric, Metrics, Sum, merge
from rlsys.models.loading import load_causal_lm, torch_dtype
from rlsys.models.logprobs import Packing, PolicyModel, ValueModel
from rlsys.models.prefixes import shared_order, split_shared, worth_sharing
from rlsys.types import Progress, RolloutBatch, TrainBatch


class Objective(Protocol):
    """Per-token policy loss with its corrections and regularisers: `Algorithm.objective`."""

    def __call__(self, inputs: LossInputs) -> TokenLoss: ...


@dataclass(slots=True)
class _Tally:
    """What one rank saw during one update."""

    parts: list[Metrics] = field(default_factory=list)
    loss: float = 0.0
    critic_loss: float = 0.0
    non_finite: set[str] = field(default_factory=set)  # names of rollouts


class Learner:
    """One rank's engines. Every method is collective: all ranks call it with the same arguments.

    `version` counts the batches consumed: the weights after batch k are version k, whether or not its updates were
    applied, so that versions and steps stay in line when a step is skipped.
    """

    def __init__(
        self, config: Config, model_path: str | Path, device: torch.device, critic: CriticConfig | None = None
    ) -> None:
        self.config = config
        self.version = 0
        self._device = device
        self._learner = config.learner
        self._critic_config = critic
        dtype = torch_dtype(config.model.dtype)
        model = load_causal_lm(model_path, dtype)
        if self._learner.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.model = model
        policy = PolicyModel(model)
        optimizer = self._learner.optimizer
        self.policy = Engine(policy, policy.hf_names, optimizer, self._learner, dtype, device)
        self.critic: Engine | None = None
        self._packing: Packing = "padded"  # of the micro-batches that were made last
        if critic is not None:
            body = load_causal_lm(model_path, dtype)
            if self._learner.gradient_checkpointing:
                body.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            value = ValueModel(body)
            self.critic = Engine(
                value,
                {name: name for name, _ in value.named_parameters()},
                critic_optimizer(config, critic),
                self._learner,
                dtype,
                device,
            )

    @property
    def engines(self) -> dict[str, Engine]:
        return {"policy": self.policy} if self.critic is None else {"policy": self.policy, "critic": self.critic}

    # ---- scoring ----------------------------------------------------------------------------------------------------

    def logprobs(self, batch: RolloutBatch, *, entropy: bool = False) -> tuple[np.ndarray, np.ndarray | None]:
        """The current policy's log-probs at the sampling temperature, and its entropies in nats where asked for.

        Each float32 [B, T], the same on every rank.
        """

        def forward(rows: RolloutBatch) -> list[Tensor]:
            logprobs, entropies = self._policy(rows, entropy)
            return [logprobs] if entropies is None else [logprobs, entropies]

        scores = self._score(self.policy, batch, forward)
        return scores[0], scores[1] if entropy else None

    def curvature(self, batch: RolloutBatch) -> np.ndarray:
        """`ChunkedHead.curvature` of each response token under the current policy, float32 [B, T, 3]."""

        def forward(rows: RolloutBatch) -> list[Tensor]:
            _, found = self._policy(rows, entropy=False, curvature=True)
            assert found is not None
            return list(found.unbind(-1))

        return np.stack(self._score(self.policy, batch, forward), axis=-1)

    def values(self, batch: RolloutBatch) -> np.ndarray:
        """The critic's value before each response token, float32 [B, T], on every rank."""
        assert self.critic is not None
        return self._score(self.critic, batch, lambda rows: [self._values(rows)])[0]

    @torch.no_grad()
    def _score(
        self, engine: Engine, batch: RolloutBatch, forward: Callable[[RolloutBatch], list[Tensor]]
    ) -> list[np.ndarray]:
        engine.train(False)
        found: list[Tensor] = []
        for rows in self._micro_batches(batch, np.arange(batch.rows)):
            scores = forward(select_rows(batch, rows if rows else [0]))
            if not found:
                found = [torch.zeros(batch.mask_BT.shape, device=self._device) for _ in scores]
            for whole, part in zip(found, scores, strict=True):
                if rows:
                    whole[rows, : part.shape[1]] = part
        for whole in found:
            dist.all_reduce(whole)  # every row is filled in by one rank, and zero on the others
        return [whole.cpu().numpy() for whole in found]

    @torch.no_grad()
    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of `token_ids[1:]`, each given the tokens before it, at temperature 1."""
        self.policy.train(False)
        ids = torch.tensor([token_ids], device=self._device)
        one, rest = torch.tensor([1], device=self._device), torch.tensor([len(token_ids) - 1], device=self._device)
        logprobs, _ = self.policy(
            ids,
            one,
            rest,
            width=len(token_ids) - 1,
            chunk=self._learner.logprob_chunk,
            temperature=1.0,
            entropy=False,
            packing="padded",
        )
        return list(logprobs[0].tolist())

    # ---- updates ----------------------------------------------------------------------------------------------------

    def update(
        self, batch: TrainBatch, objective: Objective, *, entropy: bool = False, fresh: bool = True
    ) -> tuple[dict[str, Metric], str | None]:
        """One optimizer update of policy and critic. Returns its metrics, and why it was skipped if it was.

        `fresh` says that the weights are still those of `version`, so that the difference to the sampler's log-probs is
        one of implementation only. Raises NonFiniteError, naming the rollouts, for a gradient, loss or log-prob that is
        not finite, unless `learner.non_finite` is `skip`; nothing is applied on any rank in both cases.
        """
        # a rollout without a trained token has no gradient
        rows = np.flatnonzero(batch.rollouts.mask_BT.any(axis=1))
        if not rows.size:
            return {}, "no rollout has a token to train on"
        trains_policy = self._critic_config is None or self.version >= self._critic_config.hold_policy_steps
        tally = self._accumulate(batch, rows, objective, trains_policy, entropy, fresh)
        tallies = gather_objects(tally)
        suspects = sorted(set().union(*(t.non_finite for t in tallies)))
        rates = {"policy": self.policy_rate(), "critic": self.critic_rate()}
        updates = self._apply(trains_policy, not suspects, rates)
        metrics = merge(part for t in tallies for part in t.parts)
        metrics["learner/tokens"] = Sum(float(batch.rollouts.mask_BT.sum()))
        for name, update in updates.items():
            prefix = "learner" if name == "policy" else name
            metrics[f"{prefix}/learning_rate"] = Last(rates[name])
            if update.applied:
                total = sum(t.loss if name == "policy" else t.critic_loss for t in tallies)
                metrics[f"{prefix}/loss"] = Mean(total, 1.0)
                metrics[f"{prefix}/grad_norm"] = Mean(update.grad_norm, 1.0)
                metrics[f"{prefix}/grad_norm_max"] = Max(update.grad_norm)
        applied = all(update.applied for update in updates.values())
        metrics["learner/skipped_updates"] = Sum(float(not applied))
        return metrics, None if applied else self._refuse(suspects, batch, rows)

    def policy_rate(self) -> float:
        return learning_rate(self._learner.optimizer, self.version, self.config.run.steps)

    def critic_rate(self) -> float:
        if self._critic_config is None:
            return 0.0
        return learning_rate(critic_optimizer(self.config, self._critic_config), self.version, self.config.run.steps)

    def _accumulate(
        self,
        batch: TrainBatch,
        rows: np.ndarray,
        objective: Objective,
        trains_policy: bool,
        entropy: bool,
        fresh: bool,
    ) -> _Tally:
        """Forward and backward over this rank's micro-batches."""
        tally = _Tally()
        for engine in self.engines.values():
            engine.train(True)
        trained = float(batch.rollouts.mask_BT.sum())
        progress = Progress(self.version, self.config.run.steps)
        micro_batches = self._micro_batches(batch.rollouts, rows)
        for k, own in enumerate(micro_batches):
            last = k == len(micro_batches) - 1
            # a rank without rows left still takes part, with a row that weighs nothing
            part = select_rows(batch, own if own else [int(rows[-1])])
            tensors = _Tensors(part, self._device, 1.0 if own else 0.0)
            names = part.rollouts.names_B
            if trains_policy:
                logprobs, entropies = self._policy(part.rollouts, entropy)
                if logprobs.requires_grad:
                    logprobs.register_hook(_Watch(names, tally.non_finite))
                result = objective(tensors.loss_inputs(logprobs, entropies, progress))
                loss = (result.per_token * tensors.weights).sum()
                _note(names, tally.non_finite, logprobs.masked_fill(~tensors.mask, 0), result.per_token)
                self.policy.backward(loss, last=last)
                if own:
                    tally.loss += loss.item()
                    tally.parts += [result.metrics, _differences(tensors, logprobs, entropies, self.version, fresh)]
            if self.critic is not None and self._critic_config is not None:
                values = self._values(part.rollouts)
                result = value_loss(
                    values, tensors.values, tensors.returns, tensors.mask, self._critic_config.value_clip
                )
                weight = tensors.scale / trained
                loss = (result.per_token * weight).sum()
                _note(names, tally.non_finite, values.masked_fill(~tensors.mask, 0), result.per_token)
                self.critic.backward(loss, last=last)
                if own:
                    tally.critic_loss += loss.item()
                    tally.parts.append(result.metrics)
        return tally

    def _apply(self, trains_policy: bool, ok: bool, rates: dict[str, float]) -> dict[str, Update]:
        """Step both engines or neither: the critic's step runs inside the policy's, before anything is written."""
        if self.critic is None:
            return {"policy": self.policy.step(rates["policy"], lambda finite: finite and ok)}
        critic = self.critic
        if not trains_policy:
            return {"critic": critic.step(rates["critic"], lambda finite: finite and ok)}
        inner: list[Update] = []

        def agree(finite: bool) -> bool:
            inner.append(critic.step(rates["critic"], lambda critic_finite: critic_finite and finite and ok))
            return inner[0].applied

        return {"policy": self.policy.step(rates["policy"], agree), "critic": inner[0]}

    def _refuse(self, suspects: list[str], batch: TrainBatch, rows: np.ndarray) -> str:
        if suspects:
            what, names = "a loss, log-prob or its gradient is not finite for", suspects
        else:
            what, names = (
                "the gradient is not finite, though each loss is, over",
                [batch.rollouts.names_B[r] for r in rows],
            )
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        reason = f"learner step {self.version}: {what} {len(names)} rollout{'s' * (len(names) != 1)}: {shown}"
        if self._learner.non_finite == "stop":
            raise NonFiniteError(f"{reason}. Nothing was applied; learner.non_finite=skip leaves such updates out")
        return reason

    # ---- helpers ----------------------------------------------------------------------------------------------------

    def _micro_batches(self, batch: RolloutBatch, rows: np.ndarray) -> list[list[int]]:
        """This rank's micro-batches, as many as on every other rank, the last ones maybe empty."""
        lengths = (batch.prompt_lengths_B + batch.response_lengths_B)[rows]
        ranks, budget = dist.get_world_size(), self._learner.micro_batch_tokens
        packing = self._learner.packing
        if packing in ("auto", "shared"):
            shared = shared_order(batch.input_ids_BL[rows], batch.prompt_lengths_B[rows], lengths)
            if packing == "shared" or worth_sharing(shared, lengths, budget):
                self._packing = "shared"
                plan = split_shared(shared, lengths.tolist(), ranks, budget)
                return [[int(rows[i]) for i in micro] for micro in plan[dist.get_rank()]]
        self._packing = "packed" if packing == "packed" else "padded"
        plan = split(lengths.tolist(), ranks, budget, self._packing)
        return [[int(rows[i]) for i in micro] for micro in plan[dist.get_rank()]]

    def _policy(self, rows: RolloutBatch, entropy: bool, curvature: bool = False) -> tuple[Tensor, Tensor | None]:
        ids, prompts, responses = self._rows(rows)
        result: tuple[Tensor, Tensor | None] = self.policy(
            ids,
            prompts,
            responses,
            width=rows.mask_BT.shape[1],
            chunk=self._learner.logprob_chunk,
            temperature=self.config.rollout.temperature,
            entropy=entropy,
            packing=self._packing,
            curvature=curvature,
        )
        return result

    def _values(self, rows: RolloutBatch) -> Tensor:
        assert self.critic is not None
        ids, prompts, responses = self._rows(rows)
        values: Tensor = self.critic(ids, prompts, responses, width=rows.mask_BT.shape[1], packing=self._packing)
        return values

    def _rows(self, rows: RolloutBatch) -> Iterator[Tensor]:
        arrays = (rows.input_ids_BL, rows.prompt_lengths_B, rows.response_lengths_B)
        return (torch.from_numpy(array).to(self._device) for array in arrays)

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


class _Tensors:
    """One micro-batch on the device. `scale` 0 makes a stand-in row weigh nothing."""

    def __init__(self, batch: TrainBatch, device: torch.device, scale: float) -> None:
        rollouts = batch.rollouts

        def tensor(array: Any) -> Any:
            return None if array is None else torch.from_numpy(array).to(device)

        self.scale = scale
        self.mask = tensor(rollouts.mask_BT)
        self.weights = tensor(batch.loss_weights_BT) * scale
        self.behavior = tensor(rollouts.behavior_logprobs_BT)
        self.versions = tensor(rollouts.versions_BT)
        self.reference = tensor(rollouts.reference_logprobs_BT)
        self.proximal = self.behavior if batch.proximal_logprobs_BT is None else tensor(batch.proximal_logprobs_BT)
        self.advantages = tensor(batch.advantages_BT)
        self.values = tensor(batch.values_BT)
        self.returns = tensor(batch.returns_BT)
        self.group = tensor(rollouts.group_B)
        self.expert = tensor(rollouts.expert_B)
        self.sampled = tensor(rollouts.sampled_B)  # at the temperature that is trained at
        self.extras = {name: tensor(extra) for name, extra in batch.extras_BT.items()}

    def loss_inputs(self, logprobs: Tensor, entropy: Tensor | None, progress: Progress) -> LossInputs:
        return LossInputs(
            logprobs=logprobs,
            behavior_logprobs=self.behavior,
            proximal_logprobs=self.proximal,
            reference_logprobs=self.reference,
            entropy=entropy,
            advantages=self.advantages,
            mask=self.mask,
            group=self.group,
            expert=self.expert,
            extras=self.extras,
            progress=progress,
        )


class _Watch:
    """Tensor hook that notes the rows whose gradient is not finite: a clipped loss can be finite without that."""

    def __init__(self, names: Sequence[str], found: set[str]) -> None:
        self._names, self._found = names, found

    def __call__(self, gradient: Tensor) -> None:
        _note(self._names, self._found, gradient)


def _note(names: Sequence[str], found: set[str], *tensors: Tensor) -> None:
    """Add to `found` the names of rows [B, ...] with an element that is not finite."""
    for tensor in tensors:
        finite = torch.isfinite(tensor.detach()).all(dim=1)
        if not finite.all():
            found.update(name for name, good in zip(names, finite.tolist(), strict=True) if not good)


def _differences(
    tensors: _Tensors, logprobs: Tensor, entropies: Tensor | None, version: int, fresh: bool
) -> dict[str, Metric]:
    """How far the learner's log-probs are from the sampler's.

    `sampler_difference` is over tokens sampled by the learner's own current weights: what the two implementations
    differ by. `off_policy_difference` is over all tokens: that, and the age of the weights that sampled.
    """
    difference = (logprobs.detach() - tensors.behavior).abs()
    sampled = tensors.mask & tensors.sampled[:, None]
    out = token_means(sampled, {"learner/off_policy_difference": difference})
    if entropies is not None:
        out |= token_means(tensors.mask, {"learner/entropy": entropies})
    if fresh:
        own = sampled & (tensors.versions == version)
        out |= token_means(sampled, {"learner/entropy_estimate": -logprobs.detach()})
        out |= token_means(own, {"learner/sampler_difference": difference})
        out |= token_max(own, {"learner/sampler_difference_max": difference})
    return out


def critic_optimizer(config: Config, critic: CriticConfig) -> Any:
    """The policy's optimizer settings with the critic's learning rate and warm-up, constant after it."""
    return config.learner.optimizer.model_copy(
        update={"learning_rate": critic.learning_rate, "warmup_steps": critic.warmup_steps, "schedule": "constant"}
    )
