"""Which responses are shown, and what of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from rlsys.report import samples as module
from rlsys.report.samples import read_samples, shorten
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.strategies.chain import Chain


def test_the_best_are_rare_successes_and_the_worst_rare_failures(
    make_run: Callable, rewrite: Callable, tmp_path: Path
) -> None:
    """Two prompts of four rollouts: one is solved once, the other three times."""
    run = make_run(tmp_path / "run", steps=1, driver={"prompts_per_step": 2}, rollout={"samples_per_prompt": 4})
    scores = {("sim/0", 2): 1.0, ("sim/1", 0): 1.0, ("sim/1", 1): 1.0, ("sim/1", 3): 1.0}
    rewrite(run, 1, score=lambda row: scores.get((row["prompt_id"], row["sample"]), 0.0))
    problems: list[str] = []
    found = read_samples(run, problems)
    assert problems == []
    best = [found.shown[place] for place in found.kinds["best"]]
    worst = [found.shown[place] for place in found.kinds["worst"]]
    assert len(best) == len(worst) == 8
    assert [(s.prompt_id, s.number) for s in best[:1]] == [("sim/0", 2)]
    assert [s.score for s in best] == [1, 1, 1, 1, 0, 0, 0, 0]
    assert [(s.prompt_id, s.number) for s in worst[:1]] == [("sim/1", 2)]
    assert best[0].group == [0, 0, 1, 0]
    assert best[0].place == 2
    assert best[0].components.keys() == {"parity"}
    assert best[0].versions.startswith("0[0:")
    assert best[0].fate == "trained"
    assert not found.kinds["failed"]
    assert not found.kinds["dropped"]


def test_failed_rewards_dropped_groups_and_responses_that_were_cut(make_run: Callable, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=3, rollout={"max_new_tokens": 8}, options={"timeout_rate": 0.4})
    found = read_samples(run, [])
    failed = [found.shown[place] for place in found.kinds["failed"]]
    assert failed
    assert {(s.status, s.score, s.detail) for s in failed} == {("timeout", None, "no answer")}
    assert any(None in s.group and set(s.group) != {None} for s in failed)
    dropped = [found.shown[place] for place in found.kinds["dropped"]]
    assert dropped, "groups without a single score are dropped"
    assert all(s.fate == "dropped: rewards failed: timeout" for s in dropped)
    cut = [found.shown[place] for place in found.kinds["cut"]]
    assert cut
    assert {s.finish for s in cut} == {"length"}
    assert [s.step for s in failed] == sorted(s.step for s in failed)


def test_of_a_long_run_files_with_failures_are_read_all_the_same(
    make_run: Callable, rewrite: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", steps=9, options={"timeout_rate": 0.1})
    whole = read_samples(run, [])
    steps = {whole.shown[place].step for place in whole.kinds["failed"] if whole.shown[place].fate == "trained"}
    monkeypatch.setattr(module, "MOST_FILES", 2)
    some = read_samples(run, [])
    assert some.read < some.files == whole.files
    assert {s.step for s in some.shown} == {1, 9} | steps
    assert steps - {1, 9}, "none failed in between: another rate is needed"


def test_segments_have_their_text_and_the_change_of_the_value(
    make_run: Callable, rewrite: Callable, tmp_path: Path
) -> None:
    strategy = Chain(continuations=2)
    strategy.bind(FixedLength(tokens=8), 40)
    run = make_run(tmp_path / "run", steps=1, rollout={"max_new_tokens": 40}, options={"strategy": strategy})
    found = read_samples(run, [])
    with_segments = [s for s in found.shown if s.pieces]
    assert with_segments
    assert all(piece.text.endswith(" tokens] ") for s in with_segments for piece in s.pieces), "no tokenizer was saved"

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(256)} | {"?": 256}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    folder = run / "checkpoints" / "step-000001" / "learner" / "hf"
    folder.mkdir(parents=True, exist_ok=True)
    words.save(str(folder / "tokenizer.json"))
    segment = {"spread": None, "first": True}
    rewrite(
        *(run, 1),
        token_ids=lambda row: [1, 2, 3, 4, 5],
        action_mask=lambda row: [True] * 5,
        segments=lambda row: [
            {"start": 0, "end": 2, "start_value": 0.25, "end_value": 0.75, **segment},
            {"start": 3, "end": 4, "start_value": 0.5, "end_value": None, **segment},
        ],
    )
    sample = read_samples(run, []).shown[0]
    assert "".join(piece.text for piece in sample.pieces) == "w1 w2 w3 w4 w5"
    assert [(piece.text.strip(), piece.change) for piece in sample.pieces] == [
        *(("w1 w2", 0.5), ("w3", None), ("w4", None), ("w5", None)),
    ]
    (folder / "tokenizer.json").write_text("{")
    problems: list[str] = []
    assert read_samples(run, problems).shown[0].pieces[0].text == "[2 tokens] "
    assert "tokenizer.json cannot be read" in problems[0]


def test_long_text_loses_its_middle() -> None:
    text = "a" * 3000 + "b" * 3000 + "c" * 3000
    short = shorten(text, 3000)
    assert short.startswith("a" * 1000 + "\n[... 6,000 characters left out ...]\n")
    assert short.endswith("c" * 2000)
    assert shorten("abc", 3) == "abc"
