"""What the driver asks of the other parts: one protocol per role, with the small messages they exchange.

Roles are handed to the driver as objects of these protocols. `rlsys.actors` implements them over Ray actors,
`rlsys.sim` with classes that only take time, in one process and without Ray. A `Handle[X]` is an X that may live
elsewhere: the value itself in one process, a Ray object reference on a cluster. The driver passes handles on and never
opens them.

Failures: a call raises `WorkerDied` when the process behind the role is gone, another `RlsysError` when the role itself
says that it failed. Every call is awaited with a deadline by the driver.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from rlsys.durable import Files
from rlsys.metrics import Metric
from rlsys.storage import Place
from rlsys.types import GroupInfo, Prompt

if TYPE_CHECKING:
    from rlsys.config.models import Config

Handle = Any  # Handle[X]: an X, or a reference to one

INSPECT_TIMEOUT_S = 15.0


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one prompt. `temperature=0` is greedy."""

    n: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    greedy: bool = False  # one more rollout, at temperature 0, as a baseline
    expert: bool = False  # and the prompt's demonstration
    origin: Literal["policy", "hotter", "colder"] = "policy"  # of the samples: hotter than is trained at, or colder


@dataclass(frozen=True, slots=True)
class Branch:
    """A prompt that begins a response, to be sampled on from there."""

    prompt: Prompt
    n: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Probe:
    """A short token sequence with the learner's own log-probs: the generator must find the same ones.

    `logprobs[i]` is the natural log-prob of `token_ids[i + 1]` given `token_ids[: i + 1]`, at temperature 1.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PublishedWeights:
    """One version of the weights, ready to be fetched.

    `manifest` describes the payload (names, shapes, dtypes, offsets, checksum); `payload` is a handle to its bytes.
    """

    version: int
    manifest: Mapping[str, Any]
    payload: Handle
    probe: Probe
    gather_s: float = 0.0  # time the learner spent on collecting the weights


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """What one generator says after a weight update. Seconds; `probe_difference` is the largest absolute one.

    `transfer_s` is the time to have the bytes where the engine can read them, `load_s` to load them, `pause_s` to stop
    and to go on again. Generation stands still for `pause_s + load_s`.
    """

    generator: str
    version: int
    transfer_s: float
    pause_s: float
    load_s: float
    bytes: int
    probe_difference: float


@dataclass(frozen=True, slots=True)
class Generated:
    info: GroupInfo
    payload: Handle  # of RolloutGroup


@dataclass(frozen=True, slots=True)
class Scored:
    info: GroupInfo
    payload: Handle  # of ScoredGroup
    seconds: float = 0.0


class PromptReport(NamedTuple):
    """What a learner step says of one of its prompts, for curricula."""

    advantage: float  # mean of |A| over its trained tokens
    value: float | None = None  # by now, where the estimator tracks one


@dataclass(frozen=True, slots=True)
class StepReport:
    """One learner step. `version` is the one the step made. `skipped` says why when nothing was applied."""

    version: int
    metrics: Mapping[str, Metric]
    tokens: int  # response tokens trained on
    seconds: float
    skipped: str | None = None
    prompts: Mapping[str, PromptReport] = field(default_factory=dict)  # by id, of those trained on


@dataclass(frozen=True, slots=True)
class TrainItem:
    """One group of a batch, in the order in which the batch is to be collated."""

    info: GroupInfo
    scored: Handle  # of ScoredGroup
    reference: Handle | None  # of Reference.logprobs' result; None when not needed


@dataclass(frozen=True, slots=True)
class ProcessReport:
    """One process of a role: for the report of a death or a hang."""

    worker: str  # such as "learner-1"
    node: str  # address of its node
    pid: int
    stacks: str  # Python stacks of it and of its children, each with its state; "" where it has ended
    output: str  # the last lines that it printed; in brackets why there are none


class Role(Protocol):
    """What can be asked of every role, also while it works on something else."""

    @property
    def name(self) -> str: ...

    async def progress(self) -> int:
        """How much it has done; that it answers is a sign of life, also in the middle of another call.

        Raises WorkerDied. Does not come back when a process of the role is stopped.
        """
        ...

    async def inspect(self) -> Sequence[ProcessReport]:
        """What its processes are doing, or printed last.

        Raises nothing for a process that is gone, and takes at most `INSPECT_TIMEOUT_S`.
        """
        ...

    async def close(self) -> None:
        """End it, whatever state it is in. Closing twice is closing once."""
        ...


class Generator(Role, Protocol):
    """One engine. Calls may overlap. Its progress is the number of tokens sampled: a lease is alive while it moves."""

    async def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Sequence[Awaitable[Generated]]:
        """Start sampling every prompt; return one awaitable of `Generated` per prompt, in order."""
        ...

    async def update(self, weights: PublishedWeights) -> UpdateReport:
        """Take a version; requests that are running go on under it. Verifies the checksum and the probe."""
        ...


class Rewarder(Role, Protocol):
    """One reward worker."""

    async def branch(self, rounds: Sequence[Sequence[Handle]]) -> Sequence[Branch]:
        """What is to be sampled next, after these rounds of groups; nothing when that was all.

        Raises SegmentError when that cannot be said.
        """
        ...

    async def score(self, rounds: Sequence[Sequence[Handle]], training: bool) -> Scored:
        """Score a group, with everything that was branched off it. What is not for training has no branches."""
        ...


class Reference(Role, Protocol):
    async def logprobs(self, groups: Sequence[Handle]) -> Sequence[Handle]:
        """For each of the scored groups, the handle of a tuple with one float32 [T] array per rollout."""
        ...

    async def update(self, weights: PublishedWeights) -> None:
        """Take the policy's weights in, as `reference.update` says."""
        ...

    async def save(self, place: Place) -> Files:
        """Write the weights there, and say what the files are; asked for only where they move."""
        ...

    async def load(self, place: Place) -> int:
        """Load what `save` wrote; return the version of the newest policy weights in it, 0: none yet.

        Raises DamagedFileError for what a storage has not kept.
        """
        ...


