"""The page in a browser: nothing fails, nothing is fetched, nothing of a run is run, and a phone can show it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlsys.report.page import render
from rlsys.report.reading import read_runs
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.strategies.chain import Chain

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, which notes what it logs and what it fetches."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("there is no Chromium here: Debian's packages chromium and chromium-driver have it")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is a dependency for development")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    started.set_window_size(1280, 900)
    yield started
    started.quit()


@pytest.fixture(scope="module")
def report(make_run: Callable, hostile_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one config, a run with segments, and one that attacks its readers."""
    folder = tmp_path_factory.mktemp("report")
    strategy = Chain(continuations=2)
    strategy.bind(FixedLength(tokens=8), 40)
    runs = [
        *(make_run(folder / str(seed), seed=seed, steps=12) for seed in (0, 1)),
        make_run(folder / "segments", steps=2, rollout={"max_new_tokens": 40}, options={"strategy": strategy}),
        hostile_run,
    ]
    path = folder / "report.html"
    path.write_text(render(read_runs(runs)), encoding="utf-8")
    return path


@pytest.fixture
def page(browser: Any, report: Path) -> Any:
    """The report, just opened; what was logged before is forgotten."""
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(report.as_uri())
    return browser


def cards(page: Any) -> list[dict[str, str]]:
    """What is shown of the samples: score, id and run, text."""
    return list(
        page.execute_script(
            """return [...document.querySelectorAll(".sample")].map((card) => ({
                score: card.querySelector(".score").textContent,
                id: card.querySelector("header b").textContent,
                step: card.querySelector("header span:nth-of-type(2)").textContent,
                run: card.querySelector("header span:last-child").textContent,
                text: card.querySelector("dl").textContent,
            }));"""
        )
    )


def scroll_through(page: Any) -> None:
    """As a reader does, so that every figure is drawn."""
    page.execute_async_script(
        """const done = arguments[0], frame = () => new Promise(requestAnimationFrame);
        (async () => {
            for (let y = 0; y < document.body.scrollHeight; y += 400) {
                scrollTo({ top: y, behavior: "instant" });
                await frame();
                await frame();
            }
            done();
        })();"""
    )


def test_nothing_fails_and_nothing_is_fetched(page: Any, report: Path) -> None:
    scroll_through(page)
    drawn = "return document.querySelectorAll('.plot .main-svg').length"
    places = page.execute_script("return document.querySelectorAll('.plot').length")
    assert places > 10
    assert page.execute_script(drawn) >= places
    assert [entry["message"] for entry in page.get_log("browser")] == []
    fetched = [
        message["params"]["request"]["url"]
        for entry in page.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"] == "Network.requestWillBeSent"
    ]
    assert report.as_uri() in fetched
    assert [url for url in fetched if url != report.as_uri() and not url.startswith(("data:", "blob:"))] == []


def test_what_a_run_says_is_not_run(page: Any, hostile: str) -> None:
    for kind in ("typical", "failed", "dropped", "cut"):
        page.execute_script("document.querySelector(`[data-kind=${arguments[0]}]`).click()", kind)
        assert page.execute_script("return document.querySelectorAll('img').length") == 0
    page.execute_script(
        """const metric = document.getElementById("metric");
        metric.value = arguments[0];
        metric.dispatchEvent(new Event("change"));""",
        hostile,
    )
    scroll_through(page)
    assert page.title.startswith("rlsys report: ")
    page.execute_script("document.querySelector('[data-kind=cut]').click()")
    assert any(hostile in card["text"] for card in cards(page))


def test_the_policy_of_the_page_holds_by_itself(page: Any) -> None:
    """Were something not escaped, it still could not run."""
    page.execute_script(
        "document.getElementById('samples').innerHTML = `<img src=x onerror=\"document.title='owned'\">`"
    )
    scroll_through(page)
    assert page.title != "owned"
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_filters_of_responses(page: Any) -> None:
    def click(kind: str) -> list[dict[str, str]]:
        page.execute_script("document.querySelector(`[data-kind=${arguments[0]}]`).click()", kind)
        assert page.execute_script("return document.querySelector('[aria-pressed=true]').dataset.kind") == kind
        return cards(page)

    def enter(field: str, value: str) -> list[dict[str, str]]:
        page.execute_script(
            """const field = document.getElementById(arguments[0]);
            field.value = arguments[1];
            field.dispatchEvent(new Event("input"));""",
            *(field, value),
        )
        return cards(page)

    assert {card["score"] for card in click("best")} == {"score 1"}
    assert len(cards(page)) == 20
    page.execute_script("document.getElementById('more').click()")
    assert len(cards(page)) == 40
    assert {card["score"] for card in click("worst")} == {"score 0"}
    assert len(cards(page)) == 20, "another kind begins with its first ones"
    assert {card["score"] for card in click("failed")} == {"no score: timeout"}

    click("typical")
    assert {card["run"] for card in enter("run", "1")} == {"1"}
    steps = {int(card["step"].removeprefix("step ")) for card in enter("from", "7")}
    assert steps
    assert min(steps) >= 7
    assert {card["step"] for card in enter("to", "7")} == {"step 7"}
    assert enter("to", "6") == []
    assert page.execute_script("return document.getElementById('count').textContent") == "There is no such response."
    enter("from", "")
    enter("to", "")
    wanted = cards(page)[0]["id"].partition(" ")[0]
    found = enter("text", wanted.upper())
    assert found
    assert all(wanted in card["id"] for card in found)


def test_segments_are_coloured_by_what_they_changed(page: Any) -> None:
    page.execute_script(
        """document.querySelector("[data-kind=typical]").click();
        const run = document.getElementById("run");
        run.value = "2";
        run.dispatchEvent(new Event("input"));"""
    )
    pieces = page.execute_script(
        """return [...document.querySelectorAll(".sample .piece")].map(
            (piece) => [piece.style.background, (piece.nextElementSibling || {}).textContent || ""]);"""
    )
    coloured = [(background, float(change)) for background, change in pieces if background]
    assert {change > 0 for _, change in coloured} == {True, False}
    for background, change in coloured:
        red, green = map(int, background.partition("(")[2].split(",")[:2])
        assert (red > green) == (change < 0)


def test_a_phone_shows_it_without_scrolling_sideways(page: Any) -> None:
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    try:
        page.refresh()
        scroll_through(page)
        assert page.execute_script("return innerWidth") == 390
        assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        widths = page.execute_script(
            "return [...document.querySelectorAll('.plot .main-svg')].map((plot) => plot.getBoundingClientRect().right)"
        )
        assert widths
        assert max(widths) <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
