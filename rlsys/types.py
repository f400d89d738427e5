"""The values that travel round the loop, one type per arrow.

    Prompt -> RolloutGroup -> ScoredGroup -> RolloutBatch -> TrainBatch

All of them are frozen: a stage returns new values and never fills in fields of one it was given. Arrays are numpy, so
that no stage needs torch to read them. Shape suffixes in names and docstrings:

    B  rollouts (rows) in a batch       T  response tokens, padded to the longest response of the batch
    L  prompt + response tokens, padded P  prompt tokens of one prompt
    n  rollouts in one group

Tokens in, tokens out: `text` fields are for rewards and for people; nothing is ever re-tokenised on its way to the
learner.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length"]
RolloutStatus = Literal["ok", "truncated"]
RewardStatus = Literal["ok", "timeout", "error"]
Origin = Literal["policy", "expert", "greedy", "hotter", "colder"]


class Progress(NamedTuple):
    """How far a run is: learner steps done, of how many."""

    step: int = 0
    steps: int = 1

    @property
    def fraction(self) -> float:
        """0 at the first step, 1 after the last."""
        return min(1.0, self.step / self.steps)


START = Progress()


@dataclass(frozen=True, slots=True, eq=False)
class Demonstration:
    """A response out of the data, ending with the end-of-sequence token."""

    text: str
    token_ids: np.ndarray  # int32 [T]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One draw from a prompt source.

    `id` is unique in a run: source, row and epoch, such as `"sums/17@0"`. `index` is its place in the seeded order of
    the run (0, 1, 2, ...), which is what a resume continues from. `seed` seeds the sampling of its rollouts: sample i
    uses `seed + i`.
    """

    id: str
    index: int
    token_ids: np.ndarray  # int32 [P]
    text: str
    task: str
    answer: str | None
    seed: int
    metadata: Mapping[str, Any] = field(default_factory=dict)
    demonstration: Demonstration | None = None  # not kept on disk: a prompt that is drawn again has it again
    # The last so many of `token_ids` begin the response: the texts of the rollouts have them, their tokens do not.
    prefix_tokens: int = 0


class VersionSpan(NamedTuple):
    """Response tokens `[start, end)` were sampled by weight version `version`."""

    version: int
    start: int
    end: int


class Segment(NamedTuple):
    """Response tokens `[start, end)`, with optional Monte-Carlo value estimates at its two ends.

    `spread` is the standard deviation of the end values of all segments that begin where this one does. `first` is
    False where an earlier rollout of the group has the same segment, which is then to be trained there and not here.
    """

    start: int
    end: int
    start_value: float | None = None
    end_value: float | None = None
    spread: float | None = None
    first: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled response.

    `version_spans` cover `[0, T)` without gaps, in rising order of version (but where pieces that several generators
    have sampled are joined). `behavior_logprobs` are natural
    logarithms under the policy that sampled the token, at the sampling temperature. `action_mask` is False where the
    policy did not choose the token (a tool's or environment's output).

    Example: `token_ids=[5, 9, 2]`, `version_spans=((3, 0, 2), (4, 2, 3))`: the first two tokens come from version 3,
    the last from version 4, which arrived while the rollout was running.
    """

    prompt_id: str
    sample: int
    token_ids: np.ndarray  # int32 [T]
    action_mask: np.ndarray  # bool [T]
    behavior_logprobs: np.ndarray  # float32 [T]
    version_spans: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    text: str
    segments: tuple[Segment, ...] = ()
    parent: tuple[int, int] | None = None  # (sample, position) where this rollout branches off, for trees
    # "expert": a demonstration out of the data, with log-probs 0 and no spans, since no weights sampled it;
    # "greedy": the most likely response, for a baseline only; "hotter", "colder": sampled at a temperature above or
    # below the one that is trained at, which its log-probs are at, too
    origin: Origin = "policy"

    @property
    def status(self) -> RolloutStatus:
        return "truncated" if self.finish_reason == "length" else "ok"

    @property
    def versions(self) -> np.ndarray:
        """Weight version of each token, int32 [T]."""
        out = np.full(len(self.token_ids), -1, dtype=np.int32)
        for version, start, end in self.version_spans:
            out[start:end] = version
        return out


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """A prompt with its n rollouts, in order of `sample`."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]
    generator: str  # the worker that sampled it, such as "generator-0"
    old_states: int = 0  # tokens of the prompt whose states were read from a cache that older weights may have filled


