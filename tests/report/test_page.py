"""The page as text: whole in itself, and nothing of a run in it is code."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rlsys.report.page import render
from rlsys.report.reading import read_runs


@pytest.fixture(scope="module")
def page(hostile_run: Path) -> str:
    return render(read_runs([hostile_run]))


def scripts(page: str) -> list[str]:
    return re.findall(r"<script>(.*?)</script>", page, re.DOTALL)


def test_what_a_run_says_is_escaped_everywhere(page: str) -> None:
    plotly, own = scripts(page)
    rest = page.replace(plotly, "").replace(own, "")
    assert "<img" not in rest
    assert "onerror" in rest, "the text is there"
    assert rest.count("</script>") == 3


def test_the_data_is_as_it_was(page: str, hostile: str) -> None:
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    assert hostile in [sample["text"] for sample in data["responses"]["shown"]]
    [prompt] = data["held_out"]["shown"]
    assert {prompt["id"], prompt["prompt"], prompt["answer"]} == {hostile}
    assert {found["text"] for one in prompt["evaluations"] for found in one["responses"]} == {hostile}
    assert hostile in data["metrics"]
    for part in (data["responses"], data["held_out"]):
        places = [place for places in part["kinds"].values() for place in places]
        assert set(places) == set(range(len(part["shown"])))


def test_only_the_two_scripts_of_the_page_may_run(page: str) -> None:
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)
    assert policy.startswith("default-src 'none'; ")
    allowed = re.findall(r"'sha256-(.*?)'", policy.replace("&#39;", "'"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts(page)]
    assert len(hashes) == 2
    assert allowed == hashes
    assert "unsafe" not in re.findall(r"script-src (.*?);", policy)[0]


def test_it_is_whole_in_itself(page: str) -> None:
    rest = page
    for script in scripts(page):
        rest = rest.replace(script, "")
    assert re.findall(r'(?:src|href)="(?!#|data:)', rest) == []
    assert "@import" not in rest
    assert "url(" not in rest


def test_the_same_run_gives_the_same_page(make_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run", steps=2)
    monkeypatch.setattr("rlsys.report.page.time.strftime", lambda *_: "now")
    assert render(read_runs([run])) == render(read_runs([run]))


def test_runs_take_turns_among_the_responses(make_run: Callable, tmp_path: Path) -> None:
    page = render(read_runs([make_run(tmp_path / str(seed), seed=seed, steps=1) for seed in range(3)]))
    [text] = re.findall(r'id="data">(.*?)</script>', page, re.DOTALL)
    data = json.loads(text)
    for part, kind in (("responses", "best"), ("held_out", "held_out")):
        assert [data[part]["shown"][place]["run"] for place in data[part]["kinds"][kind][:6]] == [0, 1, 2, 0, 1, 2]
    assert "3 runs that differ in run.seed 0, 1, 2" in page
