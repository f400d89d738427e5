"""Virtual time."""

from __future__ import annotations

import asyncio

import pytest

from rlsys.sim.clock import run_virtually


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
