"""What has to hold in every run, whatever goes wrong in it: one function each, which returns what does not hold.

Those of `WHILE_RUNNING` are asked whenever time moves on in a process, those of `OF_A_PROCESS` when it has ended, those
of `OF_THE_RUN` at the end. They look into the driver on purpose: what it shows of itself could be wrong with it.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from rlsys.driver import options
from rlsys.driver.loop import Driver
from rlsys.driver.restarts import CLOSE_TIMEOUT_S, INSPECT_TIMEOUT_S, LONGEST_PAUSE_S
from rlsys.driver.workers import WorkerEvents, WorkerPool
from rlsys.errors import DataError
from rlsys.ledger.codec import SCHEMA, read_rows
from rlsys.ledger.story import RunStory, read_run
from rlsys.sim.drive import Simulation
from rlsys.sim.faults import MARK, SLOWER, Faults
from rlsys.sim.schedules import Life, Schedule, longest_piece_s

BY_CHANCE = {"generation failed", "rewards failed", "reference failed"}  # drops that the weights do not decide


@dataclass(slots=True)
class Process:
    """One process of a run, and how it ended: "done", "stopped", "interrupted", "killed", or the error."""

    schedule: Schedule
    life: Life
    faults: Faults
    simulation: Simulation
    first: int | None = None  # step that it went on from; None: it ended before it knew
    end: str = ""
    error: BaseException | None = None
    seconds: float = 0.0
    longest_still_s: float = 0.0  # without anything that happened
    unheard: list[str] = field(default_factory=list)  # exceptions of the driver's that nobody has asked for
    violations: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Evidence:
    """A run that has ended, on disk and as its processes saw it; `twin` is the same run undisturbed (bound 0)."""

    schedule: Schedule
    run_dir: Path
    processes: list[Process]
    story: RunStory
    rows: list[dict[str, Any]]  # of the ledger: id, idx, state, reason, step, settled
    drops: int  # that there have ever been, those of steps that were done again included
    chances: int  # drops that faults have caused, and rewards that they have changed
    twin: Process | None = None

    @property
    def last(self) -> Process:
        return self.processes[-1]

    @property
    def trained(self) -> dict[int, tuple[str, ...]]:
        """Step -> the batch that made it, by the last process that made it."""
        out: dict[int, tuple[str, ...]] = {}
        for process in self.processes:
            if process.first is None:
                continue
            out = {step: ids for step, ids in out.items() if step <= process.first}
            for learner in process.simulation.learners:
                out |= {b.version + 1: b.prompt_ids for b in learner.batches if b.version >= process.first}
        return out


def read_evidence(schedule: Schedule, run_dir: Path, processes: list[Process], twin: Process | None) -> Evidence:
    with closing(sqlite3.connect(run_dir / "ledger.sqlite")) as db:
        db.row_factory = sqlite3.Row
        rows = [dict(row) for row in db.execute("SELECT id, idx, state, reason, step, settled FROM prompts")]
        query = "SELECT json_extract(detail, '$.reason') FROM events WHERE event = 'dropped'"
        reasons = [reason.partition(":")[0] for (reason,) in db.execute(query)]
    wrong = sum(f.fault.kind == "corrupt" and f.fault.role == "rewarder" for p in processes for f in p.faults.fired)
    chances = wrong + sum(reason in BY_CHANCE for reason in reasons)
    return Evidence(schedule, run_dir, processes, read_run(run_dir), rows, len(reasons), chances, twin)


# ---- while a process runs ----


def nothing_can_become_too_old(driver: Driver) -> list[str]:
    """(I) of `rlsys.driver.buffer`: outstanding(start <= s) <= (s + S + 1 - L) * B for every s."""
    buffer = driver.books.buffer
    starts = Counter(buffer._under_way_by_version)
    for version, entries in buffer._finished.items():
        starts[version] += len(entries)
    outstanding, out = 0, []
    for start in sorted(starts):
        outstanding += starts[start]
        # Between `take` and the end of the step the batch is gone, and the step is not counted yet.
        most = (start + driver.books.bound + 1 - driver.step) * driver.books.batch
        if outstanding > most:
            out.append(f"{outstanding} groups outstanding with start <= {start}, at most {most} at step {driver.step}")
    return out


def the_gate_counts_what_is_started(driver: Driver) -> list[str]:
    gate, buffer, batch = driver.books.gate, driver.books.buffer, driver.books.batch
    here = driver.step * batch + buffer.under_way + buffer.finished
    if gate.kept not in (here, here + batch):  # a batch may be with the learner
        return [f"the gate counts {gate.kept} groups, but {here} are trained, under way or buffered"]
    return []


def the_buffer_counts_what_it_has(driver: Driver) -> list[str]:
    buffer = driver.books.buffer
    if Counter(buffer._under_way.values()) != buffer._under_way_by_version:
        return [f"under way {buffer._under_way}, counted {buffer._under_way_by_version}"]
    return []


def every_lease_has_its_work(driver: Driver) -> list[str]:
    """Leases, jobs and the router's counts are the same thing seen three times, of healthy workers only."""
    out = []
    for pool in _pools(driver):
        owners = {job: worker for worker, jobs in pool._jobs.items() for job in jobs}
        if owners != pool._leases._owner:
            out.append(f"{pool.options.kind}: leases {pool._leases._owner}, jobs {owners}")
        if pool._jobs.keys() != pool._healthy.keys() or set(pool._router.workers) != pool._healthy.keys():
            out.append(f"{pool.options.kind}: healthy {[*pool._healthy]}, with jobs {[*pool._jobs]}")
        for name in pool._jobs:
            if pool._router.outstanding(name) != len(pool._jobs[name]):
                out.append(f"{name}: {pool._router.outstanding(name)} outstanding, {len(pool._jobs[name])} lent")
    return out