class Learner(Role, Protocol):
    """The learner group, all ranks behind one handle."""

    async def step(self, items: Sequence[TrainItem]) -> StepReport: ...

    async def publish(self) -> PublishedWeights:
        """The current version's weights."""
        ...

    async def prompt_values(self, prompts: Sequence[Prompt]) -> Sequence[float]:
        """The critic's value at the end of each prompt."""
        ...

    async def save(self, place: Place) -> Awaitable[Files]:
        """Copy everything that has state: model, optimizer, schedule, RNG and every stateful part.

        Returns as soon as later steps cannot change the copy. What it returns is done when the files are written at
        `place` (already private), says what they are, and raises LearnerError, WorkerDied, DiskFullError or
        StorageError. One save at a time: a second one waits for the first.
        """
        ...

    async def load(self, place: Place) -> int:
        """Load what `save` wrote; return the version. Raises DamagedFileError for what a storage has not kept."""
        ...


@dataclass(frozen=True, slots=True)
class Roles:
    """How the driver gets what it works with: `spawn_*` start a role, the first time and after every death.

    A generator and a reward worker are started by name; the learner with the config that it is to have, whose number
    of ranks may change in the course of a run. There is no reference where the algorithm needs none. `release` gives
    back the place of a worker that will not be started again. `check_room` is asked before sizes are changed: it raises
    PlacementError when the cluster has no room for those of a config, ConfigError when they cannot work, and changes
    nothing. Where a place is taken meanwhile by somebody else, `spawn_*` raise PlacementError.
    """

    store: RolloutStore
    spawn_generator: Callable[[str], Awaitable[Generator]]
    spawn_rewarder: Callable[[str], Awaitable[Rewarder]]
    spawn_learner: Callable[[Config], Awaitable[Learner]]
    spawn_reference: Callable[[], Awaitable[Reference]] | None
    release: Callable[[str], None] = lambda name: None
    check_room: Callable[[Config], None] = lambda config: None


class RolloutStore(Protocol):
    """Keeps every finished group on disk (Parquet), and what evaluations were answered."""

    async def buffered(self, group: Handle) -> None:
        """Write a scored group durably, before it counts as buffered."""
        ...

    async def settled(
        self, prompt_ids: Sequence[str], fate: str, step: int, reference: Sequence[Handle | None] = ()
    ) -> None:
        """Move groups from the buffered ones to their final file: fate "trained" or "dropped: reason".

        `reference` has their reference log-probs, where there are any.
        """
        ...

    async def load(self, prompt_ids: Sequence[str], step: int) -> Sequence[TrainItem]:
        """Groups settled at a step, in the given order. Raises DataError when one of them is not there any more."""
        ...

    async def discard(self, prompt_ids: Sequence[str]) -> None:
        """Forget buffered groups without a fate: their prompts will be sampled again."""
        ...

    async def load_buffered(self) -> Mapping[str, Scored]:
        """Buffered groups of an earlier process, by prompt id; their payloads are handles of ScoredGroup."""
        ...

    async def responses(self, group: Handle) -> Sequence[Mapping[str, Any]]:
        """The rollouts of a scored group of an evaluation as rows to be kept: texts and scores, but no tokens."""
        ...

    async def evaluated(self, step: int, responses: Sequence[Mapping[str, Any]]) -> None:
        """Write the `responses` of an evaluation durably, in place of those of an earlier one at this step."""
        ...

    async def roll_back(self, version: int) -> None:
        """Take away the final files, and the evaluations, of steps after `version`: those will be done again."""
        ...

    async def samples(self, step: int, limit: int) -> Sequence[SampleRow]:
        """A few rollouts that the newest settled step wrote down, trained or dropped since the one before it.

        Empty when `step` is not that one.
        """
        ...

    async def close(self) -> None:
        """Write what is still open."""
        ...


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One rollout, for tables that people read."""

    step: int
    prompt_id: str
    prompt: str
    response: str
    answer: str | None
    score: float  # NaN where unscored
    versions: str  # such as "3" or "3-4": the weights that sampled it
    finish_reason: str
    fate: str = "trained"  # or "dropped: why"
    components: Mapping[str, float] = field(default_factory=dict)  # reward function -> its own value
    advantage: float | None = None  # mean |A| over the trained tokens of its prompt's rollouts; None: not trained


class Tracker(Protocol):
    """Where the figures of a run go. The driver calls these on its event loop, so they must be quick: slow ones queue.

    Metric names are paths such as `reward/mean`; values are finite, a figure that does not exist is left out.
    Times are seconds of `time.monotonic()`.
    """

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Once per learner step, in rising order of step (after `resumed(k)` it goes on from k + 1)."""
        ...

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        """`accuracy` (mean score of the scored rollouts), `unscored`, `prompts`, `rollouts`, ... of one evaluation.

        `scores` are those that the accuracy is the mean of, for their distribution.
        """
        ...

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None: ...

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        """Something that took time, for the timeline; `lane` is the worker, such as "generator-0" or "learner".

        `trace` is the id of the prompt that it was done for, where it is a stage in the way of a prompt.
        """
        ...

    def incident(self, title: str, text: str) -> None:
        """A worker died or hangs, or the figures look bad: for whoever watches the run."""
        ...

    def resumed(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`: what was logged for later steps will be logged again."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run ended; `summary` is the content of summary.json. Its `failure` is what ended the run, or null."""
        ...
