"""Shell scripts: read, parsed and, where it is installed, looked at by shellcheck."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlsys.config.loading import load_config

from .conftest import PROFILES, RENDERED, REPO, flags_of

SCRIPTS = sorted(
    [*(REPO / "launch").glob("*.sh"), *RENDERED.glob("*/*.sh")], key=lambda path: str(path.relative_to(REPO))
)
every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
both = pytest.mark.parametrize("profile", list(PROFILES))


@every_script
def test_bash_parses_it(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@every_script
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: scripts are only parsed")
    # Parts that are sourced or put together have no first line, and use variables of the others.
    options = ["--shell=bash", "--exclude=SC1091,SC2034,SC2154"]
    done = subprocess.run([shellcheck, *options, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@both
def test_the_slurm_script_has_what_sbatch_reads_before_any_command(profile: str) -> None:
    lines = (RENDERED / profile / "slurm.sh").read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines if line.startswith("#SBATCH")]
    assert options == [line for line in lines[:first] if line.startswith("#SBATCH")]
    assert any(line.startswith("#SBATCH --nodes=") for line in options)
    assert ("#SBATCH --gpus-per-node" in "\n".join(options)) == (profile == "gpu")


@both
def test_the_slurm_script_starts_ray_and_rlsys_as_they_are(profile: str, start_flags: set[str]) -> None:
    text = (RENDERED / profile / "slurm.sh").read_text()
    starts = re.findall(r"\bray start .*", text)
    assert len(starts) == 2
    [resources] = re.findall(r"^resources=\((.*)\)$", text, re.MULTILINE)
    found = flags_of(" ".join(starts)) | flags_of(f" {resources}")
    assert found >= {"--head", "--address", "--block", "--num-gpus"}
    assert found <= start_flags
    [command] = re.findall(r"^command=\((.*)\)$", text, re.MULTILINE)
    program, train, path, supervise, *options = shlex.split(command)
    assert (program, train, supervise) == ("rlsys", "train", "--supervise")
    config = load_config(REPO / path, options)
    assert config.resources.ray_address == "auto"
    assert config.run.dir.startswith("/shared/runs/")


@both
def test_the_slurm_script_ends_nothing_but_its_own(profile: str) -> None:
    text = (RENDERED / profile / "slurm.sh").read_text()
    assert re.findall(r"\bray stop\b|\bpkill\b|\bkillall\b|kill +(?:-\w+ +)?-1\b", text) == []
    assert re.findall(r"\b(?:WANDB_API_KEY|HF_TOKEN)\b", re.sub(r"^#.*", "", text, flags=re.MULTILINE)) == []
