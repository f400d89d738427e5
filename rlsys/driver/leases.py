"""Work given to a worker is lent, against progress. Pure: no I/O; the caller passes the time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Account:
    leases: set[str]
    progress: int
    moved_at: float
    held: int = 0


class Leases:
    """Finds workers that hold work and do not get on with it.

    Each worker has a progress number (tokens sampled, groups scored). While it holds work, the number must change at
    least every `patience` seconds; how long one piece takes in all does not matter, so a long rollout that advances is
    never given up. The first piece of work given to an idle worker starts its clock. While a worker is `hold`-ed (a
    weight update, which has its own deadline), its clock stands still.

    Invariants: a worker without work never expires; an expired one had work and showed no new number for `patience`
    seconds; a work id is lent at most once at a time.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._accounts: dict[str, _Account] = {}
        self._owner: dict[str, str] = {}

    def grant(self, worker: str, work: str, now: float) -> None:
        """Lend `work` to `worker`."""
        if work in self._owner:
            raise ValueError(f"{work} is lent to {self._owner[work]} already")
        account = self._accounts.setdefault(worker, _Account(set(), -1, now))
        if not account.leases:
            account.moved_at = now
        account.leases.add(work)
        self._owner[work] = worker

    def release(self, work: str) -> None:
        """The work came back, well or not. Unknown work is ignored: its worker may have been revoked."""
        worker = self._owner.pop(work, None)
        if worker is not None:
            self._accounts[worker].leases.discard(work)

    def progress(self, worker: str, number: int, now: float) -> bool:
        """The worker reports its number; True when it moved."""
        account = self._accounts.setdefault(worker, _Account(set(), -1, now))
        if number == account.progress:
            return False
        account.progress = number
        account.moved_at = now
        return True

    def hold(self, worker: str) -> None:
        """Stop the worker's clock until `resume`."""
        if worker in self._accounts:
            self._accounts[worker].held += 1

    def resume(self, worker: str, now: float) -> None:
        account = self._accounts.get(worker)
        if account is not None and account.held:
            account.held -= 1
            account.moved_at = now

    def deadline(self, worker: str) -> float | None:
        """When the worker's leases expire unless it moves; None when it holds no work."""
        account = self._accounts.get(worker)
        if account is None or not account.leases or account.held:
            return None
        return account.moved_at + self.patience

    def expired(self, now: float) -> list[str]:
        """Workers whose leases have expired, in order of name."""
        deadlines = ((worker, self.deadline(worker)) for worker in sorted(self._accounts))
        return [worker for worker, deadline in deadlines if deadline is not None and deadline <= now]

    def revoke(self, worker: str) -> list[str]:
        """Take all work of a worker back and forget it; returns the work ids, sorted."""
        account = self._accounts.pop(worker, None)
        if account is None:
            return []
        for work in account.leases:
            del self._owner[work]
        return sorted(account.leases)
