"""What launch/render.py makes: in step with what is committed, and what KubeRay, Ray and rlsys take."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from rlsys.actors.cluster import needs
from rlsys.config.loading import load_config
from rlsys.config.models import Config
from rlsys.placement.fit import fit
from rlsys.placement.nodes import read_nodes
from rlsys.secrets import is_secret

from .conftest import PROFILES, RENDERED, REPO, flags_of

SCHEMA = json.loads(Path(__file__).with_name("kuberay_schema.json").read_text())
both = pytest.mark.parametrize("profile", list(PROFILES))


def manifest(profile: str, name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((RENDERED / profile / name).read_text()))


def cluster_specs(profile: str) -> Iterator[dict[str, Any]]:
    yield manifest(profile, "raycluster.yaml")["spec"]
    yield manifest(profile, "rayjob.yaml")["spec"]["rayClusterSpec"]


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {"head": spec["headGroupSpec"], **{group["groupName"]: group for group in spec["workerGroupSpecs"]}}


def container_of(group: dict[str, Any]) -> dict[str, Any]:
    [container] = group["template"]["spec"]["containers"]
    return dict(container)


def refusals(content: dict[str, Any]) -> list[str]:
    """Where KubeRay's schema does not take it."""
    validator = jsonschema.Draft202012Validator({**SCHEMA["kinds"][content["kind"]], "$defs": SCHEMA["$defs"]})
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(content)]


# ---- in step ------------------------------------------------------------------------------------------------------


@both
def test_what_is_committed_is_what_the_script_makes(profile: str, tmp_path: Path) -> None:
    command = [sys.executable, "launch/render.py", str(PROFILES[profile]), "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (RENDERED / profile).iterdir()}
    assert made.keys() == committed.keys()
    for name in made:
        assert made[name] == committed[name], f"{name}: make render"


@both
def test_versions_are_those_that_are_locked(profile: str, render: ModuleType) -> None:
    values = render.read_values(PROFILES[profile])
    assert values.ray_version == ray.__version__
    assert f"\nray=={values.ray_version} " in (REPO / "requirements-cpu.txt").read_text()


# ---- values that are wrong ----------------------------------------------------------------------------------------


@pytest.fixture
def refused(render: ModuleType, tmp_path: Path) -> Callable[..., str]:
    """The message for the CPU values with one of them changed."""

    def message(*key: str, value: Any) -> str:
        content = yaml.safe_load(PROFILES["cpu"].read_text())
        place = content
        for part in key[:-1]:
            place = place[part]
        place[key[-1]] = value
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump(content))
        with pytest.raises(render.ValuesError) as caught:
            render.read_values(path)
        return str(caught.value).removeprefix(f"{path}: ")

    return message


def test_values_that_are_wrong_are_named(refused: Callable[..., str]) -> None:
    assert refused("groups", "learner", "cpus", value="many").startswith("groups.learner.cpus: ")
    assert refused("groups", "learner", "cpu", value=1).startswith("groups.learner.cpu: Extra inputs")
    assert refused("groups", "actor", value={}).startswith("groups.actor: ")
    assert refused("groups", "generator", "min_replicas", value=9) == (
        "groups.generator: min_replicas (9) is more than max_replicas (3)"
    )
    assert refused("groups", "rewarder", "keys", value=["JUDGE_API_KEY"]) == (
        "groups.rewarder.keys: JUDGE_API_KEY: not among secret.keys"
    )
    assert refused("image", value="rlsys").startswith("image: ")  # without a tag
    assert refused("namespace", value="a b; c").startswith("namespace: ")
    assert refused("run", "config", value="configs/none.yaml").startswith("run: ")
    assert "rollout.generaters" in refused("run", "set", value={"rollout.generaters": 3})


