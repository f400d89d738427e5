"""Virtual time."""

from __future__ import annotations

import asyncio
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlsys.sim import clock
from rlsys.sim.clock import VirtualLoop, run_virtually


def test_time_jumps_in_order() -> None:
    log: list[tuple[str, float]] = []

    async def wait(name: str, seconds: float) -> None:
        await asyncio.sleep(seconds)
        log.append((name, asyncio.get_running_loop().time()))

    async def main() -> None:
        await asyncio.gather(wait("year", 3.2e7), wait("second", 1.0), wait("day", 86400.0))

    run_virtually(main())
    assert [name for name, _ in log] == ["second", "day", "year"]
    assert [at for _, at in log] == pytest.approx([1.0, 86400.0, 3.2e7])


def test_a_deadline_is_met_in_virtual_time() -> None:
    async def main() -> None:
        async with asyncio.timeout(3600):
            await asyncio.Future()

    with pytest.raises(TimeoutError):
        run_virtually(main())


def test_a_deadlock_is_an_error() -> None:
    async def main() -> None:
        await asyncio.Future()

    with pytest.raises(RuntimeError, match="deadlock"):
        run_virtually(main())


def test_threads_are_done_on_the_spot() -> None:
    async def main() -> tuple[int, float]:
        value = await asyncio.to_thread(lambda: 7)
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return value, asyncio.get_running_loop().time()

    assert run_virtually(main()) == (7, 0.0)


def test_threads_can_take_time_and_one_of_them_does_one_thing_after_the_other() -> None:
    done: list[tuple[str, float]] = []
    seconds = iter([5.0, 1.0, 2.0])

    async def main() -> None:
        loop, thread = asyncio.get_running_loop(), ThreadPoolExecutor(1)
        work = [(thread, "first"), (thread, "second"), (None, "elsewhere")]
        await asyncio.gather(
            *(loop.run_in_executor(t, lambda name=name: done.append((name, loop.time()))) for t, name in work)
        )

    run_virtually(main(), lambda: VirtualLoop(lambda: next(seconds)))
    assert done == [("elsewhere", 2.0), ("first", 5.0), ("second", 6.0)]


def test_a_loop_that_is_halted_does_no_work_any_more() -> None:
    done: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.call_later(0.5, lambda: setattr(loop, "halted", True))
        async with asyncio.timeout(10.0):
            await asyncio.to_thread(done.append, "written")

    with pytest.raises(TimeoutError):
        run_virtually(main(), lambda: VirtualLoop(lambda: 1.0))
    assert done == []


def test_quiet_is_when_nothing_can_be_done_at_once() -> None:
    ready, seen = [0], []

    async def main() -> None:
        for _ in range(3):
            for _ in range(5):
                await asyncio.sleep(0)
                ready[0] += 1
            await asyncio.sleep(1.0)

    run_virtually(main(), lambda: VirtualLoop(quiet=lambda: seen.append(ready[0])))
    assert seen == [5, 10, 15]


def test_time_that_stands_still_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "STANDSTILL", 1000)

    async def main() -> None:
        for _ in itertools.count():
            await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="standstill: 1000 rounds of the loop, and it is still 0 s"):
        run_virtually(main())
