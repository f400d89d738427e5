"""`rlsys export`: a model out of a run, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlsys.cli.rundir import archive_of, open_run_dir
from rlsys.config.loading import load_config
from rlsys.driver.checkpoints import Checkpoints, Manifest
from rlsys.durable import fingerprints
from rlsys.storage import deliver


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    """A run directory with checkpoints of the steps 10, 20 and 30, of which 20 is the best."""
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep_last=3)
    for version, accuracy in ((10, 0.25), (20, 0.5), (30, 0.375)):
        folder = checkpoints.begin(version)
        shutil.copytree(tiny_model, folder / "hf")
        (checkpoints.directory / f".step-{version:06d}.tmp" / "learner" / "hf" / "step").write_text(str(version))
        checkpoints.commit(Manifest(version, 0, 0, [], 0, "", {}, {}), fingerprints(folder.parent))
        checkpoints.rate(version, accuracy)
    return tmp_path / "run"


def test_the_newest_is_an_ordinary_model(rlsys: Callable, run: Path, tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = rlsys("export", run, tmp_path / "out" / "model")
    assert (done.code, done.err) == (0, "")
    assert "the model of step 30" in done.out
    assert "held-out accuracy 37.5%" in done.out
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "model").iterdir()} == {
        "step": b"30",
        **{p.name: p.read_bytes() for p in tiny_model.iterdir()},
    }
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    original = dict(AutoModelForCausalLM.from_pretrained(tiny_model).named_parameters())
    assert all(parameter.equal(original[name]) for name, parameter in model.named_parameters())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert tokenizer.decode(tokenizer.encode("1+2=")) == "1+2="


@pytest.mark.parametrize(("options", "step"), [(["--step", 10], "10"), (["--best"], "20")])
def test_a_chosen_one(rlsys: Callable, run: Path, tmp_path: Path, options: list[object], step: str) -> None:
    (tmp_path / "empty").mkdir()
    assert rlsys("export", run, tmp_path / "empty", *options).code == 0
    assert (tmp_path / "empty" / "step").read_text() == step


def test_it_says_what_is_wrong(rlsys: Callable, run: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        done = rlsys("export", *arguments)
        assert (done.code, done.out) == (2, "")
        assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"
        return str(done.err)

    new = tmp_path / "new"
    assert "no such run directory" in refused(tmp_path / "nothing", new)
    assert "of step 10, 20, 30" in refused(run, new, "--step", 15)
    assert "give one of them" in refused(run, new, "--step", 10, "--best")
    assert "not an empty folder" in refused(run, run)

    weights = run / "checkpoints" / "step-000020" / "learner" / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "step 20 in" in refused(run, new, "--best")
    assert "learner/hf/model.safetensors has" in refused(run, new, "--step", 20)
    (run / "checkpoints" / "step-000010" / "manifest.json").unlink()
    assert "manifest.json cannot be read" in refused(run, new, "--step", 10)
    shutil.rmtree(run / "checkpoints" / "step-000030")
    assert "holds no valid checkpoint" in refused(run, new)
    (run / "checkpoints" / "ratings.json").unlink()
    assert "no checkpoint has been evaluated" in refused(run, new, "--best")
    shutil.rmtree(run / "checkpoints")
    assert "holds no checkpoint" in refused(run, new)


def test_out_of_a_storage(rlsys: Callable, tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: {tiny: {}}\nprompts: {train: {kind: sums}}\nrewards: {functions: [{name: right, kind: sums}]}\n"
        f"run: {{dir: {tmp_path}/run, storage: 'file://{tmp_path}/storage'}}\n"
    )
    with open_run_dir(load_config(config)) as path:
        checkpoints = Checkpoints(path / "checkpoints", shelf=archive_of(load_config(config), path))
        place = checkpoints.begin(7)
        files = deliver(place, lambda folder: shutil.copytree(tiny_model, folder / "hf"))
        checkpoints.commit(
            Manifest(7, 0, 0, [], 0, "", {}, {}), {f"learner/{name}": found for name, found in files.items()}
        )
    done = rlsys("export", path, tmp_path / "out")
    assert done.code == 0, done.err
    assert "the model of step 7" in done.out
    names = {p.name for p in tiny_model.iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        name: (tiny_model / name).read_bytes() for name in names
    }
    [weights] = (tmp_path / "storage" / "checkpoints").rglob("model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    done = rlsys("export", path, tmp_path / "other")
    assert done.code == 1
    assert "model.safetensors has changed" in done.err
    assert not (tmp_path / "other").exists()


def test_a_full_disk_leaves_nothing_of_it(rlsys: Callable, run: Path, small_disk: Callable) -> None:
    disk = small_disk(kib=64)
    done = rlsys("export", run, disk.path / "model")
    assert done.code == 2
    assert done.err.startswith(f"rlsys: {disk.path / 'model'} cannot be written: the disk is full")
    assert list(disk.path.iterdir()) == []
    disk.grow(kib=4096)
    assert rlsys("export", run, disk.path / "model").code == 0