def no_work_waits_for_a_free_worker(driver: Driver) -> list[str]:
    out = []
    for pool in _pools(driver):
        now, router = driver.recorder.now(), pool._router
        ready = [n for n, w in router._workers.items() if router._ready(w, now)]
        free = [n for n in ready if router.capacity is None or router.outstanding(n) < router.capacity]
        waiting = [job for job in pool._queue if not job.future.done()]
        if waiting and free:
            out.append(f"{len(waiting)} pieces of {pool.options.kind} work wait, but {free} are free")
        if pool._companies and any(not router.outstanding(n) for n in ready):
            out.append(f"work handed over together waits for a {pool.options.kind}, but one is idle")
    return out


def no_generator_is_ahead_of_the_learner(driver: Driver) -> list[str]:
    ahead = {name: version for name, version in driver.generators.versions.items() if version > driver.step}
    if ahead or driver.books.gate.version > driver.step:
        return [f"the learner is at {driver.step}, the gate at {driver.books.gate.version}, generators at {ahead}"]
    return []


def no_slot_stays_open(driver: Driver) -> list[str]:
    """Prompts are started as soon as the gate lets them."""
    admitting = any(getattr(task.get_coro(), "__name__", "") == "admit" for task in driver._background)
    if admitting and (slots := driver._slots()):
        return [f"{slots} slots are open, and nobody starts a prompt"]
    return []


def the_books_agree(driver: Driver) -> list[str]:
    """What is under way is pending in the ledger, what waits or is trained on is buffered."""
    states = driver.ledger._states
    if not driver.started:
        return []
    buffered = {item.info.prompt_id for item in driver.books.buffer.waiting()}
    missing = [i for i in buffered if states.get(i) != "buffered"]
    more = sum(state == "buffered" for state in states.values()) - len(buffered)
    if missing or more not in (0, driver.books.batch):
        return [f"buffered but not in the ledger: {missing}; {more} more are buffered in the ledger"]
    return []


# ---- of a process that has ended ----


def it_ends_as_it_should(process: Process) -> list[str]:
    """With an error only where so many faults were met, or where a role itself said so."""
    if process.error is None:
        return []
    text, fired = str(process.error), process.faults.fired
    if found := re.match(r"(\S+) failed (\d+) times in a row", text):
        name, times = found[1], int(found[2])
        moving = process.life.config.reference.update != "frozen"
        names = {"learner", "reference"} if moving and name in ("learner", "reference") else {name}
        causes = sum(f.name in names and f.fault.kind != "scale" for f in fired)
        if process.life.config.driver.restarts < times <= causes:
            return []
        return [f"{text!r}, but {name} has met {causes} faults"]
    said = {"learner", "reference"} & {f.name for f in fired if f.fault.kind == "fail"}
    if MARK in text and said:
        return []
    return [f"the run ended with {type(process.error).__name__}: {text}"]


def without_faults_it_is_done(process: Process) -> list[str]:
    if process.end != "done" and not process.faults.fired:
        return [f"nothing went wrong, but the process ended: {process.end}"]
    return []


def no_wait_without_end(process: Process) -> list[str]:
    """Something happens, or is given up, within the longest time that anything may take."""
    most = longest_wait_s(process)
    if process.longest_still_s > most:
        return [f"nothing happened for {process.longest_still_s:.0f} s, where nothing may take more than {most:.0f} s"]
    return []


