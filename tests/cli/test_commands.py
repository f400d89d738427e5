"""The commands that start nothing, and how failures look."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlsys.cli.supervise import FINAL
from rlsys.config.loading import load_config
from rlsys.errors import DataError, EngineError, PlacementError, RlsysError
from rlsys.metrics.catalog import DEFINITIONS
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.strategies.chain import Chain
from rlsys.sim.drive import Simulation, sim_config, simulate
from rlsys.trackers.jsonl import JsonlTracker

ROOT = Path(__file__).parents[2]
MINIMAL = """\
model: {tiny: {}, max_length: 64}
prompts: {train: {kind: sums}}
rewards: {functions: [{name: right, kind: sums}]}
rollout: {max_new_tokens: 16}
"""
ENGINES = ("torch", "vllm", "deepspeed", "ray", "wandb", "transformers")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL)
    return path


# ---- plan and algorithms ------------------------------------------------------------------------------------------


def test_plan_prints_the_resolved_config_and_its_arithmetic(rlsys: Callable, config: Path, tmp_path: Path) -> None:
    done = rlsys("plan", config, "--driver.prompts_per_step", "10", "--rollout.samples_per_prompt=4", "--run.steps=7")
    assert done.code == 0
    assert "prompts_per_step: 10" in done.out
    assert "name: ppo-clip" in done.out  # the preset, resolved
    assert "10 prompts x 4 samples = 40" in done.out
    assert "at most 20" in done.out  # groups in flight: 10 x (1 + 1)
    assert "7 steps, 7 updates, 280 rollouts" in done.out
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    "name",
    sorted(p.name for p in (ROOT / "configs").glob("*.yaml") if p.name != "sweep.yaml"),  # which is W&B's
)
def test_every_config_of_the_project_can_be_loaded(name: str) -> None:
    load_config(ROOT / "configs" / name)


def test_metrics_lists_them_and_explains_one(rlsys: Callable) -> None:
    done = rlsys("metrics")
    assert done.code == 0
    assert all(d.name in done.out for d in DEFINITIONS)
    one = rlsys("metrics", "restarts/generator")
    assert one.out.startswith("restarts/{role} (count)")
    assert "rlsys_restarts_generator" in one.out
    assert rlsys("metrics", "accuracy").out.startswith("eval/accuracy (score)")
    unknown = rlsys("metrics", "reward/meen")
    assert unknown.code == 2
    assert "did you mean 'reward/mean'" in unknown.err


def test_algorithms_lists_every_preset_and_explains_one(rlsys: Callable) -> None:
    done = rlsys("algorithms")
    assert done.code == 0
    presets = [p.stem for p in (ROOT / "rlsys" / "algorithms").glob("*.yaml")]
    assert presets
    for preset in presets:
        assert preset in done.out
    done = rlsys("algorithms", "ppo")
    assert done.code == 0
    for part in ("1707.06347", "--algorithm.preset ppo", "delta_t = r_t + gamma * V_{t+1} - V_t", "clip(rho"):
        assert part in done.out
    done = rlsys("algorithms", "pppo")
    assert done.code == 2
    assert "did you mean 'ppo'?" in done.err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "nowhere.yaml"], 2),
        (["plan", str(ROOT / "configs" / "quickstart.yaml"), "--driver.max_stalenes=1"], 2),
        (["plan", str(ROOT / "configs" / "quickstart.yaml"), "--rollout.max_new_tokens=64"], 2),
        (["inspect", "nowhere"], 2),
        (["replay", "--help"], 0),
        (["replay", "nowhere", "--step", "3"], 2),
        (["report", "nowhere"], 2),
        (["timeline", "nowhere"], 2),
        (["top", "nowhere"], 2),
    ],
)
def test_quick_answers_import_no_engine(arguments: list[str], code: int) -> None:
    program = (
        "import sys; from rlsys.cli.main import main\n"
        f"try: sys.argv = ['rlsys', *{arguments!r}]; main()\n"
        f"except SystemExit as end: print(end.code or 0, sorted(set({ENGINES!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == f"{code} []"


def test_plan_counts_the_branches(rlsys: Callable, config: Path) -> None:
    """16 prompts, each 4 samples of 4 tokens and from each of these 4 more of what is left of 16."""
    overrides = ["--algorithm.preset=spo-tree", "--algorithm.rollout.breadth=[4, 4]", "--rollout.max_new_tokens=16"]
    overrides += ["--algorithm.rollout.segment_tokens=4", "--driver.prompts_per_step=16"]
    done = rlsys("plan", config, *overrides, "--rollout.samples_per_prompt=8")
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert f"up to about {16 * (4 * 4 + 16 * 12):,} tokens" in text
    done = rlsys("plan", config)
    assert "branches" not in done.out


def test_plan_says_where_the_config_is_not_as_its_preset_was_published(rlsys: Callable, config: Path) -> None:
    arguments = ("plan", config, "--algorithm.preset=a-star-po")
    said = " ".join(rlsys(*arguments, "--driver.max_staleness=2").out.split())
    assert "a-star-po was published with driver.max_staleness 0; here it is 2." in said
    assert "driver.max_staleness 0;" not in " ".join(rlsys(*arguments, "--driver.max_staleness=0").out.split())


@pytest.mark.slow
def test_plan_imports_no_engine_that_runs_things(config: Path) -> None:
    program = (
        "import sys; from rlsys.cli.main import main\n"
        f"try: sys.argv = ['rlsys', 'plan', {str(config)!r}]; main()\n"
        "except SystemExit as end:\n"
        "    print(end.code or 0, sorted({'vllm', 'deepspeed', 'ray', 'wandb'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"


# ---- inspect ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps of 2 prompts with simulated roles and the real ledger and store."""
    path = tmp_path_factory.mktemp("run")
    config = sim_config(
        run={"steps": 3},
        rollout={"samples_per_prompt": 2},
        driver={"prompts_per_step": 2, "max_staleness": 1},
        eval={"prompts": 4},
    )

    async def main() -> None:
        simulation = Simulation(config, path)
        simulation.driver.tracker = simulation.driver.recorder.tracker = JsonlTracker(path)
        await simulation.run()

    asyncio.run(main())
    return path


