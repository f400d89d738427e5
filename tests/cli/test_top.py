"""`rlsys top` in textual's own pilot."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import DataTable, Sparkline, Static

from rlsys.cli.top import Top
from rlsys.config.loading import dump_config
from rlsys.config.models import Sizes
from rlsys.driver.control import controlled
from rlsys.sim.drive import at, sim_config, simulate
from rlsys.trackers.jsonl import JsonlTracker


class Answering:
    """A driver that stands still."""

    def __init__(self, status: Mapping[str, Any]) -> None:
        self.found = dict(status)

    def status(self) -> Mapping[str, Any]:
        return self.found

    def scale(self, sizes: Sizes) -> list[str]:
        return []


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mapping[str, Any]]:
    """A run that lost a generator, and the status of its driver shortly before its end."""
    path = tmp_path_factory.mktemp("runs") / "run"
    path.mkdir()
    config = sim_config(steps=4, run={"steps": 4, "name": "small"})
    dump_config(config, path / "config.yaml")

    found: dict[str, Any] = {}

    def act(simulation: Any) -> None:
        def note() -> None:
            found.update(simulation.driver.status())
            at(0.5, note)

        simulation.driver.tracker = simulation.driver.recorder.tracker = JsonlTracker(path)
        at(2.0, simulation.generators[0].kill)
        note()

    simulate(config, path, act)
    return path, {**found, "started": True, "step": 3}


def text(app: Top, name: str) -> str:
    from io import StringIO

    from rich.console import Console

    console = Console(file=StringIO(), width=200)
    console.print(app.query_one(f"#{name}", Static).content)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


async def until(app: Any, pilot: Any, shown: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not shown():
            await pilot.pause(0.02)


async def test_it_shows_how_a_run_stands_and_follows_it(run: tuple[Path, Mapping[str, Any]]) -> None:
    path, status = run
    driver = Answering(status)
    app = Top(path, every_s=0.05)
    async with controlled(driver, path), app.run_test(size=(120, 40)) as pilot:
        await until(app, pilot, lambda: "running" in text(app, "state"))
        assert "small: running, step 3 of 4" in text(app, "state")
        facts = text(app, "facts")
        for expected in (", every generator has ", "slots open", "steps a minute", "the learner for rollouts"):
            assert expected in facts
        table = app.query_one("#workers", DataTable)
        cells = [str(cell) for cell in table.get_row_at(0)]
        assert cells[:2] == ["generator-0", "healthy"]
        assert cells[4] == "1", "it was restarted"
        assert table.row_count == len(status["workers"])
        assert "worker lost: worker generator-0" in text(app, "incidents")
        assert len(app.query_one("#reward", Sparkline).data or ()) == 4

        driver.found = {**status, "step": 4, "stopping": True}
        await until(app, pilot, lambda: "stopping, step 4 of 4" in text(app, "state"))
        assert table.row_count == len(status["workers"]), "they take the place of those before"
        await pilot.press("q")
    assert app.return_code == 0
    async with asyncio.timeout(20):
        await app.follow()  # one last look comes back when the screen is gone: it is no mistake


async def test_a_driver_that_is_gone_may_come_back(run: tuple[Path, Mapping[str, Any]]) -> None:
    path, status = run
    app = Top(path, every_s=0.05)
    async with app.run_test(size=(120, 40)) as pilot:
        await until(app, pilot, lambda: "nobody answers" in text(app, "state"))
        assert "step 4, nobody answers" in text(app, "state")
        assert "steps a minute" in text(app, "facts"), "what is on disk is shown"
        async with controlled(Answering(status), path):
            await until(app, pilot, lambda: "running" in text(app, "state"))
        await until(app, pilot, lambda: "nobody answers" in text(app, "state"))
        assert app.query_one("#workers", DataTable).row_count == len(status["workers"]), "the last ones stay"


async def test_a_run_that_has_only_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\nhalf of a li")
    app = Top(tmp_path, every_s=0.05)
    async with app.run_test() as pilot:
        await until(app, pilot, lambda: "nobody answers" in text(app, "state"))
        assert text(app, "incidents").strip() == "none"


def test_what_is_no_run_directory(rlsys: Callable, tmp_path: Path) -> None:
    done = rlsys("top", tmp_path)
    assert (done.code, "is no run directory: it has no config.yaml" in done.err) == (2, True)
