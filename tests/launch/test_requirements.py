"""The lock files: what they say, and that they fit pyproject.toml and each other. Nothing is installed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPO = Path(__file__).parents[2]
PROFILES = ["cpu", "gpu"]


def text(profile: str) -> str:
    return (REPO / f"requirements-{profile}.txt").read_text()


def locked(profile: str) -> dict[str, Version]:
    """Version of every package, by its name."""
    found = re.findall(r"^([\w.-]+)(?:\[[\w,.-]+\])?==(\S+)", text(profile), re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in found}


@pytest.mark.parametrize("profile", PROFILES)
def test_names_versions_and_hashes_and_nothing_else(profile: str) -> None:
    packages = text(profile).replace("\\\n", "").splitlines()
    assert len(packages) > 100
    shape = re.compile(r"[\w.-]+(\[[\w,.-]+\])?==[\w.+!-]+( ; [^:]+)?(\s+--hash=sha256:[0-9a-f]{64})+")
    assert [line[:80] for line in packages if not shape.fullmatch(line.strip())] == []


@pytest.mark.parametrize("profile", PROFILES)
def test_it_has_what_pyproject_asks_for(profile: str) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [Requirement(line) for line in [*project["dependencies"], *extras[profile], *extras["dev"]]]
    versions = locked(profile)
    assert [str(asked) for asked in wanted if canonicalize_name(asked.name) not in versions] == []
    wrong = [asked for asked in wanted if not asked.specifier.contains(versions[canonicalize_name(asked.name)])]
    assert [str(asked) for asked in wrong] == []


def test_what_we_name_has_one_version_on_cpus_and_gpus() -> None:
    """So that what is tested on CPUs is what runs on GPUs."""
    names = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    cpu, gpu = locked("cpu"), locked("gpu")
    direct = [canonicalize_name(Requirement(line).name) for line in names]
    assert {name: cpu[name].public for name in direct} == {name: gpu[name].public for name in direct}


def test_on_gpus_nothing_is_a_cpu_build_and_cuda_has_one_version() -> None:
    versions = locked("gpu")
    assert [name for name, version in versions.items() if version.local or name.endswith("-cpu")] == []
    assert {"vllm", "nvidia-cublas", "nvidia-nccl-cu13"} <= versions.keys()
    # Two packages that bring the same Python modules when their versions are not the same.
    assert versions["cuda-python"].release[:2] == versions["cuda-bindings"].release[:2]
