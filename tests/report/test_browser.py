"""The page in a browser: nothing fails, nothing is fetched, nothing of a run is run, and a phone can show it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlsys.report.page import render
from rlsys.report.reading import read_runs
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.strategies.chain import Chain

PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}

# Mean scores of held-out prompts at the steps 0, 10, 20 and 30.
HELD_OUT = {
    "steady": (0.5, 0.5, 0.5, 0.5),
    "learned": (0.0, 0.25, 1.0, 1.0),
    "forgotten": (0.75, 0.75, 0.75, 0.0),
    "there and back": (0.25, 0.75, 0.25, 0.25),
}


@pytest.fixture(scope="module")
def report(make_run: Callable, answered: Callable, hostile_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one config, a run with segments, and one that attacks its readers.

    The evaluations of the first seed are made by hand; the second and the third have none.
    """
    folder = tmp_path_factory.mktemp("report")
    strategy = Chain(continuations=2)
    strategy.bind(FixedLength(tokens=8), 40)
    runs = [
        *(make_run(folder / str(seed), seed=seed, steps=12) for seed in (0, 1)),
        make_run(folder / "segments", steps=2, rollout={"max_new_tokens": 40}, options={"strategy": strategy}),
        hostile_run,
    ]
    for run in runs[:3]:
        shutil.rmtree(run / "rollouts" / "evaluations")
    answered(runs[0], {10 * i: {name: [score[i]] for name, score in HELD_OUT.items()} for i in range(4)})
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
    for kind in ("typical", "failed", "dropped", "cut", "changed", "held_out"):
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
        for kind in ("best", "held_out"):
            page.execute_script("document.querySelector(`[data-kind=${arguments[0]}]`).click()", kind)
            choose(page, "which", "all")
            assert cards(page)
            assert page.execute_script("return document.documentElement.scrollWidth") <= 390
        widths = page.execute_script(
            "return [...document.querySelectorAll('.plot .main-svg')].map((plot) => plot.getBoundingClientRect().right)"
        )
        assert widths
        assert max(widths) <= 390
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def compared(page: Any) -> dict[str, dict[str, Any]]:
    """What is shown of held-out prompts, by their ids: the scores, and the text at each of the steps that are shown."""
    shown = page.execute_script(
        """return [...document.querySelectorAll(".compared")].map((card) => [
            card.querySelector("header b").textContent, {
            score: card.querySelector(".score").textContent,
            all: [...card.querySelectorAll(".group span")].map((chip) => chip.textContent),
            own: [...card.querySelectorAll(".group .own")].map((chip) => chip.textContent),
            texts: Object.fromEntries([...card.querySelectorAll(".evaluation")].map((one) => [
                one.querySelector("header b").textContent, one.querySelector(".text").textContent])),
        }]);"""
    )
    return dict(shown)


def choose(page: Any, field: str, value: str) -> dict[str, dict[str, Any]]:
    page.execute_script(
        """const field = document.getElementById(arguments[0]);
        field.value = arguments[1];
        field.dispatchEvent(new Event("input"));""",
        *(field, value),
    )
    return compared(page)


def test_what_changed_between_evaluations(page: Any) -> None:
    def click(kind: str) -> dict[str, dict[str, Any]]:
        page.execute_script("document.querySelector(`[data-kind=${arguments[0]}]`).click()", kind)
        return compared(page)

    click("changed")
    changed = choose(page, "run", "0")
    assert list(changed) == ["learned", "forgotten", "there and back"]
    assert changed["learned"]["score"] == "score 0 → 1"
    assert changed["learned"]["texts"] == {"step 0": "learned at 0, #0", "step 20": "learned at 20, #0"}
    assert changed["learned"]["all"] == ["step 0: 0", "step 10: 0.25", "step 20: 1", "step 30: 1"]
    assert changed["learned"]["own"] == ["step 0: 0", "step 20: 1"]
    assert changed["forgotten"]["score"] == "score 0.75 → 0"
    assert list(changed["forgotten"]["texts"]) == ["step 0", "step 30"]

    assert list(click("learned")) == ["learned", "there and back"]
    assert compared(page)["there and back"]["score"] == "score 0.25 → 0.75"
    assert list(click("forgotten")) == ["forgotten", "there and back"]
    assert compared(page)["there and back"]["score"] == "score 0.75 → 0.25"

    click("held_out")
    assert choose(page, "which", "ends")["there and back"]["score"] == "score 0.25 → 0.25"
    assert list(choose(page, "which", "all")["steady"]["texts"]) == ["step 0", "step 10", "step 20", "step 30"]
    assert list(choose(page, "order", "low")) == ["forgotten", "there and back", "steady", "learned"]
    assert list(choose(page, "order", "high")) == ["learned", "steady", "there and back", "forgotten"]
    assert list(choose(page, "order", "id")) == ["forgotten", "learned", "steady", "there and back"]
    assert list(choose(page, "text", "LEARNED AT 10")) == ["learned"]
    assert choose(page, "text", "nowhere") == {}
    assert page.execute_script("return document.getElementById('count').textContent") == "There is no such prompt."
    assert [entry["message"] for entry in page.get_log("browser")] == []


def test_only_what_is_of_use_can_be_set(page: Any) -> None:
    def fields(kind: str) -> set[str]:
        page.execute_script("document.querySelector(`[data-kind=${arguments[0]}]`).click()", kind)
        shown = (
            "return [...document.querySelectorAll('#responses select, #responses input')].filter((f) => f.offsetParent)"
        )
        return set(page.execute_script(f"{shown}.map((field) => field.id)"))

    assert fields("best") == {"run", "from", "to", "text"}
    assert fields("changed") == {"run", "which", "order", "text"}
