"""Rolling new weights out, one generator after the other."""

from __future__ import annotations

from collections.abc import Callable

from rlsys.driver.generators import GeneratorPool
from rlsys.driver.waiting import Bell
from rlsys.errors import EngineError, WorkerDied
from rlsys.roles import PublishedWeights


class WeightRollout:
    """Brings every generator to the newest published version.

    One update at a time, each with a deadline. Only the newest version matters: a generator that is two versions behind
    takes the newest one directly. A generator that fails an update is restarted, and joins with the newest weights.
    `rolled_out(v)` is called whenever the smallest version among the healthy generators has become v.
    """

    def __init__(self, pool: GeneratorPool, bell: Bell, rolled_out: Callable[[int], None]) -> None:
        self._pool = pool
        self._bell = bell
        self._rolled_out = rolled_out

    def publish(self, weights: PublishedWeights) -> None:
        """These are the newest weights from now on."""
        self._pool.newest = weights
        self._bell.ring()

    async def run(self) -> None:
        """Update whoever is behind, for ever."""
        while True:
            await self._bell.until(lambda: bool(self._behind()), "new weights")
            for name in self._behind():
                await self._update(name)
                self.report()

    async def reached(self, version: int) -> None:
        """Return when every healthy generator has the version, or a newer one."""
        await self._bell.until(lambda: self._rolled_out_version() >= version, f"version {version} at the generators")

    def report(self) -> None:
        """Tell the gate how far the roll-out is; a change of the set of healthy generators can move it, too."""
        if (version := self._rolled_out_version()) >= 0:
            self._rolled_out(version)

    def _rolled_out_version(self) -> int:
        version = self._pool.rolled_out()
        return -1 if version is None else version

    def _behind(self) -> list[str]:
        newest = self._pool.newest
        if newest is None:
            return []
        return [name for name, version in self._pool.versions.items() if version < newest.version]

    async def _update(self, name: str) -> None:
        generator = self._pool.healthy.get(name)
        if generator is None or self._pool.newest is None:
            return  # lost since; it takes the newest weights when it is back
        try:
            await self._pool.update(generator, self._pool.newest)
        except WorkerDied as error:
            self._pool.lose(generator, error)
        except EngineError as error:
            lost = WorkerDied(name, str(error))
            lost.kind = error.kind
            self._pool.lose(generator, lost)
