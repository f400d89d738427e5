"""Every metric that a run logs: its name, unit, how to read it, and the panel that it belongs to.

docs/metrics.md, the names in Prometheus and the Grafana dashboard are made from this list. A name may be a pattern:
`{role}` in `restarts/{role}` stands for any text. Names of evaluations begin with `eval/` in every tracker but
RUN/evals.jsonl, which holds nothing else.

A metric that is not listed is logged all the same, with one warning: a part of a user's own may log what it likes. In
the tests the warning is a failure.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

logger = logging.getLogger(__name__)

UNITS: Mapping[str, str] = {
    "score": "what the reward functions return",
    "share": "0 to 1",
    "number": "without a unit",
    "nats": "natural logarithms",
    "tokens": "tokens",
    "tokens/s": "tokens a second",
    "s": "seconds",
    "bytes": "bytes",
    "versions": "weight versions, which are learner steps",
    "count": "a number of things",
}


@dataclass(frozen=True, slots=True)
class Panel:
    """Metrics that are looked at together. `name` is the key, `title` and `about` are for people."""

    name: str
    title: str
    about: str


PANELS = (
    Panel("reward", "Reward", "Whether the policy gets better on the prompts it is trained on."),
    Panel("eval", "Evaluation", "Whether it gets better on held-out prompts. Trust these over the reward."),
    Panel("rollout", "Rollouts", "What the responses are like."),
    Panel("policy", "Policy updates", "How the weights move, and whether a bound holds them back."),
    Panel("off-policy", "Off-policy", "How far the policy that is trained is from the one that sampled."),
    Panel("reference", "Reference", "How far the policy is from the reference."),
    Panel("critic", "Critic", "Whether the value model can be trusted. Present with a critic only."),
    Panel("throughput", "Throughput", "How much is done, and how fast."),
    Panel("utilisation", "Utilisation", "Who waits for whom, and which stage would have to be faster."),
    Panel("weights", "Weight updates", "What it costs to bring new weights to the generators."),
    Panel("system", "System", "What went wrong, and was put right."),
    Panel("curriculum", "Curriculum", "Which prompts are chosen. Each curriculum logs its own."),
    Panel("algorithm", "Parts of algorithms", "What single parts measure; docs/algorithms.md says which."),
)


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric. `read` is one sentence: what it is, or what to make of it."""

    name: str
    unit: str
    panel: str
    read: str

    @property
    def is_pattern(self) -> bool:
        return "{" in self.name

    @property
    def regex(self) -> re.Pattern[str]:
        """Of whole names."""
        return re.compile(re.sub(r"\\\{\w+\\\}", ".+", re.escape(self.name)))


def _panel(name: str, *rows: tuple[str, str, str]) -> tuple[Definition, ...]:
    return tuple(Definition(metric, unit, name, read) for metric, unit, read in rows)


