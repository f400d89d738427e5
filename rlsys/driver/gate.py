"""Admission: how many groups may be started. Pure: no I/O, no clock."""

from __future__ import annotations


class StalenessGate:
    """Paces the starting of groups so that none can become too old, instead of throwing old ones away.

    With B groups per batch, bound S and rolled-out version v (the smallest weight version among the healthy
    generators), the groups started and not dropped, `kept`, may number at most

        limit = min((v + S + 1) * B, total)

    where `total` is what the whole run will train. A dropped group gives its slot back, so it is replaced. A slot
    frees only when the weights have been *pulled* by every healthy generator, not when the learner has made them: a
    group admitted on weights that nobody has would be born stale.

    Invariants, after every call:
        kept <= limit at the time of every `start`
        version never falls
        open_slots() == max(0, limit - kept)

    S = 0 is synchronous: batch v + 1 is admitted when version v + 1 has been rolled out, and then all of it.
    """

    def __init__(self, batch: int, bound: int, total: int | None = None, version: int = 0, kept: int = 0) -> None:
        if batch < 1 or bound < 0:
            raise ValueError(f"batch must be positive and bound not negative, got {batch} and {bound}")
        self.batch = batch
        self.bound = bound
        self.total = total
        self.version = version
        self.kept = kept

    @property
    def limit(self) -> int:
        """Most groups that may have been started and not dropped by now."""
        limit = (self.version + self.bound + 1) * self.batch
        return limit if self.total is None else min(limit, self.total)

    def open_slots(self) -> int:
        """Groups that may be started now."""
        return max(0, self.limit - self.kept)

    def start(self, groups: int = 1) -> None:
        """Take slots. Raises ValueError when there are not enough: ask `open_slots` first."""
        if groups > self.open_slots():
            raise ValueError(f"{groups} groups started, but only {self.open_slots()} slots are open")
        self.kept += groups

    def drop(self, groups: int = 1) -> None:
        """Give the slots of dropped groups back."""
        if groups > self.kept:
            raise ValueError(f"{groups} groups dropped, but only {self.kept} were started")
        self.kept -= groups

    def advance(self, version: int) -> bool:
        """The smallest version among the healthy generators is `version`; True when that opens slots.

        A lower version than before is ignored: a generator joins only with the newest weights, so a group that was
        admitted at the higher one cannot be sampled by older weights.
        """
        if version <= self.version:
            return False
        before = self.open_slots()
        self.version = version
        return self.open_slots() > before