def test_a_missing_key_is_named(render: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("image: a:1\n")
    with pytest.raises(render.ValuesError, match=r"mine.yaml: groups: Field required"):
        render.read_values(path)


# ---- KubeRay ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
def test_kuberay_takes_the_manifests(profile: str, name: str) -> None:
    assert refusals(manifest(profile, name)) == []


def test_the_schema_refuses_what_kuberay_does_not_know() -> None:
    content = manifest("cpu", "raycluster.yaml")
    group = content["spec"]["workerGroupSpecs"][0]
    group["maxReplica"] = group.pop("maxReplicas")
    del group["groupName"]
    group["rayStartParams"]["num-cpus"] = 2
    container_of(group)["imagePullPolicies"] = container_of(group)
    [wrong] = {tuple(sorted(refusals(content)))}
    assert any("'maxReplica' was unexpected" in line for line in wrong)
    assert any("'groupName' is a required property" in line for line in wrong)
    assert any("2 is not of type 'string'" in line for line in wrong)


def test_the_schema_says_where_it_is_from() -> None:
    assert re.fullmatch(r"v\d+\.\d+\.\d+", SCHEMA["$comment"]["version"])
    assert "ray-project/kuberay" in SCHEMA["$comment"]["source"]
    assert Path(__file__).with_name("kuberay_schema.json").stat().st_size < 200_000


@both
def test_every_role_has_a_group_that_its_label_finds(profile: str) -> None:
    for spec in cluster_specs(profile):
        assert spec["enableInTreeAutoscaling"] is True
        found = groups(spec)
        assert set(found) == {"head", "learner", "generator", "rewarder", "reference"}
        for role, group in found.items():
            assert group["labels"] == {"role": role}
            assert "labels" not in group["rayStartParams"]  # KubeRay refuses the cluster for it
        for role in set(found) - {"head"}:
            assert 0 <= found[role]["minReplicas"] <= found[role]["replicas"] <= found[role]["maxReplicas"]
        assert found["head"]["rayStartParams"]["num-cpus"] == "0"


@both
def test_keys_are_those_that_a_role_may_see(profile: str) -> None:
    for spec in cluster_specs(profile):
        for role, group in groups(spec).items():
            variables = container_of(group)["env"]
            keys = {variable["name"] for variable in variables if "valueFrom" in variable}
            expected = {"head": {"WANDB_API_KEY", "HF_TOKEN"}, "rewarder": set()}.get(role, {"HF_TOKEN"})
            assert keys == expected
            for variable in variables:
                if is_secret(variable["name"]):
                    assert set(variable) == {"name", "valueFrom"}
                    assert variable["valueFrom"]["secretKeyRef"]["key"] == variable["name"]


@both
def test_pods_run_as_nobody_in_particular(profile: str) -> None:
    for spec in cluster_specs(profile):
        for group in groups(spec).values():
            assert group["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
            assert container_of(group)["securityContext"]["allowPrivilegeEscalation"] is False
            assert container_of(group)["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]


def job_config(profile: str) -> Config:
    """What the job's command makes of its config, where the image has it."""
    spec = manifest(profile, "rayjob.yaml")["spec"]
    program, command, path, *options = shlex.split(spec["entrypoint"])
    assert (program, command) == ("rlsys", "train")
    assert options.pop(0) == "--supervise"
    return load_config(REPO / Path(path).relative_to("/app"), options)


@both
def test_the_job_is_a_run_that_can_be_asked_about(profile: str) -> None:
    config = job_config(profile)
    assert config.resources.ray_address == "auto"
    assert config.resources.placement_timeout_s > 0
    assert config.run.dir == f"/shared/runs/{config.run.name}"
    metadata = manifest(profile, "rayjob.yaml")["spec"]["metadata"]
    assert metadata == {"rlsys_run": config.run.name, "rlsys_run_dir": config.run.dir}


@both
def test_the_job_fits_on_the_most_that_the_autoscaler_adds(profile: str) -> None:
    placement = fit(needs(job_config(profile)), read_nodes(RENDERED / profile / "nodes.yaml"))
    assert not placement.missing
    assert {"learner-0", "generator-0", "rewarder-0"} <= set(placement.places)
    for worker, index in placement.places.items():
        assert placement.nodes[index].labels["role"] == worker.rsplit("-", 1)[0]


# ---- `ray up`, and everything -------------------------------------------------------------------------------------


@both
def test_ray_takes_the_file_for_ray_up(profile: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    content = manifest(profile, "ray-up.yaml")
    prepared = prepare_config(content)  # as `ray up` does: with what Ray adds
    validate_config(prepared)
    assert prepared["max_workers"] == len(content["provider"]["worker_ips"])
    with pytest.raises(jsonschema.ValidationError):
        validate_config({**prepared, "worker_start_commands": []})


@both
def test_flags_of_ray_start_exist(profile: str, start_flags: set[str]) -> None:
    found = set()
    for spec in cluster_specs(profile):
        found |= {f"--{name}" for group in groups(spec).values() for name in group["rayStartParams"]}
    up = manifest(profile, "ray-up.yaml")
    for command in up["head_start_ray_commands"] + up["worker_start_ray_commands"]:
        found |= flags_of(command)
    assert found >= {"--num-cpus", "--head", "--address", "--autoscaling-config"}
    assert found <= start_flags


@both
def test_no_file_holds_a_key(profile: str, render: ModuleType) -> None:
    """Names of keys are in the places that name one, and no file has a value for any."""
    names = render.read_values(PROFILES[profile]).secret.keys
    assert names
    for path in [PROFILES[profile], *(RENDERED / profile).iterdir(), *(REPO / "docker").iterdir()]:
        text = path.read_text()
        assert re.findall(r"(?:hf_|sk-)[A-Za-z0-9]{16,}|\b[0-9a-f]{40}\b", text) == []
        for name in names:
            assert re.findall(rf"{name}['\"]?\s*[:=]\s*[^\s,}}\]]", text) == [], path
