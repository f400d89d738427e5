"""A run in a storage, over every real part: its machine is lost, and another one goes on to the same end."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlsys.driver.archive import states
from rlsys.ledger.story import read_run
from rlsys.storage import Storage

from .conftest import CONFIGS, SMALL, Rlsys, metrics, summary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = [
    str(CONFIGS / "quickstart_sync.yaml"),
    *SMALL,
    "--checkpoint.every",
    "2",
    "--driver.silence_timeout_s",
    "20",
]
SETTINGS += ["--eval.before", "false"]


@pytest.fixture
def base(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty place: on an S3 server, where there can be one."""
    if find_spec("s3fs") and find_spec("moto"):
        url: str = request.getfixturevalue("s3")
        return url
    return f"file://{tmp_path}/storage"


def test_another_machine_goes_on_to_the_same_bits(rlsys: Rlsys, workplace: Path, base: str) -> None:
    """The model is behind a URL, too."""
    cache = ("--model.tiny.cache_dir", "cache/stored")
    straight = rlsys("train", *SETTINGS, *cache, "--run.steps", "4", "--run.name", "undisturbed")
    assert straight.returncode == 0, straight.stdout
    [model] = [path for path in (workplace / "cache" / "stored").iterdir() if path.is_dir()]
    Storage(f"{base}/model").put_tree(model)

    run, url = workplace / "runs" / "stored", f"{base}/runs/stored"
    stored = [*SETTINGS, "--model.tiny", "null", "--model.path", f"{base}/model"]
    stored += ["--run.name", "stored", "--run.storage", f"{base}/runs/{{name}}"]
    for steps in ("2", "4"):
        done = rlsys("train", *stored, "--run.steps", steps)
        assert done.returncode == 0, done.stdout
        assert f"the run is in {url}" in done.stdout
        if steps == "2":
            assert "step-000002" in next(iter(next(states(Storage(url))).checkpoints.values()))
            assert list(run.rglob("*.safetensors")) == []
            shutil.rmtree(run)

    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]
    replayed = rlsys("replay", str(run), "--step", "3")
    assert replayed.returncode == 0, replayed.stdout
    assert "from the checkpoint of step 2" in replayed.stdout
    exported = rlsys("export", str(run), "stored-model")
    assert exported.returncode == 0, exported.stdout
    theirs = load_file(workplace / "runs" / "undisturbed/checkpoints/step-000004/learner/hf/model.safetensors")
    ours = load_file(workplace / "stored-model" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[key] == theirs[key]).all() for key in ours)
    fates = summary(run)["fates"]
    assert fates == summary(workplace / "runs" / "undisturbed")["fates"] == read_run(run).fates
    assert fates["trained"] == 4 * 8
    assert fates["pending"] == 0