def longest_wait_s(process: Process) -> float:
    """Of all deadlines, and of the work that has none because it makes progress: the longest; then a restart."""
    c, schedule = process.life.config, process.schedule
    pools = [
        options.generator_options(c, WorkerEvents()),
        options.rewarder_options(c, WorkerEvents(), schedule.parts()["strategy"]),
    ]
    deadlines = [
        *(1.25 * pool.patience for pool in pools),
        1.25 * c.driver.silence_timeout_s,
        *(c.rollout.start_timeout_s, c.rewards.start_timeout_s, c.learner.start_timeout_s, c.reference.start_timeout_s),
        *(c.learner.step_timeout_s, c.weights.timeout_s),
        SLOWER * longest_piece_s(schedule),
    ]
    return max(deadlines) + INSPECT_TIMEOUT_S + CLOSE_TIMEOUT_S + LONGEST_PAUSE_S


def batches_are_whole_and_fresh(process: Process) -> list[str]:
    c = process.life.config.driver
    return [
        f"the batch of step {b.version + 1} has {len(b.prompt_ids)} groups, its oldest token is of version {b.oldest}"
        for learner in process.simulation.learners
        for b in learner.batches
        if len(set(b.prompt_ids)) != c.prompts_per_step or b.version - b.oldest > c.max_staleness
    ]


def a_repeated_step_has_the_same_batch(process: Process) -> list[str]:
    given: dict[int, set[tuple[str, ...]]] = {}
    for learner in process.simulation.learners:
        for batch in learner.batches:
            given.setdefault(batch.version + 1, set()).add(batch.prompt_ids)
    return [f"step {step} was made with {sorted(batches)}" for step, batches in given.items() if len(batches) > 1]


def steps_are_logged_once_and_in_order(process: Process) -> list[str]:
    logged = [step for step, _ in process.simulation.tracker.steps]
    if process.first is None:
        return [f"steps {logged} were logged, but it did not know where it stood"] if logged else []
    if logged != list(range(process.first + 1, process.first + 1 + len(logged))):
        return [f"from step {process.first} on, steps {logged} were logged"]
    if process.end in ("done", "stopped") and process.first + len(logged) != process.simulation.driver.step:
        return [f"steps up to {process.simulation.driver.step} were made, {logged} were logged"]
    return []


def no_work_is_left(process: Process) -> list[str]:
    """At the end of a run nothing is lent but to evaluations, which are cut short."""
    if process.end != "done":
        return []
    jobs = [job for pool in _pools(process.simulation.driver) for jobs in pool._jobs.values() for job in jobs.values()]
    left = [job.id for job in jobs if job.work.training]
    return [f"{left} are lent out at the end"] if left else []


def nothing_goes_unheard(process: Process) -> list[str]:
    """No exception of the driver's that nobody has asked for."""
    return [] if process.end == "killed" else process.unheard


# ---- of the whole run ----


def the_run_is_done(run: Evidence) -> list[str]:
    steps = run.last.life.config.run.steps
    if run.last.end != "done" or run.last.simulation.driver.step < steps:
        return [f"the run ended at step {run.last.simulation.driver.step} of {steps}: {run.last.end}"]
    return []


def one_fate_per_prompt(run: Evidence) -> list[str]:
    """Ledger and rollouts on disk say the same, and every index was drawn once."""
    out = []
    fates: dict[str, set[str]] = {}
    for path in sorted((run.run_dir / "rollouts").glob("*.parquet")):
        for row in pq.read_table(path, columns=["prompt_id", "fate"]).to_pylist():
            fates.setdefault(row["prompt_id"], set()).add(row["fate"])
    for row in run.rows:
        here = fates.pop(row["id"], set())
        if row["state"] == "trained":
            expected = [{"trained"}]
        elif row["state"] == "dropped":
            never_scored = row["reason"].partition(":")[0] in ("generation failed", "segments failed", "rewards failed")
            expected = [{f"dropped: {row['reason']}"}, *([set()] if never_scored else [])]
        else:
            expected = [set()]
        if here not in expected:
            out.append(f"{row['id']} is {row['state']} ({row['reason']}) in the ledger, on disk: {sorted(here)}")
    if fates:
        out.append(f"on disk, but not in the ledger: {sorted(fates)}")
    indices = sorted(row["idx"] for row in run.rows)
    if indices != list(range(len(indices))):
        out.append(f"indices were left out: {indices}")
    return out


def none_is_trained_twice(run: Evidence) -> list[str]:
    counts = Counter(prompt_id for ids in run.trained.values() for prompt_id in ids)
    twice = sorted(prompt_id for prompt_id, n in counts.items() if n > 1)
    return [f"trained twice: {twice}"] if twice else []


def the_ledger_says_what_was_trained(run: Evidence) -> list[str]:
    out = []
    for step, ids in run.trained.items():
        settled = sorted((row for row in run.rows if row["step"] == step), key=lambda row: row["settled"])
        have = tuple(row["id"] for row in settled)
        if have != (() if step in run.schedule.skipped else ids):
            out.append(f"step {step} was made with {ids}, in the ledger: {have}")
    if sorted(run.trained) != list(range(1, run.last.simulation.driver.step + 1)):
        out.append(f"steps made: {sorted(run.trained)}")
    return out