DEFINITIONS: tuple[Definition, ...] = (
    *_panel(
        "reward",
        ("reward/mean", "score", "Mean score of the scored rollouts of the batch: should rise, with noise."),
        ("reward/unscored", "share", "Rollouts whose reward failed or timed out; they are left out, not counted as 0."),
        ("reward/component/{name}", "score", "Mean of one reward function's own value, before its weight."),
        ("groups/with_signal", "share", "Groups whose scores differ: at 0 there is nothing to compare and to learn."),
        ("advantages/mean", "score", "Mean advantage over the trained tokens: near 0 with a good baseline."),
        ("advantages/max", "score", "Largest advantage of a token: far beyond the others, one rollout rules the step."),
        ("advantages/min", "score", "Smallest advantage of a token, to be read as the largest one."),
        ("advantages/nonzero", "share", "Trained tokens with an advantage: the others cost time and teach nothing."),
        ("advantages/baseline", "score", "The running mean that scores are compared with (`reinforce`)."),
        ("batch/rows_left_out", "count", "Rollouts of the batch without a token to train on."),
        ("rewards/added_by_regularizers", "score", "Penalties in the reward, mean per scored rollout."),
        ("rewards/running_mean", "score", "Mean of all scores so far, by which they are normalised."),
        ("rewards/running_std", "score", "Standard deviation of all scores so far, by which they are normalised."),
        ("component/{name}", "score", "Mean of a reward function that scales the advantages (`component-scale`)."),
    ),
    *_panel(
        "eval",
        ("eval/accuracy", "score", "Mean score of the scored held-out rollouts; absent where none was scored."),
        ("eval/best_of_n", "score", "Mean of each prompt's best score: pass@n, where scores are 0 or 1."),
        ("eval/prompts", "count", "Problems of the evaluation."),
        ("eval/rollouts", "count", "Responses that were sampled for them."),
        ("eval/unscored", "count", "Responses whose reward failed; they are no part of the accuracy."),
        ("eval/failed", "count", "Problems that could not be sampled or scored at all."),
        ("eval/length_mean", "tokens", "Mean length of the responses: growing while accuracy falls is a warning."),
        ("eval/truncated", "share", "Responses cut at the length limit: an accuracy that suffers from it is too low."),
        ("eval/min_version", "versions", "Oldest weights that sampled a response of the evaluation."),
        ("eval/max_version", "versions", "Newest weights that sampled a response of the evaluation."),
    ),
    *_panel(
        "rollout",
        ("rollout/length_mean", "tokens", "Mean response length; a steady climb is learning or padding: see accuracy."),
        ("rollout/length_max", "tokens", "Longest response of the batch."),
        ("rollout/truncated", "share", "Responses cut at the length limit: if it rises, raise rollout.max_new_tokens."),
        ("rollout/distinct_3", "share", "Different three-token sequences within a group: falls as samples grow alike."),
    ),
    *_panel(
        "policy",
        ("learner/loss", "number", "Loss of the step, mean over its updates: says little by itself."),
        ("learner/grad_norm", "number", "Gradient norm before clipping: spikes come before trouble."),
        ("learner/grad_norm_max", "number", "Largest gradient norm of an update of the step."),
        ("learner/learning_rate", "number", "Learning rate of the step."),
        ("learner/entropy", "nats", "Mean entropy of the policy per token: near 0 it no longer explores."),
        ("learner/entropy_estimate", "nats", "The same, estimated by -log p of the sampled tokens: noisy and free."),
        ("learner/skipped_updates", "count", "Updates left out: not finite, or nothing to train on."),
        ("learner/tokens", "tokens", "Tokens of all updates of the step: those of the batch times the epochs."),
        ("policy/ratio", "number", "Mean probability ratio to the policy of the start: near 1."),
        ("policy/ratio_max", "number", "Largest such ratio: in the tens, the updates are too many or too large."),
        ("policy/sequence_ratio", "number", "Mean ratio of whole sequences, per token: near 1."),
        ("policy/sequence_ratio_max", "number", "Largest ratio of a whole sequence, per token."),
        ("policy/kl_k1", "nats", "Mean log ratio to the policy of the start: unbiased, noisy, may be negative."),
        ("policy/kl_k3", "nats", "The same distance by an estimate that is never negative."),
        ("policy/kl_proximal", "nats", "KL to the proximal policy in the loss (`mirror-descent`)."),
        ("policy/clip_fraction", "share", "Tokens held by a bound on the ratio."),
        ("policy/clip_fraction_low", "share", "Tokens whose ratio is below the lower bound: they no longer push down."),
        ("policy/clip_fraction_high", "share", "Tokens whose ratio is above the upper bound: they no longer push up."),
        ("policy/clip_fraction_dual", "share", "Tokens of negative advantage beyond the second bound."),
        ("policy/weights_capped", "share", "Tokens whose weight is capped (`cispo`)."),
        ("policy/held_by_covariance", "share", "Tokens left out for their covariance (`clip-cov`)."),
        ("policy/penalised_by_covariance", "share", "Tokens with a penalty for their covariance (`kl-cov`)."),
        ("policy/left_out", "share", "Tokens outside of the trust region (`rec`)."),
        ("policy/drift", "number", "The learned drift function (`discovered-po`)."),
        ("policy/entropy", "nats", "Entropy of the policy, as the entropy regulariser sees it."),
        ("policy/proximity_{estimator}", "nats", "Distance to the proximal policy, as its regulariser sees it."),
    ),
    *_panel(
        "off-policy",
        ("staleness/mean", "versions", "Age of the batch's tokens: learner version less the version that sampled."),
        ("staleness/max", "versions", "Age of its oldest token: never above driver.max_staleness."),
        ("learner/off_policy_difference", "nats", "Mean |log p - sampler's log p|: grows with staleness."),
        ("learner/sampler_difference", "nats", "The same over tokens of the newest weights: engine against learner."),
        ("learner/sampler_difference_max", "nats", "The largest of these: a jump means that engine and learner part."),
        ("correction/weight", "number", "Mean off-policy weight: near 1 while the sampling policy is close."),
        ("correction/weight_max", "number", "Largest off-policy weight before it is bounded."),
        ("correction/truncated", "share", "Tokens whose weight was cut off at its bound."),
        ("correction/left_out", "share", "Tokens left out, since their weight is beyond its bound."),
        ("tokens/old_states", "tokens", "Prompt tokens whose cached states may be of older weights."),
    ),
    *_panel(
        "reference",
        ("reference/kl_{estimator}", "nats", "Distance to the reference: without bound, the policy has left it."),
        ("reference/kl_coefficient", "number", "What the distance is multiplied with in the loss, where it changes."),
        ("reference/distance", "nats", "Log ratio of responses to the reference, in the regression."),
        ("reference/version", "versions", "Newest policy weights that a moving reference has taken in."),
    ),
    *_panel(
        "critic",
        ("critic/loss", "number", "Loss of the critic, mean over the updates of the step."),
        ("critic/grad_norm", "number", "Gradient norm of the critic before clipping."),
        ("critic/grad_norm_max", "number", "Largest gradient norm of the critic in the step."),
        ("critic/learning_rate", "number", "Learning rate of the critic."),
        ("critic/value", "score", "Mean value that the critic gives: should follow the return."),
        ("critic/return", "score", "Mean return that it is trained on."),
        ("critic/error", "number", "Mean squared error of the values."),
        ("critic/clip_fraction", "share", "Tokens whose value is held by its bound."),
        ("critic/explained_variance", "number", "1: values tell the returns; 0: no better than their mean."),
    ),
    *_panel(
        "throughput",
        ("tokens/generated", "tokens", "Sampled since the step before; what is dropped later is in it."),
        ("tokens/trained", "tokens", "Response tokens trained on in this step."),
        ("tokens/generated_per_s", "tokens/s", "Sampled tokens over the time since the step before."),
        ("tokens/trained_per_s", "tokens/s", "Trained tokens over the time since the step before."),
        ("time/step_s", "s", "From the step before to this one: all that a step costs."),
        ("time/learner_s", "s", "Of it in the learner's step."),
        ("learner/prepare_s", "s", "Of that before the first update: batch, values, log-probs, advantages."),
        ("learner/update_s", "s", "Of that in forward, backward and optimizer."),
        ("groups/under_way", "count", "Groups being sampled or scored at the end of the step."),
        ("groups/buffered", "count", "Finished groups that wait for the learner at the end of the step."),
        ("groups/dropped", "count", "Groups dropped since the step before; RUN/ledger.sqlite has the reasons."),
        ("groups/dropped_length", "tokens", "Their mean length: far from rollout/length_mean is a bias."),
    ),
    *_panel(
        "utilisation",
        ("bound/generation", "share", "Time of the step in which the run waited for a group to be sampled."),
        ("bound/reward", "share", "Time of the step in which the run waited for a group to be scored."),
        ("bound/learner", "share", "Time of the step in which the run waited for the learner."),
        ("wait/learner_for_rollouts_s", "s", "The learner had no batch."),
        ("wait/generators_for_learner_s", "s", "No training prompt was being sampled, since the gate was closed."),
        ("scale/generators", "count", "Generators asked for, by the config, `rlsys scale` or driver.autoscale."),
        ("scale/reward_workers", "count", "Reward workers that are asked for, likewise."),
        ("scale/learner_ranks", "count", "Ranks of the learner."),
    ),
    *_panel(
        "weights",
        ("weights/version", "versions", "Newest version that a generator has taken."),
        ("weights/gather_s", "s", "The learner collects the weights."),
        ("weights/transfer_s", "s", "Mean time until a generator has the bytes."),
        ("weights/load_s", "s", "Mean time to load them; generation stands still."),
        ("weights/pause_s", "s", "Mean time to stop and to go on again; generation stands still."),
        ("weights/bytes", "bytes", "Size of the weights."),
        ("weights/probe_difference", "nats", "Largest difference of a generator's log-probs to the learner's: near 0."),
    ),
    *_panel(
        "system",
        ("restarts/{role}", "count", "Losses of a generator, rewarder, reference or learner since the step before."),
        ("refused/{kind}", "count", "What cannot be right, since the step before: log-probs, shape, checksum, ..."),
    ),
    *_panel(
        "curriculum",
        ("curriculum/chance_{name}", "share", "Chance that the next prompt is of this category (`category-bandit`)."),
        ("curriculum/explored", "share", "Groups sampled at another temperature (`entropy-target`)."),
        ("curriculum/temperature", "number", "Their mean temperature (`entropy-target`)."),
        ("curriculum/predicted", "score", "Mean success that the critic predicted (`predicted-difficulty`)."),
        ("curriculum/prediction_error", "score", "How far it was off, mean (`predicted-difficulty`)."),
        ("curriculum/difficulty", "number", "Mean difficulty of the prompts, in the unit of the data (`staged`)."),
        ("curriculum/known", "count", "Prompts with an estimate of their success."),
        ("curriculum/in_between", "share", "Of these, solved now and then (`success-budget`)."),
        ("curriculum/samples_max", "count", "Most samples that a prompt was given (`success-budget`)."),
        ("curriculum/samples_min", "count", "Fewest samples that a prompt was given (`success-budget`)."),
        ("curriculum/uncertainty", "score", "Mean deviation of the chosen prompts' success (`uncertain-first`)."),
        ("curriculum/promoted", "share", "Prompts that were drawn for the variance of their scores."),
    ),
    *_panel(
        "algorithm",
        ("a-star-po/hopeless", "count", "Prompts that no sample of the reference solved; they are left out."),
        ("a-star-po/prompts", "count", "Prompts whose optimal value is known."),
        ("a-star-po/value", "score", "Mean optimal value of the prompts."),
        ("ampo/guided", "share", "Demonstrations in use, since no sample of the prompt succeeded."),
        ("bapo/clip_high", "number", "Upper bound of the ratio by now."),
        ("bapo/clip_low", "number", "Lower bound of the ratio by now."),
        ("bnpo/alpha", "number", "First parameter of the beta distribution of success rates."),
        ("bnpo/beta", "number", "Second parameter of the beta distribution of success rates."),
        ("capo/rejected", "share", "Tokens that would move objective or policy too far."),
        ("capo/objective_shift", "number", "Mean size of a token's predicted shift of the objective."),
        ("capo/objective_shift_max", "number", "Largest predicted shift of the objective."),
        ("capo/policy_shift", "nats", "Mean predicted shift of the policy by a token."),
        ("capo/policy_shift_max", "nats", "Largest predicted shift of the policy."),
        ("cgpo/nearness", "share", "Mean factor for being near the reference."),
        ("cgpo/satisfied", "share", "Responses that break no constraint."),
        ("chord/expert", "share", "Trained tokens that are demonstrations."),
        ("chord/mu", "number", "Weight of the demonstrations in the loss."),
        ("chord/phi", "number", "Mean weight of a demonstration's token by its probability."),
        ("clpo/accuracy", "score", "Mean success of the prompts, by which their difficulty is told."),
        ("clpo/hard", "share", "Rollouts of hard prompts."),
        ("constrained/violation_{name}", "score", "Threshold less the mean of a component: above 0 it is missed."),
        ("constrained/weight_{name}", "number", "Weight of a reward component by its Lagrange multiplier."),
        ("copg/contrast", "number", "Mean size of the contrast between two responses."),
        ("copo/consistency_entropy", "nats", "Mean entropy of the final answers of a group."),
        ("copo/local_weight", "share", "Mean weight of the advantage within the group."),
        ("d3s/rows_share", "share", "Rollouts that are kept."),
        ("d3s/tokens_kept", "share", "Tokens that are kept."),
        ("dynamic/hypervolume_gain", "number", "By how much the batch moved the Pareto front."),
        ("dynamic/weight", "number", "Factor of the reward for moving the Pareto front."),
        ("dynamic/weight_{name}", "share", "Weight of a reward component by now."),
        ("ensemble/variance", "score", "Mean variance among the reward models: where it is high, they guess."),
        ("epo/history", "nats", "Mean entropy of earlier steps."),
        ("epo/outside", "share", "Tokens whose entropy is outside of its band."),
        ("explored/rows", "count", "Rollouts that were sampled at another temperature."),
        ("explored/success", "share", "Those of them that succeeded."),
        ("explored/trained", "count", "Those of them that are trained on."),
        ("fun-rl/bonus", "score", "Mean bonus of the advantages for entropy."),
        ("gtpo/conflict_tokens", "share", "Tokens that responses with advantages of both signs have in common."),
        ("gtpo/entropy", "nats", "Mean entropy of the responses."),
        ("gtpo/filtered", "share", "Responses left out for their entropy."),
        ("gtpo/start_entropy", "nats", "Mean entropy at the first step, with which it is compared."),
        ("hapo/boosted", "share", "Tokens with wider bounds for their uncertainty."),
        ("hapo/uncertain_tokens", "share", "Tokens that count as uncertain."),
        ("hpt/expert", "share", "Trained tokens that are demonstrations."),
        ("hpt/failed", "share", "Demonstrations in use, since the samples of the prompt failed."),
        ("nft/implied_ratio_clamped", "share", "Tokens of wrong responses whose implied ratio met its floor."),
        ("nft/right", "share", "Tokens of right responses."),
        ("nft/solve_rate", "share", "Mean success of the prompts."),
        ("pairwise/slope", "number", "Mean size of the slope of a pair."),
        ("pf-ppo/rows_kept", "share", "Rollouts that are kept."),
        ("ppo-c/average", "score", "Running mean of the scores."),
        ("ppo-c/confidence", "number", "Mean confidence that the responses state, 0 to 10."),
        ("ppo-max/advantages_clipped", "share", "Tokens whose advantage met its bound."),
        ("prompt_value/error", "score", "Mean error of the critic's value of the prompts."),
        ("red/dropped", "share", "Responses of negative advantage that were dropped."),
        ("red/weight", "number", "Mean exponential weight of the responses."),
        ("reg-grpo/error", "number", "Mean error of the regression."),
        ("regression/error", "number", "Mean squared error of the regression."),
        ("remax/greedy_score", "score", "Mean score of the greedy responses, the baseline."),
        ("riskpo/paper_score", "score", "Mean score of the bundles."),
        ("riskpo/quantile_high", "score", "Upper quantile of their scores."),
        ("riskpo/quantile_low", "score", "Lower quantile of their scores."),
        ("seed/semantic_entropy", "nats", "Mean entropy of the final answers of a group."),
        ("segments/advantage_size", "score", "Mean size of the advantage of a token with values at both ends."),
        ("segments/tokens_discarded", "tokens", "Tokens of segments without an advantage, taken out."),
        ("segments/tokens_left_out", "share", "Tokens of segments without a value at either end."),
        ("segments/tokens_too_sure", "share", "Tokens not trained, since the policy was sure of them."),
        ("segments/value_start", "score", "Mean value at the beginning of the segments."),
        ("sft/nll", "nats", "Mean -log p of the demonstrations' tokens: falls as they are learned."),
        ("sft/probability", "share", "Mean probability of the demonstrations' tokens."),
        ("spo/forgetting", "share", "Mean share of a prompt's value that is kept from its last visit."),
        ("spo/value", "score", "Mean tracked value of the prompts."),
        ("stratified/strata_per_prompt", "number", "Strata over prompts: how finely responses are compared."),
        ("trpa/groups_with_pairs", "share", "Tokens of groups in which there are pairs to prefer."),
        ("whiten/mean", "score", "Mean of the advantages before whitening."),
        ("whiten/std", "score", "Standard deviation of the advantages before whitening."),
    ),
)  # fmt: skip


@cache
def find(name: str) -> Definition | None:
    """The definition of a metric; of several patterns that fit the one with the most text of its own."""
    exact = next((d for d in DEFINITIONS if d.name == name), None)
    fitting = [d for d in DEFINITIONS if d.is_pattern and d.regex.fullmatch(name)]
    return exact or max(fitting, key=lambda d: len(re.sub(r"\{\w+\}", "", d.name)), default=None)


class Undefined:
    """Warns of metrics without a definition, once of each."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def look(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._said and find(name) is None:
                self._said.add(name)
                logger.warning("metric %s is logged, but not defined in rlsys/metrics/catalog.py", name)


def prometheus_name(name: str) -> str:
    """`reward/mean` -> `rlsys_reward_mean`, with the unit at the end where it is one that Prometheus asks for."""
    definition = find(name)
    unit = definition.unit if definition else ""
    for short, long in (("_per_s", "_per_second"), ("_s", "_seconds")):
        if name.endswith(short) and unit in ("s", "tokens/s"):
            name = name.removesuffix(short) + long
            break
    for kind, suffix in (("share", "_ratio"), ("bytes", "_bytes")):
        if unit == kind and not name.endswith(kind):
            name += suffix
    return "rlsys_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
