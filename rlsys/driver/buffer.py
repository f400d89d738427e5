"""Finished groups waiting for the learner, and the order in which it takes them. Pure: no I/O, no clock."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry(Generic[T]):
    """A finished group: its prompt's index, the oldest weight version of its tokens, and whatever belongs to it."""

    index: int
    version: int
    item: T


class GroupBuffer(Generic[T]):
    """Takes batches of B oldest first, and waits for groups under way that would become too old in the next batch.

    A group's *start version* s is the gate's version when it was admitted, raised to the oldest version among its
    tokens when it is finished. Call a group outstanding while it is started and neither taken nor dropped, and let L be
    the learner's version, which is the number of batches taken. The batch taken at L is trained on weights L, so a
    group's tokens are at most S versions old if it is taken at L <= s + S.

    **Invariant.** For every s: `outstanding(start <= s) <= (s + S + 1 - L) * B`.          (I)

    **Nothing becomes too old.** By (I) with s = L - S - 1, no outstanding group has a start version below L - S; so
    whatever is taken at L has s >= L - S. The rest is to show that (I) always holds.

    - *Starting.* `StalenessGate` at version v admits a group only while the groups started and not dropped (taken ones
      included) stay within (v + S + 1) * B. Of these, L * B have been taken, so *all* outstanding groups number at
      most (v + S + 1 - L) * B: (I) for every s >= v. For s < v the counts do not change.
    - *Dropping, finishing.* Dropping lowers counts. Raising a group's start version moves it out of the counts of some
      lower s and leaves the others as they are.
    - *Taking.* Here L becomes L + 1, so the right side of (I) loses B. `ready` asks for just this: that (I) holds
      afterwards, when the B oldest finished groups are gone.

    **It never waits for ever.** When every outstanding group is finished and there are B of them, `ready` holds: for an
    s with outstanding(start <= s) >= B, the B oldest are all among these, and both sides lose B; for any other s all of
    them are taken and 0 is left, which is within the bound unless s < L - S, where by (I) there was nothing. So `ready`
    waits for groups under way only, and the driver's leases see to it that each of those finishes or is dropped. If
    fewer than B are outstanding, the gate has slots open, or opens them when the newest weights are rolled out: then
    at v = L it lets (S + 1) * B >= B groups be outstanding.

    The bound is checked again all the same: `expire` gives up what is too old, and `take` refuses it.

    Order within a batch: start version, then index. With S = 0 all groups of a batch have the same start version, so
    the batch is sorted by index and does not depend on which group was finished first.
    """

    def __init__(self, batch: int, bound: int) -> None:
        self.batch = batch
        self.bound = bound
        self._under_way: dict[int, int] = {}  # index -> start version
        self._under_way_by_version: Counter[int] = Counter()
        self._finished: dict[int, dict[int, Entry[T]]] = {}  # start version -> index -> entry

    @property
    def under_way(self) -> int:
        """Groups started and not yet finished."""
        return len(self._under_way)

    @property
    def finished(self) -> int:
        """Groups that wait to be taken."""
        return sum(map(len, self._finished.values()))

    def start(self, index: int, version: int) -> None:
        """The group of prompt `index` is under way; its tokens will be of `version` or newer."""
        if index in self._under_way or any(index in entries for entries in self._finished.values()):
            raise ValueError(f"group {index} is outstanding already")
        self._under_way[index] = version
        self._under_way_by_version[version] += 1

    def finish(self, index: int, version: int, item: T) -> None:
        """The group is complete, its oldest token of `version`."""
        started = self._leave(index)
        version = max(version, started) if version >= 0 else started  # -1: a group without a token
        self._finished.setdefault(version, {})[index] = Entry(index, version, item)

    def drop(self, index: int) -> None:
        """The group under way will not be finished, or the finished one is given up."""
        if not any(entries.pop(index, None) for entries in self._finished.values()):
            self._leave(index)

    def update(self, index: int, item: T) -> None:
        """What belongs to a finished group is another thing now; of a group that has gone, nothing."""
        for entries in self._finished.values():
            if index in entries:
                entries[index] = replace(entries[index], item=item)

    def _leave(self, index: int) -> int:
        started = self._under_way.pop(index, None)
        if started is None:
            raise ValueError(f"group {index} is not under way")
        self._under_way_by_version[started] -= 1
        if not self._under_way_by_version[started]:
            del self._under_way_by_version[started]
        return started

    def ready(self, version: int) -> bool:
        """Whether a batch may be taken by the learner at `version` so that no group left can become too old."""
        left_to_take = self.batch
        if self.finished < left_to_take:
            return False
        outstanding_after = 0
        for start in sorted(self._under_way_by_version.keys() | self._finished.keys()):
            here = len(self._finished.get(start, ()))
            taken = min(here, left_to_take)
            left_to_take -= taken
            outstanding_after += here - taken + self._under_way_by_version[start]
            if outstanding_after > max(0, start + self.bound - version) * self.batch:
                return False
        return True

    def take(self, version: int) -> list[Entry[T]]:
        """The next batch, for the learner at `version`. Raises ValueError unless `ready`, or if a group is too old."""
        if not self.ready(version):
            raise ValueError(f"no batch is ready at version {version}")
        batch = list(itertools.islice(self._in_order(), self.batch))
        for entry in batch:
            del self._finished[entry.version][entry.index]
        if batch[0].version < version - self.bound:
            raise ValueError(f"group {batch[0].index} of version {batch[0].version} is too old at {version}")
        return batch

    def waiting(self, most: int | None = None) -> list[T]:
        """What is finished and not taken, in the order of `take`; no more than `most`."""
        return [entry.item for entry in itertools.islice(self._in_order(), most)]

    def _in_order(self) -> Iterator[Entry[T]]:
        for start in sorted(self._finished):
            for index in sorted(self._finished[start]):
                yield self._finished[start][index]

    def expire(self, version: int) -> list[Entry[T]]:
        """Remove and return finished groups that are too old for the learner at `version`: none in normal running."""
        old = [start for start in self._finished if start < version - self.bound]
        return [entry for start in sorted(old) for entry in self._finished.pop(start).values()]