@dataclass(frozen=True, slots=True, eq=False)
class Reward:
    """What the reward functions said of one rollout.

    `score` is NaN unless `status` is "ok": a reward that timed out is not a reward of zero. `components` holds each
    reward function's own value by name; `detail` says what went wrong.
    """

    status: RewardStatus
    score: float
    components: Mapping[str, float] = field(default_factory=dict)
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class ScoredGroup:
    """A group with one `Reward` per rollout, in the same order."""

    group: RolloutGroup
    rewards: tuple[Reward, ...]

    @property
    def prompt(self) -> Prompt:
        return self.group.prompt

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        return self.group.rollouts

    @property
    def scores(self) -> np.ndarray:
        """float32 [n], NaN where unscored."""
        return np.array([r.score for r in self.rewards], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class GroupInfo:
    """What the driver knows of a group without touching its arrays."""

    prompt_id: str
    index: int
    generator: str
    lengths: tuple[int, ...]  # response tokens of each rollout
    min_version: int
    max_version: int
    truncated: int = 0  # rollouts cut at the length limit
    scores: tuple[float, ...] = ()  # NaN where unscored; empty before scoring
    reward_statuses: tuple[RewardStatus, ...] = ()
    tokens_by_version: tuple[tuple[int, int], ...] = ()  # (weight version, response tokens it sampled), rising
    old_states: int = 0  # as in RolloutGroup
    distinct_3: float = 0.0  # different three-token sequences of all rollouts, as a share of all of them
    # (reward function, sum of its own values, number of them), over the rollouts that `scores` are of, scored ones only
    components: tuple[tuple[str, float, int], ...] = ()

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def sampled_tokens(self) -> int:
        """Without those of demonstrations."""
        return sum(count for _, count in self.tokens_by_version)


def group_info(group: RolloutGroup, rewards: tuple[Reward, ...] = ()) -> GroupInfo:
    """The metadata of a group (of a `ScoredGroup` when its rewards are given).

    Scores are those of the policy's own rollouts, where there are any.
    """
    own = [rollout.origin == "policy" for rollout in group.rollouts]
    spans = [span for rollout in group.rollouts for span in rollout.version_spans]
    by_version: Counter[int] = Counter()
    for span in spans:
        by_version[span.version] += span.end - span.start
    return GroupInfo(
        prompt_id=group.prompt.id,
        index=group.prompt.index,
        generator=group.generator,
        lengths=tuple(len(r.token_ids) for r in group.rollouts),
        min_version=min((s.version for s in spans), default=-1),
        max_version=max((s.version for s in spans), default=-1),
        truncated=sum(r.status == "truncated" for r in group.rollouts),
        scores=tuple(float(r.score) for r, mine in zip(rewards, own, strict=False) if mine or not any(own)),
        reward_statuses=tuple(r.status for r in rewards),
        tokens_by_version=tuple(sorted(by_version.items())),
        old_states=group.old_states,
        distinct_3=_distinct([r.token_ids for r in group.rollouts if r.origin != "expert"]),
        components=_components([r for r, mine in zip(rewards, own, strict=False) if mine or not any(own)]),
    )


def _components(rewards: Sequence[Reward]) -> tuple[tuple[str, float, int], ...]:
    found: dict[str, list[float]] = {}
    for reward in rewards:
        if reward.status == "ok":
            for name, value in reward.components.items():
                found.setdefault(name, []).append(float(value))
    return tuple((name, sum(values), len(values)) for name, values in found.items())


def _distinct(responses: Sequence[np.ndarray], n: int = 3) -> float:
    """Different n-grams over all n-grams of the responses; 0 when there are none (Li et al. 2016, distinct-n)."""
    windows = [np.lib.stride_tricks.sliding_window_view(ids, n) for ids in responses if len(ids) >= n]
    if not windows:
        return 0.0
    grams = np.concatenate(windows)
    return len(np.unique(grams, axis=0)) / len(grams)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutBatch:
    """Groups collated into padded arrays: what advantages are estimated from. Right-padded; row = one rollout.

    `mask_BT` is True for response tokens that are trained on: chosen by the policy, in a rollout that was scored.
    """

    input_ids_BL: np.ndarray  # int64, prompt then response
    prompt_lengths_B: np.ndarray  # int64
    response_lengths_B: np.ndarray  # int64
    mask_BT: np.ndarray  # bool
    behavior_logprobs_BT: np.ndarray  # float32, 0 in the padding
    versions_BT: np.ndarray  # int32, -1 in the padding
    scores_B: np.ndarray  # float32, NaN where unscored
    scored_B: np.ndarray  # bool
    group_B: np.ndarray  # int64: rows of one prompt share a number 0, 1, 2, ...
    names_B: tuple[str, ...]  # "prompt-id#sample", for error messages and records
    reference_logprobs_BT: np.ndarray | None  # float32; None when the algorithm needs no reference
    texts_B: tuple[str, ...] = ()  # responses
    tasks_B: tuple[str, ...] = ()
    components_BK: np.ndarray | None = None  # float32, the value of each reward function; NaN where it has none
    component_names: tuple[str, ...] = ()  # [K]
    finished_B: np.ndarray | None = None  # bool; False: cut at the length limit. None: all finished
    expert_B: np.ndarray | None = None  # bool; demonstrations. None: there are none
    greedy_B: np.ndarray | None = None  # bool; greedy baselines, whose mask is empty. None: there are none
    # int8; 1 sampled at a higher temperature than the one that is trained at, -1 at a lower one. None: there are none
    explored_B: np.ndarray | None = None
    # float32, of the token's segment: start value, end value, spread (NaN: there is none), and 1 where it is `first`.
    # None: no rollout has segments
    segments_BTF: np.ndarray | None = None

    @property
    def rows(self) -> int:
        return len(self.names_B)

    @property
    def sampled_B(self) -> np.ndarray:
        """bool: sampled by the policy, at the temperature that is trained at."""
        out = np.ones(self.rows, dtype=bool)
        if self.expert_B is not None:
            out &= ~self.expert_B
        if self.explored_B is not None:
            out &= self.explored_B == 0
        return out

    @property
    def prompt_ids_B(self) -> tuple[str, ...]:
        return tuple(name.rpartition("#")[0] for name in self.names_B)


@dataclass(frozen=True, slots=True, eq=False)
class TrainBatch:
    """What one learner step consumes. Built by `rlsys.batches.build_train_batch` and by nothing else.

    `loss_weights_BT` carries the aggregation (token mean, sequence mean, ...) with its global normaliser: the loss of
    any subset of rows is `sum(per_token_loss * loss_weights)`, so the gradient does not depend on how the rows are
    cut into micro-batches or spread over ranks.
    """

    rollouts: RolloutBatch
    advantages_BT: np.ndarray  # float32
    loss_weights_BT: np.ndarray  # float32, 0 where masked
    proximal_logprobs_BT: np.ndarray | None  # float32; decoupled objective only
    values_BT: np.ndarray | None  # float32; with a critic only
    returns_BT: np.ndarray | None  # float32; with a critic only
    # float32 each: what parts of the algorithm leave for other parts of it
    extras_BT: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class StartOfStep:
    """What the learner works out before the advantages, float32 [B, T]; None where the algorithm asks for none."""

    values: np.ndarray | None = None  # the critic's, before each token
    proximal: np.ndarray | None = None  # log-probs of the policy at the start of the step
    entropy: np.ndarray | None = None  # its entropy
    curvature: np.ndarray | None = None  # [B, T, 3]: see `rlsys.models.logprobs.ChunkedHead.curvature`
    rescored: np.ndarray | None = None  # [B', T'], its log-probs of the rows that the algorithm wants to see again
    progress: Progress = START