def what_is_trained_is_what_was_scored(run: Evidence) -> list[str]:
    known: dict[str, set[str]] = {}
    for process in run.processes:
        for prompt_id, digests in process.faults.scored.items():
            known.setdefault(prompt_id, set()).update(digests)
    strange = {
        i for process in run.processes for _, i, digest in process.faults.given if digest not in known.get(i, ())
    }
    return [f"trained otherwise than it was scored: {sorted(strange)}"] if strange else []


def the_ledger_is_on_disk(run: Evidence) -> list[str]:
    """What the last process knew of prompts without a fate is what is in the file."""
    known = run.last.simulation.ledger._states
    written = {row["id"]: row["state"] for row in run.rows if row["state"] in ("pending", "buffered")}
    return [] if known == written else [f"in memory {known}, in the file {written}"]


def nothing_is_left_on_disk(run: Evidence) -> list[str]:
    """No buffered group that has a fate, nothing half-written."""
    out = []
    without = {row["id"] for row in run.rows if row["state"] in ("pending", "buffered")}
    for path in sorted((run.run_dir / "rollouts" / "pending").glob("*")):
        if path.suffix == ".damaged":  # was put aside
            continue
        try:
            ids = set(read_rows(path, SCHEMA).column("prompt_id").to_pylist())
        except DataError:
            out.append(f"{path.name} cannot be read")
            continue
        if not ids & without:
            out.append(f"{path.name} is left, with {sorted(ids)}")
    return out


def the_first_prompts_are_trained(run: Evidence) -> list[str]:
    """Where nothing was ever dropped, what is trained is what was drawn first, whatever was in the way."""
    if run.drops:
        return []
    c = run.last.life.config
    indices = sorted(row["idx"] for row in run.rows if row["state"] == "trained")
    return [] if indices == list(range(c.run.steps * c.driver.prompts_per_step)) else [f"trained: {indices}"]


def with_a_bound_of_0_nothing_has_changed(run: Evidence) -> list[str]:
    """The same weights, the same fates, the same reference as in the run that nothing has disturbed."""
    if run.twin is None or run.chances:
        return []
    here, there = run.last.simulation, run.twin.simulation
    out = []
    if here.driver.step != there.driver.step:
        out.append(f"{here.driver.step} steps instead of {there.driver.step}")
    # Those that died after the last step may not be back at the end of the run.
    learners = [learner for learner in here.learners if learner.version == here.driver.step]
    if [learner.state for learner in learners[-1:]] != [there.learner.state]:
        out.append("the learner's state differs from that of the undisturbed run")
    if run.trained != {b.version + 1: b.prompt_ids for b in there.learner.batches}:
        out.append("the batches differ from those of the undisturbed run")
    if run.last.life.config.reference.update != "frozen":
        references = [reference for reference in here.references if reference.versions == there.reference.versions]
        if [reference.state for reference in references[-1:]] != [there.reference.state]:
            taken = [reference.versions for reference in here.references]
            out.append(f"the reference has taken {taken}, undisturbed: {there.reference.versions}")
    mine, other = here.tracker.summaries[-1], there.tracker.summaries[-1]
    for key in ("fates", "staleness"):
        if mine[key] != other[key]:
            out.append(f"{key}: {mine[key]}, undisturbed: {other[key]}")
    if mine["tokens"]["trained"] != other["tokens"]["trained"]:
        out.append(f"tokens: {mine['tokens']}, undisturbed: {other['tokens']}")
    return out


WHILE_RUNNING = (
    nothing_can_become_too_old,
    the_gate_counts_what_is_started,
    the_buffer_counts_what_it_has,
    every_lease_has_its_work,
    no_work_waits_for_a_free_worker,
    no_generator_is_ahead_of_the_learner,
    no_slot_stays_open,
    the_books_agree,
)
OF_A_PROCESS = (
    it_ends_as_it_should,
    without_faults_it_is_done,
    no_wait_without_end,
    batches_are_whole_and_fresh,
    a_repeated_step_has_the_same_batch,
    steps_are_logged_once_and_in_order,
    no_work_is_left,
    nothing_goes_unheard,
)
OF_THE_RUN = (
    the_run_is_done,
    one_fate_per_prompt,
    none_is_trained_twice,
    the_ledger_says_what_was_trained,
    what_is_trained_is_what_was_scored,
    the_ledger_is_on_disk,
    nothing_is_left_on_disk,
    the_first_prompts_are_trained,
    with_a_bound_of_0_nothing_has_changed,
)


def _pools(driver: Driver) -> Iterator[WorkerPool[Any, Any, Any]]:
    yield driver.generators
    yield driver.rewarders