def test_inspect_a_run(rlsys: Callable, run_dir: Path) -> None:
    done = rlsys("inspect", run_dir)
    assert done.code == 0
    assert "6 trained" in done.out
    assert "Steps (the last 10 of 3)" in done.out
    assert "staleness/mean" in done.out
    assert "Evaluations" in done.out


def test_inspect_a_prompt_tells_its_whole_story(rlsys: Callable, run_dir: Path) -> None:
    done = rlsys("inspect", run_dir, "sim/0")
    assert done.code == 0
    assert "sim/0: trained at step 1" in done.out
    story = [
        done.out.index(f"  {event}") for event in ("drawn", "assigned", "sampled", "scored", "buffered", "trained")
    ]
    assert story == sorted(story)
    assert "generator-0" in done.out
    assert "0[0:" in done.out  # sampled by version 0, from its first token on


def test_inspect_a_held_out_prompt_shows_its_responses(rlsys: Callable, run_dir: Path) -> None:
    done = rlsys("inspect", run_dir)
    assert f"Their responses: rlsys report {run_dir}" in done.out
    done = rlsys("inspect", run_dir, "eval/2")
    assert done.code == 0
    assert "eval/2: held out" in done.out
    rows = [line.split() for line in done.out.splitlines() if "xxx" in line]
    assert [(row[0], row[2], row[3].partition("[")[0]) for row in rows] == [("0", "ok", "0"), ("3", "ok", "3")]
    assert {row[1] for row in rows} <= {"0", "1"}


def test_inspect_shows_the_values_of_segments(rlsys: Callable, tmp_path: Path) -> None:
    strategy = Chain(continuations=2)
    strategy.bind(FixedLength(tokens=8), 40)
    config = sim_config(steps=1, batch=1, rollout={"max_new_tokens": 40})
    simulation, _ = simulate(config, tmp_path / "run", strategy=strategy)
    [prompt] = simulation.learner.batches[0].prompt_ids
    page = tmp_path / "page.html"
    done = rlsys("inspect", tmp_path / "run", prompt, "--html", page)
    assert done.code == 0
    assert "branched: branches" in done.out
    assert "[8 tokens] " in done.out, "no tokenizer was saved"
    assert "Segments: values at their ends" in page.read_text()
    assert "background-color: #" in page.read_text()


def test_inspect_says_what_is_not_there(rlsys: Callable, run_dir: Path, tmp_path: Path) -> None:
    done = rlsys("inspect", run_dir, "sim/999")
    assert (done.code, "sim/999" in done.err) == (2, True)
    done = rlsys("inspect", tmp_path)
    assert (done.code, "no run directory" in done.err) == (2, True)
    done = rlsys("inspect", tmp_path / "nothing")
    assert (done.code, "no such run directory" in done.err) == (2, True)


# ---- eval ---------------------------------------------------------------------------------------------------------


def test_eval_says_what_is_no_checkpoint(rlsys: Callable, config: Path, tmp_path: Path) -> None:
    done = rlsys("eval", config, "--checkpoint", tmp_path / "nothing")
    assert (done.code, "there is no folder" in done.err) == (2, True)
    (tmp_path / "run" / "checkpoints" / "step-000003").mkdir(parents=True)
    done = rlsys("eval", config, "--checkpoint", tmp_path / "run")
    assert (done.code, "checkpoints/step-000003" in done.err) == (2, True)
    done = rlsys("eval", config)
    assert (done.code, "prompts.eval is null" in done.err) == (2, True)


# ---- failures -----------------------------------------------------------------------------------------------------


def test_a_failure_that_is_nobodys_fault_exits_with_1(rlsys: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str | None, markdown: bool) -> None:
        raise EngineError("generator-1: out of memory")

    monkeypatch.setattr("rlsys.cli.algorithms.algorithms", fail)
    done = rlsys("algorithms")
    assert (done.code, done.err) == (1, "rlsys: EngineError: generator-1: out of memory\n")


@pytest.mark.parametrize("error", [PlacementError("the cluster has no room"), DataError("row 7")])
def test_what_the_user_can_mend_exits_with_2(
    rlsys: Callable, monkeypatch: pytest.MonkeyPatch, error: RlsysError
) -> None:
    """A supervisor does not start it again."""

    def fail(name: str | None, markdown: bool) -> None:
        raise error

    monkeypatch.setattr("rlsys.cli.algorithms.algorithms", fail)
    done = rlsys("algorithms")
    assert (done.code, done.err) == (2, f"rlsys: {error}\n")
    assert done.code in FINAL


def test_an_unforeseen_exception_is_not_dressed_up(rlsys: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str | None, markdown: bool) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("rlsys.cli.algorithms.algorithms", fail)
    with pytest.raises(KeyError, match="a bug"):
        rlsys("algorithms")


def test_config_comes_first(rlsys: Callable, config: Path) -> None:
    done = rlsys("plan", "--run.steps=3", config)
    assert (done.code, "CONFIG comes first" in done.err) == (2, True)


def test_summary_is_written_whole(tmp_path: Path) -> None:
    JsonlTracker(tmp_path).finish({"eval": {"after": {"accuracy": 0.5}}})
    assert json.loads((tmp_path / "summary.json").read_text())["eval"]["after"]["accuracy"] == 0.5
