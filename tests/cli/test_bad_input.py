"""A user's mistake: exit code 2, one message that names the culprit, and nothing left behind."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

MINIMAL = """\
model: {tiny: {warm_start: {steps: 0}}, max_length: 64}
prompts: {train: {kind: sums, task: sums}}
rewards: {functions: [{name: right, kind: sums}]}
rollout: {max_new_tokens: 16}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


def assert_refused(rlsys: Callable, config: Path, overrides: list[str], *patterns: str) -> None:
    """By `train` and by `plan`, in the same words."""
    before = sorted(config.parent.rglob("*"))
    for command in ("train", "plan"):
        done = rlsys(command, config, *overrides)
        assert done.code == 2, done
        assert done.err.startswith("rlsys: ")
        assert "Traceback" not in done.err
        for pattern in patterns:
            assert re.search(pattern, done.err), (pattern, done.err)
        assert sorted(p for p in config.parent.rglob("*") if "__pycache__" not in p.parts) == before


@pytest.mark.parametrize(
    ("overrides", "patterns"),
    [
        (["--driver.max_stalenes=1"], [r"command line: driver\.max_stalenes", r"did you mean 'max_staleness'"]),
        (["--rollout.max_new_tokens=many"], [r"rollout\.max_new_tokens: must be an integer; got 'many'"]),
        (["--run.storage=runs"], [r"run\.storage: 'runs' must match"]),
        (["--run.storage=nope://x"], [r"run\.storage: nope://x: Protocol not known: nope"]),
        (["--model.tiny=null", "--model.path=nope://x"], [r"model\.path: nope://x: Protocol not known: nope"]),
        (
            ["--model.tiny=null", "--model.path=file:///no/model"],
            [r"model\.path: there is nothing at file:///no/model"],
        ),
        (["--rollout.temperature=-1"], [r"rollout\.temperature: must be greater than 0; got -1"]),
        (["--rollout.max_new_tokens=64"], [r"rollout\.max_new_tokens \(64\)", r"model\.max_length \(64\)"]),
        (["--driver.prompts_per_step=10", "--algorithm.minibatches=4"], [r"prompts_per_step \(10\)", r"\(4\)"]),
        (["--rollout.generators=1000"], [r"rollout\.generators \(1000\) is more than the \d+ cores", r"GiB"]),
        (["--algorithm.preset=grppo"], [r"algorithm\.preset: no 'grppo'", r"did you mean 'grpo'"]),
        (["--algorithm.loss.lwo=1"], [r"algorithm\.loss\.lwo", r"did you mean 'low'"]),
        (["--algorithm.critic={}"], [r"algorithm\.critic"]),
        (
            ["--algorithm.regularize=[]", "--reference.update=every"],
            [r"reference\.update: the algorithm 'grpo' compares with no reference"],
        ),
        (["--algorithm.preset=knapsack-rl"], [r"'success-budget' goes by what came of a prompt before", r"jsonl"]),
        (["--algorithm.preset=sec"], [r"sums problem 0: no 'category' in its metadata", r"it has 'terms'"]),
        (["--algorithm.curriculum.name=entropy-target"], [r"add the adjustment explored-successes"]),
        (
            ["--algorithm.preset=sec", "--algorithm.curriculum.key=terms", "--algorithm.curriculum.rate=2"],
            [r"algorithm\.curriculum\.rate: .*less than or equal to 1"],
        ),
        (["--reference.average_with=nowhere"], [r"there is no folder nowhere"]),
        (["--model.tiny=null", "--model.path=nowhere"], [r"model\.path: there is no folder nowhere"]),
        (
            ["--rewards.functions.0.kind=python", "--rewards.functions.0.path=nowhere.py:score"],
            [r"nowhere\.py"],
        ),
        (
            ["--rewards.functions.0.kind=python", "--rewards.functions.0.path=json:dumpz"],
            [r"dumpz"],
        ),
        (["--rewards.functions.0.tasks=[other]"], [r"rewards\.functions", r"task 'sums'"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_config_mistakes(rlsys: Callable, config: Path, overrides: list[str], patterns: list[str]) -> None:
    assert_refused(rlsys, config, overrides, *patterns)


GOOD = {"prompt": "1+1=", "answer": "2"}


@pytest.mark.parametrize(
    ("lines", "patterns"),
    [
        (None, [r"rows\.jsonl"]),
        ([], [r"rows\.jsonl"]),
        ([json.dumps(GOOD), '{"prompt": "1+'], [r"rows\.jsonl", r"line 2"]),
        ([json.dumps(GOOD), json.dumps({"promt": "1+1=", "answer": "2"})], [r"line 2", r"'prompt'", r"'promt'"]),
        ([json.dumps(GOOD), json.dumps(GOOD), json.dumps({"prompt": " ", "answer": "2"})], [r"line 3", r"empty"]),
        ([json.dumps({"prompt": "1+" * 40, "answer": "2"})], [r"line 1", r"80", r"48"]),
        ([json.dumps({"prompt": ["x"], "answer": "2"})], [r"line 1", r"message 1"]),
    ],
    ids=["missing file", "no rows", "not JSON", "missing key", "empty prompt", "too long", "not a message"],
)
def test_data_mistakes(
    rlsys: Callable, config: Path, tmp_path: Path, lines: list[str] | None, patterns: list[str]
) -> None:
    if lines is not None:
        (tmp_path / "rows.jsonl").write_text("".join(line + "\n" for line in lines))
    override = "--prompts.train={kind: jsonl, path: rows.jsonl, task: sums}"
    assert_refused(rlsys, config, [override], *patterns)


@pytest.mark.parametrize(
    ("files", "patterns"),
    [
        (["config.json", "tokenizer.json"], [r"has no weights"]),
        (["config.json", "model.safetensors"], [r"has no tokenizer"]),
        (["model.safetensors", "tokenizer.json"], [r"no config\.json"]),
    ],
)
def test_incomplete_model_folders(
    rlsys: Callable, config: Path, tmp_path: Path, tiny_model: Path, files: list[str], patterns: list[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in files:
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    assert_refused(rlsys, config, ["--model.tiny=null", f"--model.path={folder}"], *patterns)


def test_a_directory_of_another_config(rlsys: Callable, config: Path, tmp_path: Path) -> None:
    from rlsys.config.loading import dump_config, load_config

    (tmp_path / "runs" / "run").mkdir(parents=True)
    dump_config(load_config(config, ["--run.seed=1"]), tmp_path / "runs" / "run" / "config.yaml")
    (tmp_path / "runs" / "run" / "metrics.jsonl").touch()
    done = rlsys("train", config)
    assert done.code == 2
    assert "run.seed: 1 there, 0 now" in done.err
    assert load_config(tmp_path / "runs" / "run" / "config.yaml").run.seed == 1
    done = rlsys("train", config, "--run.seed=1", "--run.resume=never")
    assert (done.code, "run.resume is never" in done.err) == (2, True)


def test_a_directory_that_is_no_run(rlsys: Callable, config: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    done = rlsys("train", config, "--run.dir=mine")
    assert (done.code, "thesis.tex" in done.err) == (2, True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    done = rlsys("train", config, "--run.dir=c.yaml")
    assert (done.code, "c.yaml is a file" in done.err) == (2, True)


def test_the_package_of_a_storage_is_missing(rlsys: Callable, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    message = r"run\.storage: s3://bucket/run: Install s3fs to access S3: pip install 'rlsys\[s3\]', on every node"
    assert_refused(rlsys, config, ["--run.storage=s3://bucket/{name}"], message)
