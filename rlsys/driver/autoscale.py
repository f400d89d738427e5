"""When a role should have one worker more or one fewer, by where the time of the steps goes. Pure: no clock, no I/O.

    a stage's share of the time             > grow_above        one more worker of the role behind it
    every other stage's than the learner's  < shrink_below      one fewer, where the learner is waited for

Shares are those of `bottleneck`, over the time of the last `window` steps together, since a step that waits for its
batch is often followed by one that does not. Steps that take far longer than the others (an evaluation, a checkpoint)
are left out. After a change, and for as long as workers are starting or leaving, steps do not count, nor do the
`cooldown` steps after that and at the beginning: a new generator takes its time, and the first steps with it are not
like the later ones.

What did not do is tried again after `retry_after` steps: growth for which there was no room, and a size that proved too
small, which waits twice as long each time. Without that, a load that one worker is too few for and two are too many
would make it go back and forth for ever; so it goes back and forth ever more rarely.

Nothing of this is kept in checkpoints: a driver that is started again has seen nothing yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from rlsys.config.models import AutoscaleConfig

Role = Literal["generators", "reward_workers"]

STAGE: Mapping[Role, str] = {"generators": "generation", "reward_workers": "reward"}
ODD = 3.0  # times the median of the window's steps: one that takes longer is left out
LEARNER_SHARE = 0.5  # of the time, at least: then the learner is waited for, and not the reference or the disk


@dataclass(frozen=True, slots=True)
class Wish:
    """A role that should have another size; `why` is for people."""

    role: Role
    size: int
    why: str


@dataclass(slots=True)
class _TooSmall:
    until: int  # the step at which the size may be tried again
    wait: int


class Autoscaler:
    """Told of every step, in their order. Its wishes are within the limits, and one worker away from what there is.

    Whoever is told of a wish says whether it is `granted` or `refused`.
    """

    def __init__(self, config: AutoscaleConfig) -> None:
        self._config = config
        self._limits: dict[Role, tuple[int, int]] = {
            role: limits for role in STAGE if (limits := getattr(config, role)) is not None
        }
        self._step = 0
        self._quiet = config.cooldown  # steps that do not count, from now on
        self._seen: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=config.window)
        self._too_small: dict[tuple[Role, int], _TooSmall] = {}
        self._no_room: dict[Role, int] = {}  # until which step

    def step(
        self, seconds: float, shares: Mapping[str, float], sizes: Mapping[Role, int], settled: bool
    ) -> Wish | None:
        """A step was taken, in so many `seconds`: the `shares` of them by stage (0 to 1), and the `sizes` asked for.

        `settled`: all of these workers are there, and no others.
        """
        self._step += 1
        if not settled:
            self.changed()
        elif self._quiet:
            self._quiet -= 1
        elif shares:
            self._seen.append((seconds, shares))
        if len(self._seen) < self._config.window:
            return None
        return self._grown(sizes) or self._shrunk(sizes)

    def changed(self) -> None:
        """Sizes have changed, by whoever's order: what was seen before says nothing any more."""
        self._seen.clear()
        self._quiet = self._config.cooldown

    def granted(self, wish: Wish, before: int) -> None:
        if wish.size > before:
            key = wish.role, before
            wait = 2 * self._too_small[key].wait if key in self._too_small else self._config.retry_after
            self._too_small[key] = _TooSmall(self._step + wait, wait)
        self.changed()

    def refused(self, role: Role) -> None:
        """There is no room for more of them."""
        self._no_room[role] = self._step + self._config.retry_after

    def _grown(self, sizes: Mapping[Role, int]) -> Wish | None:
        for role in sorted(self._limits, key=self._share, reverse=True):
            size, share, most = sizes[role], self._share(role), self._limits[role][1]
            if share > self._config.grow_above and size < most and self._step >= self._no_room.get(role, 0):
                return Wish(role, size + 1, self._why(f"{STAGE[role]} took {share:.0%} of the time"))
        return None

    def _shrunk(self, sizes: Mapping[Role, int]) -> Wish | None:
        if max(map(self._share, STAGE)) >= self._config.shrink_below or self._of_time("learner") < LEARNER_SHARE:
            return None
        for role, (fewest, _) in self._limits.items():
            size = sizes[role]
            if size > fewest and not self._is_too_small(role, size - 1):
                return Wish(role, size - 1, self._why(f"the learner took {self._of_time('learner'):.0%} of the time"))
        return None

    def _is_too_small(self, role: Role, size: int) -> bool:
        return any(r == role and size <= s and self._step < t.until for (r, s), t in self._too_small.items())

    def _share(self, role: Role) -> float:
        return self._of_time(STAGE[role])

    def _of_time(self, stage: str) -> float:
        longest = ODD * median(seconds for seconds, _ in self._seen)
        kept = [(seconds, shares[stage]) for seconds, shares in self._seen if seconds <= longest]
        return sum(seconds * share for seconds, share in kept) / sum(seconds for seconds, _ in kept)

    def _why(self, what: str) -> str:
        return f"autoscale: {what} of the last {self._config.window} steps"
