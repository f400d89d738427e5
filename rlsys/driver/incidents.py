"""What goes wrong, and who hears of it: the log, the ledger, the trackers, the figures of the step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from rlsys.driver.alerts import Alert
from rlsys.driver.generators import Request
from rlsys.driver.progress import Recorder
from rlsys.driver.workers import Loss, WorkerEvents
from rlsys.errors import RlsysError, WorkerStalled
from rlsys.ledger.ledger import Ledger
from rlsys.roles import ProcessReport

logger = logging.getLogger(__name__)

WORK_NAMED = 3  # pieces of work that a message names


class Incidents:
    """`moved` is called when the set of healthy workers may have changed; `state` says what waits for what;
    `release` gives back the place of a worker that has left."""

    def __init__(
        self,
        ledger: Ledger,
        recorder: Recorder,
        changed: Callable[[], None],
        moved: Callable[[], None],
        release: Callable[[str], None],
    ) -> None:
        self.newest: str | None = None  # for `rlsys status`
        self._ledger = ledger
        self._recorder = recorder
        self._moved = moved
        self._release = release
        self.state: Callable[[], str] = lambda: ""
        self.events = WorkerEvents(
            changed=changed,
            assigned=self._assigned,
            failed=self._failed,
            lost=self._lost,
            reported=self._reported,
            start_failed=self._start_failed,
            joined=self._joined,
            left=self._left,
        )

    def alert(self, alert: Alert) -> None:
        """The figures look bad."""
        self.newest = alert.title
        logger.warning("%s: %s", alert.title, alert.text)
        self._ledger.note("alert", title=alert.title, text=alert.text)
        self._recorder.tracker.incident(alert.title, alert.text)

    def scaled(self, changes: Sequence[str], why: str) -> None:
        """Sizes are being changed; `why` says by whom, or what for."""
        logger.warning("%s (%s)", ", ".join(changes), why)
        self._ledger.note("scaled", changes=list(changes), why=why)

    def no_room(self, what: str, error: RlsysError) -> None:
        """The cluster has none for what was to join; the run goes on with what it has."""
        self.newest = f"no room for {what}"
        logger.warning("there is no room for %s, and the run goes on with what it has: %s", what, error)
        self._ledger.note("no room", worker=what, cause=str(error))
        self._recorder.tracker.incident(f"no room for {what}", str(error))

    def _assigned(self, work: object, worker: str, attempt: int) -> None:
        if isinstance(work, Request) and work.training and work.root is None:
            self._ledger.assigned(work.prompt.id, worker, attempt)

    def _failed(self, work: object, worker: str, error: RlsysError) -> None:
        if error.kind:
            self._recorder.refused(error.kind)
        if isinstance(work, Request) and work.training:
            self._ledger.failed(work.root or work.prompt.id, worker, str(error))

    def _lost(self, loss: Loss) -> None:
        had = f" (at work: {_named(loss.work)})" if loss.work else ""
        self.newest = f"{loss.worker}: {loss.error.cause}"
        logger.warning(
            "%s is lost: %s%s; it is restarted, and its work is done again", loss.worker, loss.error.cause, had
        )
        self._ledger.note("worker lost", worker=loss.worker, cause=loss.error.cause, work=list(loss.work))
        self._recorder.restarted(loss.worker)
        if loss.error.kind:
            self._recorder.refused(loss.error.kind)
        self._moved()

    def _reported(self, loss: Loss) -> None:
        """A hang is reported with what the process was doing; a death with what it said last."""
        hangs = isinstance(loss.error, WorkerStalled)
        title = f"{loss.worker} {'hangs' if hangs else 'died'}"
        waiting = f"{loss.worker} was at work on {_named(loss.work)}\n" if loss.work else ""
        text = f"{loss.error.cause}\n{waiting}{self.state()}\n" + "\n".join(map(described, loss.processes))
        if loss.processes:
            logger.info("%s: %s", title, text)  # not on the screen: it is long
            self._ledger.note(
                "processes of a lost worker",
                worker=loss.worker,
                processes=[
                    {"worker": p.worker, "node": p.node, "pid": p.pid, "stacks": p.stacks, "output": p.output}
                    for p in loss.processes
                ],
                waiting=self.state(),
            )
        self._recorder.tracker.incident(title, text)

    def _start_failed(self, worker: str, error: RlsysError) -> None:
        self.newest = f"{worker} did not start: {error}"
        logger.warning("%s did not start: %s; it is tried again", worker, error)
        self._ledger.note("start failed", worker=worker, cause=str(error))
        if error.kind:
            self._recorder.refused(error.kind)

    def _joined(self, worker: str, again: bool) -> None:
        if again:
            logger.info("%s is back", worker)
        self._ledger.note("worker restarted" if again else "worker joined", worker=worker)
        self._moved()

    def _left(self, worker: str) -> None:
        logger.info("%s has left", worker)
        self._release(worker)
        self._ledger.note("worker left", worker=worker)
        self._moved()


def described(process: ProcessReport) -> str:
    parts = [f"{process.worker}, process {process.pid} on {process.node}:"]
    if process.stacks:
        parts.append(process.stacks)
    if process.output:
        parts.append(f"its last output:\n{process.output}")
    return "\n".join(parts)


def _named(work: tuple[str, ...]) -> str:
    more = f" and {len(work) - WORK_NAMED} more" if len(work) > WORK_NAMED else ""
    return ", ".join(work[:WORK_NAMED]) + more
