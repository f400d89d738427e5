"""An algorithm: its parts, put together and checked against each other.

What the learner does with it, for one batch::

    batch = collate(groups, reference)                      reference log-probs if needs.reference
    values, proximal = ...                                  if needs.values, needs.proximal
    for _ in range(epochs):
        for train_batch in algorithm.train_batches(batch, prompt_ids, values, proximal)[0]:    computed once
            loss = sum(algorithm.objective(inputs).per_token * loss_weights)                   over micro-batches
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlsys import advantages
from rlsys.advantages import AdvantageInputs, Estimator
from rlsys.algorithms import filters
from rlsys.algorithms.filters import GroupFilter
from rlsys.algorithms.presets import resolve
from rlsys.batches import build_train_batch, minibatches, select_rows
from rlsys.config.models import AlgorithmConfig, CriticConfig, PartConfig
from rlsys.errors import ConfigError, LearnerError
from rlsys.losses import (
    Aggregation,
    Correction,
    Loss,
    LossInputs,
    Regularizer,
    TokenLoss,
    aggregations,
    corrections,
    policy,
    regularizers,
)
from rlsys.metrics import Last, Max, Mean, Metric, Min, Sum, merge
from rlsys.registry import build
from rlsys.types import GroupInfo, RolloutBatch, TrainBatch

# Where each kind of part lives, and its base class, by config key.
KINDS: Mapping[str, tuple[ModuleType, type[Any]]] = {
    "advantage": (advantages, Estimator),
    "filter": (filters, GroupFilter),
    "loss": (policy, Loss),
    "correction": (corrections, Correction),
    "regularize": (regularizers, Regularizer),
    "aggregate": (aggregations, Aggregation),
}


@dataclass(frozen=True, slots=True)
class Needs:
    """What the composition asks of the rest of the system."""

    reference: bool  # reference log-probs of every rollout
    values: bool  # the critic's values
    proximal: bool  # log-probs recomputed by the learner at the start of the step
    entropy: bool  # of the current policy, at every token


@dataclass(frozen=True, eq=False)
class Algorithm:
    """Build with `from_config`."""

    preset: str
    estimator: Estimator
    filters: tuple[GroupFilter, ...]
    loss: Loss
    correction: Correction
    regularizers: tuple[Regularizer, ...]
    aggregation: Aggregation
    epochs: int
    minibatches: int
    critic: CriticConfig | None

    @classmethod
    def from_config(cls, config: AlgorithmConfig) -> Algorithm:
        """Build every part.

        Raises ConfigError, naming the key, for an unknown preset, part or option, or parts that cannot work together.
        """
        plan = resolve(config)
        estimator: Estimator = _part("advantage", plan.advantage)
        if estimator.needs_values and plan.critic is None:
            raise ConfigError(
                f"algorithm.critic: {estimator.name!r} estimates advantages from a critic's values; give a critic "
                "(critic: {} has the defaults), or choose an advantage that needs none"
            )
        if config.critic is not None and not estimator.needs_values:
            raise ConfigError(
                f"algorithm.critic: the advantage {estimator.name!r} does not use a critic; remove the key, or choose "
                "an advantage that does, such as gae"
            )
        return cls(
            preset=config.preset,
            estimator=estimator,
            filters=tuple(_part("filter", part, i) for i, part in enumerate(plan.filter)),
            loss=_part("loss", plan.loss),
            correction=_part("correction", plan.correction),
            regularizers=tuple(_part("regularize", part, i) for i, part in enumerate(plan.regularize)),
            aggregation=_part("aggregate", plan.aggregate),
            epochs=plan.epochs,
            minibatches=plan.minibatches,
            # A preset's critic goes when the config chooses an advantage that needs none.
            critic=plan.critic if estimator.needs_values else None,
        )

    @property
    def needs(self) -> Needs:
        parts = (self.loss, self.correction, *self.regularizers)
        in_loss = (self.loss, self.correction, *(part for part in self.regularizers if not part.in_reward))
        return Needs(
            reference=self.estimator.needs_reference or any(part.needs_reference for part in parts),
            values=self.estimator.needs_values,
            proximal=self.correction.needs_proximal,
            entropy=any(part.needs_entropy for part in in_loss),
        )

    def resolved(self) -> dict[str, Any]:
        """The full composition, every option with its value, in the shape of the config's `algorithm`."""
        return {
            "preset": self.preset,
            "advantage": _resolved(self.estimator),
            "filter": [_resolved(part) for part in self.filters],
            "loss": _resolved(self.loss),
            "correction": _resolved(self.correction),
            "regularize": [_resolved(part) for part in self.regularizers],
            "aggregate": _resolved(self.aggregation),
            "epochs": self.epochs,
            "minibatches": self.minibatches,
            "critic": None if self.critic is None else self.critic.model_dump(),
        }

    def drop_reason(self, info: GroupInfo) -> str | None:
        """Why a scored group is not to be trained on, from the first filter that objects; None to keep it."""
        return next((reason for part in self.filters if (reason := part.drop_reason(info)) is not None), None)

    # ---- once a batch ---------------------------------------------------------------------------------------------

    def train_batches(
        self,
        batch: RolloutBatch,
        prompt_ids: Sequence[str],
        values: np.ndarray | None = None,
        proximal: np.ndarray | None = None,
    ) -> tuple[list[TrainBatch], dict[str, Metric]]:
        """Advantages of the whole batch, cut into one `TrainBatch` per optimizer step.

        `prompt_ids` has one entry per row; `values` and `proximal` are float32 [B, T] and given as `needs` says. Groups
        stay whole; the aggregation's normaliser is that of one step. Rows with nothing to train on are left out, and so
        is a step without rows: the list may be empty. Estimators with memory advance by one batch.

        Raises LearnerError when something needed is not there, NonFiniteError naming the first rollout with a number
        that is not finite.
        """
        for what, needed, array in (
            ("reference log-probs", self.needs.reference, batch.reference_logprobs_BT),
            ("values", self.needs.values, values),
            ("proximal log-probs", self.needs.proximal, proximal),
        ):
            if needed and array is None:
                raise LearnerError(f"the algorithm {self.preset!r} needs {what}, but the batch came without")
        inputs, metrics = self._advantage_inputs(batch, prompt_ids, values)
        estimated = self.estimator(inputs)
        steps: list[np.ndarray] = minibatches(batch.group_B, self.minibatches)
        weights = np.zeros(batch.mask_BT.shape, dtype=np.float32)
        for rows in steps:
            weights[rows] = self.aggregation(inputs.mask[torch.from_numpy(rows)]).numpy()
        whole = build_train_batch(
            batch,
            estimated.advantages.numpy(),
            weights,
            proximal=proximal,
            values=values,
            returns=None if estimated.returns is None else estimated.returns.numpy(),
        )
        trained = np.asarray(batch.mask_BT.any(axis=1))
        out = [select_rows(whole, rows[trained[rows]]) for rows in steps if trained[rows].any()]
        return out, merge([metrics, estimated.metrics, _measured(whole)])

    def _advantage_inputs(
        self, batch: RolloutBatch, prompt_ids: Sequence[str], values: np.ndarray | None
    ) -> tuple[AdvantageInputs, dict[str, Metric]]:
        mask = torch.tensor(batch.mask_BT)
        scored = torch.tensor(batch.scored_B)
        behavior = _masked(batch.behavior_logprobs_BT, mask)
        reference = None if batch.reference_logprobs_BT is None else _masked(batch.reference_logprobs_BT, mask)
        scores = torch.where(scored, torch.tensor(batch.scores_B), 0.0)
        token_rewards = torch.zeros(mask.shape)
        last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # of the trained tokens; meaningless without any
        token_rewards[torch.arange(len(mask)), last] = torch.where(mask.any(1), scores, 0.0)
        metrics: dict[str, Metric] = {}
        penalties = [part for part in self.regularizers if part.in_reward]
        if penalties:
            assert reference is not None  # every regulariser with in_reward needs it
            added = torch.stack([part.reward(behavior, reference, mask) for part in penalties]).sum(0)
            token_rewards += added
            scores += added.sum(1)
            metrics["rewards/added_by_regularizers"] = Mean(float(added.sum()), float(scored.sum()))
        inputs = AdvantageInputs(
            scores=scores,
            scored=scored,
            token_rewards=token_rewards,
            mask=mask,
            group=torch.tensor(batch.group_B),
            behavior_logprobs=behavior,
            reference_logprobs=reference,
            values=None if values is None else _masked(values, mask),
            prompt_ids=tuple(prompt_ids),
        )
        return inputs, metrics

    # ---- once a micro-batch ---------------------------------------------------------------------------------------

    def objective(self, inputs: LossInputs) -> TokenLoss:
        """The loss of every token: policy loss times correction, plus the regularisers in the loss; 0 where masked.

        Whatever stands in masked places of `inputs`, be it NaN, changes neither the loss nor the gradient.
        """
        inputs = _blank(inputs)
        surrogate = self.loss(inputs)
        weight = self.correction(inputs)
        terms = [part(inputs) for part in self.regularizers if not part.in_reward]
        per_token = surrogate.per_token * weight.per_token + sum(term.per_token for term in terms)
        metrics = merge([surrogate.metrics, weight.metrics, *(term.metrics for term in terms)])
        return TokenLoss(per_token.masked_fill(~inputs.mask, 0), metrics)

    # ---- memory ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Memory of the stateful parts, in plain numbers, strings, lists and dicts."""
        return {"advantage": {"name": self.estimator.name, "state": self.estimator.state_dict()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises LearnerError when the state is another estimator's."""
        saved = state["advantage"]
        if saved["name"] != self.estimator.name:
            raise LearnerError(
                f"the checkpoint was made with advantage {saved['name']!r}, the config has {self.estimator.name!r}"
            )
        self.estimator.load_state_dict(saved["state"])


def _part(kind: str, config: PartConfig, place: int | None = None) -> Any:
    package, base = KINDS[kind]
    key = f"algorithm.{kind}" if place is None else f"algorithm.{kind}.{place}"
    if config.name is None:
        raise ConfigError(f"{key}.name: missing; write for example {key}: {{name: ...}}")
    return build(package, base, config.name, config.options, key)


def _resolved(part: Any) -> dict[str, Any]:
    return {"name": part.name, **{f.name: getattr(part, f.name) for f in fields(part) if f.init}}


def _masked(array: np.ndarray, mask: Tensor) -> Tensor:
    return torch.tensor(array).float().masked_fill(~mask, 0)


def _blank(inputs: LossInputs) -> LossInputs:
    """The same with 0 in masked places, where nothing can then flow back from."""
    out = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    for name, value in out.items():
        if name != "mask" and value is not None:
            out[name] = torch.where(inputs.mask, value, 0.0)
    return LossInputs(**out)


def _measured(batch: TrainBatch) -> dict[str, Metric]:
    mask = batch.rollouts.mask_BT
    metrics: dict[str, Metric] = {"batch/rows_left_out": Sum(float((~mask.any(axis=1)).sum()))}
    advantages = batch.advantages_BT[mask].astype(np.float64)
    if advantages.size:
        metrics["advantages/mean"] = Mean(float(advantages.sum()), float(advantages.size))
        metrics["advantages/max"] = Max(float(advantages.max()))
        metrics["advantages/min"] = Min(float(advantages.min()))
        metrics["advantages/nonzero"] = Mean(float((advantages != 0).sum()), float(advantages.size))
    if batch.values_BT is not None and batch.returns_BT is not None:
        returns = batch.returns_BT[mask].astype(np.float64)
        if returns.size > 1 and returns.var() > 0:
            error = returns - batch.values_BT[mask]
            metrics["critic/explained_variance"] = Last(float(1 - error.var() / returns.var()))
    return metrics
