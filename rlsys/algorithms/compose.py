"""An algorithm: its parts, put together and checked against each other.

What the learner does with it, for one batch::

    batch = collate(groups, reference)                      reference log-probs if needs.reference
    start = StartOfStep(values, proximal, ...)              what else `needs` asks for
    for _ in range(epochs):
        for train_batch in algorithm.train_batches(batch, start)[0]:                  computed once
            train_batch = algorithm.prepare(train_batch, current log-probs)           looks at all rows
            loss = sum(algorithm.objective(inputs).per_token * loss_weights)          over micro-batches
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlsys import advantages, curricula
from rlsys.advantages import (
    Adjustment,
    AdvantageInputs,
    Advantages,
    Combiner,
    Estimator,
    adjustments,
    combiners,
)
from rlsys.algorithms import filters
from rlsys.algorithms.filters import GroupFilter
from rlsys.algorithms.presets import resolve
from rlsys.batches import build_train_batch, minibatches, select_rows
from rlsys.config.models import AlgorithmConfig, CriticConfig, PartConfig
from rlsys.curricula import Curriculum
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
from rlsys.segments import Partition, Strategy, partitions, strategies
from rlsys.types import GroupInfo, Progress, RolloutBatch, StartOfStep, TrainBatch

NOTHING = StartOfStep()

# Where each kind of part lives, and its base class, by config key.
KINDS: Mapping[str, tuple[ModuleType, type[Any]]] = {
    "curriculum": (curricula, Curriculum),
    "rollout": (strategies, Strategy),
    "partition": (partitions, Partition),
    "combine": (combiners, Combiner),
    "advantage": (advantages, Estimator),
    "adjust": (adjustments, Adjustment),
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
    start_entropy: bool = False  # of the policy at the start of the step
    curvature: bool = False  # of its output projection
    current: bool = False  # log-probs of the current policy before each update
    current_entropy: bool = False
    components: bool = False  # more than one reward function
    greedy: bool = False  # a greedy rollout of every prompt
    expert: bool = False  # a demonstration of every prompt
    segments: bool = False  # values at the ends of segments
    demonstrations: bool = False  # to begin responses with
    samples: bool = True  # the policy's own; without, demonstrations are enough


@dataclass(frozen=True, eq=False)
class Algorithm:
    """Build with `from_config`."""

    preset: str
    curriculum: Curriculum
    rollout: Strategy
    partition: Partition
    combiner: Combiner
    estimator: Estimator
    adjustments: tuple[Adjustment, ...]
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
        curriculum: Curriculum = _part("curriculum", plan.curriculum)
        adjustments: tuple[Adjustment, ...] = tuple(_part("adjust", part, i) for i, part in enumerate(plan.adjust))
        critical: list[Estimator | Adjustment] = [estimator, *adjustments]
        rollout: Strategy = _part("rollout", plan.rollout)
        if estimator.needs_segments and not rollout.branches:
            raise ConfigError(
                f"algorithm.advantage: {estimator.name!r} works with the values of segments, and algorithm.rollout "
                f"{rollout.name!r} makes none; choose one that does, such as chain or tree"
            )
        users = [part.name for part in critical if part.needs_values]
        if users and plan.critic is None:
            raise ConfigError(
                f"algorithm.critic: {users[0]!r} works with a critic's values; give a critic (critic: {{}} has the "
                "defaults), or choose a part that needs none"
            )
        if curriculum.needs_values and not users:
            raise ConfigError(
                f"algorithm.curriculum: {curriculum.name!r} goes by a critic's values of prompts, and no part trains "
                "one; add the adjustment prompt-value-target and a critic (critic: {}), or choose another curriculum"
            )
        if config.critic is not None and not users:
            raise ConfigError(
                f"algorithm.critic: the advantage {estimator.name!r} does not use a critic; remove the key, or choose "
                "an advantage that does, such as gae"
            )
        combiner: Combiner = _part("combine", plan.combine)
        if combiner.estimates_often and estimator.state_dict():
            raise ConfigError(
                f"algorithm.combine: {combiner.name!r} estimates the advantages of every reward component apart, but "
                f"{estimator.name!r} remembers earlier batches; choose an advantage without memory, such as grpo"
            )
        algorithm = cls(
            preset=config.preset,
            curriculum=curriculum,
            rollout=rollout,
            partition=_part("partition", plan.partition),
            combiner=combiner,
            estimator=estimator,
            adjustments=adjustments,
            filters=tuple(_part("filter", part, i) for i, part in enumerate(plan.filter)),
            loss=_part("loss", plan.loss),
            correction=_part("correction", plan.correction),
            regularizers=tuple(_part("regularize", part, i) for i, part in enumerate(plan.regularize)),
            aggregation=_part("aggregate", plan.aggregate),
            epochs=plan.epochs,
            minibatches=plan.minibatches,
            # A preset's critic goes when the config chooses parts that need none.
            critic=plan.critic if users else None,
        )
        if algorithm.curriculum.explores and not any(part.takes_explored for part in algorithm.adjustments):
            raise ConfigError(
                f"algorithm.curriculum: {algorithm.curriculum.name!r} samples some groups at another temperature; add "
                "the adjustment explored-successes, which deals with them"
            )
        provided = {name for part in algorithm._before for name in part.provides}
        for part in algorithm._in_loss:
            if missing := sorted(set(part.needs_extras) - provided):
                raise ConfigError(
                    f"algorithm.loss: {part.name!r} needs {', '.join(missing)}, which neither the advantage "
                    f"{estimator.name!r} nor an adjustment provides; use the parts of the preset that has {part.name!r}"
                )
        return algorithm

    @property
    def needs(self) -> Needs:
        before, after = self._before, self._in_loss
        return Needs(
            reference=any(part.needs_reference for part in (self.combiner, *before, *after, *self.regularizers)),
            values=self.critic is not None,
            proximal=any(part.needs_proximal for part in (*before, *after)),
            entropy=any(part.needs_entropy for part in after),
            start_entropy=any(part.needs_entropy for part in before),
            curvature=any(part.needs_curvature for part in self.adjustments),
            current=any(part.needs_current or part.needs_current_entropy for part in after),
            current_entropy=any(part.needs_current_entropy for part in after),
            components=self.combiner.needs_components,
            greedy=self.estimator.needs_greedy,
            expert=self.loss.needs_expert,
            segments=self.estimator.needs_segments,
            demonstrations=self.rollout.needs_demonstration,
            samples=self.loss.needs_samples,
        )

    @property
    def _before(self) -> tuple[Estimator | Adjustment, ...]:
        return (self.estimator, *self.adjustments)

    @property
    def _in_loss(self) -> tuple[Loss | Correction | Regularizer, ...]:
        return (self.loss, self.correction, *(part for part in self.regularizers if not part.in_reward))

    @property
    def parts(self) -> dict[str, tuple[Any, ...]]:
        """All parts by config key."""
        return {
            "curriculum": (self.curriculum,),
            "rollout": (self.rollout,),
            "partition": (self.partition,) if self.rollout.uses_partition else (),
            "combine": (self.combiner,),
            "advantage": (self.estimator,),
            "adjust": self.adjustments,
            "filter": self.filters,
            "loss": (self.loss,),
            "correction": (self.correction,),
            "regularize": self.regularizers,
            "aggregate": (self.aggregation,),
        }

    def resolved(self) -> dict[str, Any]:
        """The full composition, every option with its value, in the shape of the config's `algorithm`."""
        return {
            "preset": self.preset,
            "curriculum": _resolved(self.curriculum),
            "rollout": _resolved(self.rollout),
            **({"partition": _resolved(self.partition)} if self.rollout.uses_partition else {}),
            "combine": _resolved(self.combiner),
            "advantage": _resolved(self.estimator),
            "adjust": [_resolved(part) for part in self.adjustments],
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

    def replay(self, batch: RolloutBatch) -> RolloutBatch | None:
        """Rows of earlier batches whose log-probs are wanted as `StartOfStep.rescored`."""
        return self.estimator.replay(batch)

    def prompt_value(self, prompt_id: str) -> float | None:
        """What the estimator expects of the prompt's next score; None where it tracks nothing."""
        return self.estimator.prompt_value(prompt_id)

    def train_batches(
        self, batch: RolloutBatch, start: StartOfStep = NOTHING
    ) -> tuple[list[TrainBatch], dict[str, Metric]]:
        """Advantages of the whole batch, cut into one `TrainBatch` per optimizer step.

        Groups stay whole; the aggregation's normaliser is that of one step. Rows with nothing to train on are left out,
        and so is a step without rows: the list may be empty. Parts with memory advance by one batch.

        Raises LearnerError when something needed is not there, NonFiniteError naming the first rollout with a number
        that is not finite.
        """
        for what, needed, array in (
            ("reference log-probs", self.needs.reference, batch.reference_logprobs_BT),
            ("values", self.needs.values, start.values),
            ("proximal log-probs", self.needs.proximal, start.proximal),
            ("entropies", self.needs.start_entropy, start.entropy),
            ("curvatures", self.needs.curvature, start.curvature),
        ):
            if needed and array is None:
                raise LearnerError(f"the algorithm {self.preset!r} needs {what}, but the batch came without")
        inputs = self._advantage_inputs(batch, start)
        estimated, metrics = self._estimate(inputs)
        mask = inputs.mask if estimated.mask is None else estimated.mask & inputs.mask
        batch = replace(batch, mask_BT=mask.numpy())
        steps: list[np.ndarray] = minibatches(batch.group_B, self.minibatches)
        weights = np.zeros(batch.mask_BT.shape, dtype=np.float32)
        for rows in steps:
            weights[rows] = self._weights(mask[torch.from_numpy(rows)], batch, rows)
        whole = build_train_batch(
            batch,
            estimated.advantages.numpy(),
            weights,
            proximal=start.proximal,
            values=start.values,
            returns=None if estimated.returns is None else estimated.returns.numpy(),
            extras={name: extra.numpy() for name, extra in estimated.extras.items()},
        )
        trained = np.asarray(batch.mask_BT.any(axis=1))
        out = [select_rows(whole, rows[trained[rows]]) for rows in steps if trained[rows].any()]
        return out, merge([metrics, _measured(whole)])

    def _advantage_inputs(self, batch: RolloutBatch, start: StartOfStep) -> AdvantageInputs:
        """Everything but what the regularisers add to the rewards."""
        mask = torch.tensor(batch.mask_BT)
        rated = torch.tensor(batch.scored_B)  # has a score, whether or not it is to count
        counts = rated
        if batch.expert_B is not None and not self.loss.needs_expert:
            mask &= ~torch.tensor(batch.expert_B)[:, None]
        if batch.greedy_B is not None:
            counts = counts & ~torch.tensor(batch.greedy_B)
        if batch.expert_B is not None and not self.loss.expert_in_group:
            counts = counts & ~torch.tensor(batch.expert_B)
        scores = torch.where(rated, torch.tensor(batch.scores_B), 0.0)

        def masked(array: np.ndarray | None) -> Any:
            return None if array is None else _masked(array, mask)

        def tensor(array: np.ndarray | None) -> Any:
            return None if array is None else torch.tensor(array)

        return AdvantageInputs(
            scores=scores,
            scored=counts,
            token_rewards=_on_last_token(scores, mask),
            mask=mask,
            group=torch.tensor(batch.group_B),
            behavior_logprobs=_masked(batch.behavior_logprobs_BT, mask),
            reference_logprobs=masked(batch.reference_logprobs_BT),
            values=masked(start.values),
            prompt_ids=batch.prompt_ids_B,
            proximal_logprobs=masked(start.proximal),
            entropy=masked(start.entropy),
            curvature=tensor(start.curvature),
            rescored=tensor(start.rescored),
            token_ids=torch.from_numpy(_responses(batch)),
            texts=batch.texts_B,
            tasks=batch.tasks_B,
            components=tensor(batch.components_BK),
            component_names=batch.component_names,
            finished=tensor(batch.finished_B),
            expert=tensor(batch.expert_B),
            greedy=tensor(batch.greedy_B),
            explored=tensor(batch.explored_B),
            segments=tensor(batch.segments_BTF),
            progress=start.progress,
        )

    def _estimate(self, inputs: AdvantageInputs) -> tuple[Advantages, dict[str, Metric]]:
        """Combiner, estimator, adjustments."""
        metrics: dict[str, Metric] = {}
        added = torch.zeros(inputs.mask.shape)
        for part in self.regularizers:
            if part.in_reward:
                added += part.reward(inputs.behavior_logprobs, inputs.reference_logprobs, inputs.mask)
        if any(part.in_reward for part in self.regularizers):
            metrics["rewards/added_by_regularizers"] = Mean(float(added.sum()), float(inputs.scored.sum()))

        def estimate(scores: Tensor, *, penalties: bool = True) -> Advantages:
            scores, more = scores.float(), added if penalties else added * 0
            rewards = _on_last_token(scores, inputs.mask) + more
            return self.estimator(replace(inputs, scores=scores + more.sum(1), token_rewards=rewards))

        out = self.combiner(inputs, estimate)
        parts = [metrics, out.metrics]
        for adjustment in self.adjustments:
            left = inputs if out.mask is None else replace(inputs, mask=inputs.mask & out.mask)
            out = adjustment(left, replace(out, metrics={}))
            parts.append(out.metrics)
        return out, merge(parts)

    def _weights(self, mask: Tensor, batch: RolloutBatch, rows: np.ndarray) -> np.ndarray:
        """Loss weights [b, T] of the rows of one step."""
        if self.loss.expert_normalizer == "shared" or batch.expert_B is None:
            return np.asarray(self.aggregation(mask).numpy())
        expert = torch.from_numpy(batch.expert_B[rows])[:, None]
        return np.asarray((self.aggregation(mask & expert) + self.aggregation(mask & ~expert)).numpy())

    # ---- once an update -------------------------------------------------------------------------------------------

    def prepare(
        self,
        batch: TrainBatch,
        progress: Progress,
        current: np.ndarray | None = None,
        entropy: np.ndarray | None = None,
    ) -> TrainBatch:
        """The batch with the extras of its loss, correction and regularisers, which see all its rows at once.

        `current` and `entropy` are float32 [B, T] of the policy that is about to be updated, given as `needs` says.
        """
        rollouts = batch.rollouts
        mask = torch.from_numpy(np.asarray(rollouts.mask_BT))
        proximal = rollouts.behavior_logprobs_BT if batch.proximal_logprobs_BT is None else batch.proximal_logprobs_BT

        def masked(array: np.ndarray | None) -> Any:
            return None if array is None else _masked(array, mask)

        inputs = LossInputs(
            logprobs=_masked(proximal if current is None else current, mask),
            behavior_logprobs=_masked(rollouts.behavior_logprobs_BT, mask),
            proximal_logprobs=_masked(proximal, mask),
            reference_logprobs=masked(rollouts.reference_logprobs_BT),
            entropy=masked(entropy),
            advantages=_masked(batch.advantages_BT, mask),
            mask=mask,
            group=torch.tensor(rollouts.group_B),
            expert=None if rollouts.expert_B is None else torch.tensor(rollouts.expert_B),
            extras={name: _masked(extra, mask) for name, extra in batch.extras_BT.items()},
            progress=progress,
        )
        extras = dict(batch.extras_BT)
        with torch.no_grad():
            for part in self._in_loss:
                extras |= {name: extra.float().numpy() for name, extra in part.prepare(inputs).items()}
        return replace(batch, extras_BT=extras)

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
        return {
            key: [{"name": part.name, "state": part.state_dict()} for part in parts]
            for key, parts in self.parts.items()
            if key not in ("curriculum", "rollout", "partition", "filter")  # these work elsewhere
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises LearnerError when the state is that of other parts."""
        for key, saved in state.items():
            parts = self.parts[key]
            there, here = [entry["name"] for entry in saved], [part.name for part in parts]
            if there != here:
                raise LearnerError(
                    f"the checkpoint was made with {key} {', '.join(there) or 'none'}; "
                    f"the config has {', '.join(here) or 'none'}"
                )
            for part, entry in zip(parts, saved, strict=True):
                part.load_state_dict(entry["state"])


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


def _on_last_token(scores: Tensor, mask: Tensor) -> Tensor:
    """Token rewards [B, T] with each score [B] on the last trained token of its row."""
    token_rewards = torch.zeros(mask.shape)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)  # meaningless without any
    token_rewards[torch.arange(len(mask)), last] = torch.where(mask.any(1), scores, 0.0)
    return token_rewards


def _responses(batch: RolloutBatch) -> np.ndarray:
    """Token ids of the responses, int64 [B, T], 0 in the padding."""
    columns = np.arange(batch.mask_BT.shape[1])
    places = np.minimum(batch.prompt_lengths_B[:, None] + columns, batch.input_ids_BL.shape[1] - 1)
    inside = columns < batch.response_lengths_B[:, None]
    return np.where(inside, np.take_along_axis(batch.input_ids_BL, places, axis=1), 0)


def _blank(inputs: LossInputs) -> LossInputs:
    """The same with 0 in masked places, where nothing can then flow back from."""

    def blank(value: Tensor | None) -> Any:
        return None if value is None else torch.where(inputs.mask, value, 0.0)

    return replace(
        inputs,
        logprobs=blank(inputs.logprobs),
        behavior_logprobs=blank(inputs.behavior_logprobs),
        proximal_logprobs=blank(inputs.proximal_logprobs),
        reference_logprobs=blank(inputs.reference_logprobs),
        entropy=blank(inputs.entropy),
        advantages=blank(inputs.advantages),
        extras={name: blank(extra) for name, extra in inputs.extras.items()},
    )


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
