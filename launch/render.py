"""Make the manifests and scripts of a cluster: `python launch/render.py VALUES --out DIR`.

Everything is built as plain values and written as YAML, so that no value can break out of its place. Keys are only ever
named: the pods that need one refer to the Kubernetes secret, and scripts have those of their environment.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from rlsys.cli.jobs import RUN, RUN_DIR
from rlsys.config.loading import load_config
from rlsys.config.models import Config
from rlsys.errors import ConfigError

HERE = Path(__file__).parent
APP = "/app"  # where the images have the configs
USER = 1000  # whom the images run as
DASHBOARD, GCS = 8265, 6379  # Ray's ports
IDLE_S = 300  # before the autoscaler gives a node back
NOTE = "# Made by launch/render.py: change the values and make it again (make render).\n"

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,40}[a-z0-9])?$")]
Key = Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")]
Version = Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
Absolute = Annotated[str, Field(pattern=r"^/[\w./-]*[\w-]$")]
Host = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Run(Strict):
    config: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)*$")  # from the top of this repository
    set: dict[str, str | int | float | bool] = {}
    placement_timeout_s: NonNegativeInt


class Shared(Strict):
    path: Absolute
    claim: Name


class Secret(Strict):
    name: Name
    keys: list[Key]


class Node(Strict):
    cpus: PositiveInt
    memory_gib: PositiveInt
    gpus: NonNegativeInt = 0
    keys: list[Key] = []


class Group(Node):
    min_replicas: NonNegativeInt
    max_replicas: PositiveInt

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is more than max_replicas ({self.max_replicas})")
        return self


class Groups(Strict):
    head: Node
    learner: Group
    generator: Group
    rewarder: Group
    reference: Group

    def workers(self) -> dict[str, Group]:
        return {role: getattr(self, role) for role in ("learner", "generator", "rewarder", "reference")}


class Machines(Strict):
    user: Name
    head: Host
    workers: list[Host]
    bin: Absolute


class Slurm(Strict):
    nodes: PositiveInt
    cpus: PositiveInt
    memory_gib: PositiveInt
    gpus: NonNegativeInt = 0
    time: str = Field(pattern=r"^(\d+-)?\d+:\d\d:\d\d$")
    bin: str = Field(pattern=r"^[\w./-]+$")  # from where sbatch is called
    wait_s: PositiveInt


class Values(Strict):
    image: str = Field(pattern=r"^[\w./:@-]+[:@][\w.:-]+$")  # with a tag or a digest
    ray_version: Version
    namespace: Name
    cluster: Name
    run: Run
    shared: Shared
    secret: Secret
    groups: Groups
    machines: Machines
    slurm: Slurm

    @model_validator(mode="after")
    def _known_keys(self) -> Self:
        for role, node in {"head": self.groups.head, **self.groups.workers()}.items():
            if unknown := sorted(set(node.keys) - set(self.secret.keys)):
                raise ValueError(f"groups.{role}.keys: {', '.join(unknown)}: not among secret.keys")
        return self


class ValuesError(Exception):
    """The values are wrong; the message names the file and the key."""


def read_values(path: Path) -> Values:
    """Raises ValuesError."""
    try:
        values = Values.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        run_config(values)
        return values
    except ConfigError as error:
        raise ValuesError(f"{path}: run: {error}") from None
    except ValidationError as error:
        wrong = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        raise ValuesError("\n".join(f"{path}: " + ": ".join(filter(None, line)) for line in wrong)) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValuesError(f"{path}: cannot be read as YAML: {error}") from None


# ---- what is run --------------------------------------------------------------------------------------------------


def settings(values: Values) -> list[str]:
    """Options of `rlsys train`: on the cluster that is there, with its files on shared storage."""
    given = {
        "resources.ray_address": "auto",
        "resources.placement_timeout_s": values.run.placement_timeout_s,
        "run.dir": f"{values.shared.path}/runs/{{name}}",
        **values.run.set,
    }
    return [word for key, value in given.items() for word in (f"--{key}", _yaml_word(value))]


def _yaml_word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def run_config(values: Values) -> Config:
    """Raises ConfigError."""
    return load_config(HERE.parent / values.run.config, settings(values))


# ---- KubeRay ------------------------------------------------------------------------------------------------------


def ray_cluster(values: Values) -> dict[str, Any]:
    """A cluster that stays, for `rlsys submit`."""
    return {**_resource("RayCluster", values), "spec": _cluster_spec(values)}


def ray_job(values: Values) -> dict[str, Any]:
    """A cluster that is there for one run: started, used and given back."""
    command = ["rlsys", "train", f"{APP}/{values.run.config}", "--supervise", *settings(values)]
    for role in values.groups.workers():
        command += [f"--resources.roles.{role}.labels.role", role]
    run = run_config(values).run
    return {
        **_resource("RayJob", values),
        "spec": {
            "entrypoint": shlex.join(command),
            "metadata": {RUN: run.name, RUN_DIR: run.dir},  # as `rlsys submit` does: `rlsys status` and others find it
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": IDLE_S,  # its pods' logs can be read as long
            "backoffLimit": 0,  # a driver that dies goes on by itself (--supervise); the rest is for the user to mend
            "rayClusterSpec": _cluster_spec(values),
        },
    }


def _resource(kind: str, values: Values) -> dict[str, Any]:
    metadata = {"name": values.cluster, "namespace": values.namespace, "labels": {"app.kubernetes.io/name": "rlsys"}}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata}


def _cluster_spec(values: Values) -> dict[str, Any]:
    return {
        "rayVersion": values.ray_version,
        # With a token KubeRay gives it to every pod as RAY_AUTH_TOKEN, which rlsys keeps from its workers as a key.
        "authOptions": {"mode": "disabled"},
        "enableInTreeAutoscaling": True,
        # The first version of the autoscaler knows nothing of labels.
        "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": IDLE_S},
        "headGroupSpec": {
            # No CPUs: workers keep off the node that cannot be lost.
            "rayStartParams": {"num-cpus": "0", "disable-usage-stats": "true"},
            "labels": {"role": "head"},
            "template": _pod(values, "head", values.groups.head),
        },
        "workerGroupSpecs": [
            {
                "groupName": role,
                "replicas": group.min_replicas,
                "minReplicas": group.min_replicas,
                "maxReplicas": group.max_replicas,
                "rayStartParams": {"disable-usage-stats": "true"},
                # KubeRay hands these to `ray start --labels`, and the autoscaler reads them here; it refuses `labels`
                # among rayStartParams.
                "labels": {"role": role},
                "template": _pod(values, role, group),
            }
            for role, group in values.groups.workers().items()
        ],
    }


def _pod(values: Values, role: str, node: Node) -> dict[str, Any]:
    resources = {"cpu": str(node.cpus), "memory": f"{node.memory_gib}Gi"}
    if node.gpus:
        resources["nvidia.com/gpu"] = str(node.gpus)
    container: dict[str, Any] = {
        "name": f"ray-{role}",
        "image": values.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [
            {"name": "RAY_AUTH_MODE", "value": "disabled"},  # said to Ray as well, whose default changes with 2.61
            {"name": "HF_HOME", "value": f"{values.shared.path}/cache/huggingface"},  # a model is downloaded once
            *(_key(values, name) for name in node.keys),
        ],
        "resources": {"requests": resources, "limits": resources},
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
        "volumeMounts": [{"name": "shared", "mountPath": values.shared.path}],
    }
    spec: dict[str, Any] = {
        "containers": [container],
        "securityContext": {
            **{"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER},
            **{"fsGroup": USER, "fsGroupChangePolicy": "OnRootMismatch"},  # shared storage may hold many files
        },
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": values.shared.claim}}],
    }
    if role == "head":
        ports = {"gcs": GCS, "dashboard": DASHBOARD, "client": 10001}
        container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
    else:
        spec["automountServiceAccountToken"] = False  # the head's autoscaler needs one, user code does not
    if node.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"metadata": {"labels": {"app.kubernetes.io/name": "rlsys", "rlsys/role": role}}, "spec": spec}


def _key(values: Values, name: str) -> dict[str, Any]:
    """A variable from the secret. A run does without a key that is not there."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": values.secret.name, "key": name, "optional": True}}}


# ---- the others ---------------------------------------------------------------------------------------------------


def described_nodes(values: Values) -> dict[str, Any]:
    """For `rlsys plan --cluster FILE`: the most that the autoscaler can add."""
    return {
        "nodes": [
            {
                "name": role,
                "count": group.max_replicas,
                "cpus": group.cpus,
                "gpus": group.gpus,
                "memory_gib": group.memory_gib,
                "labels": {"role": role},
            }
            for role, group in values.groups.workers().items()
        ]
    }


def ray_up(values: Values) -> dict[str, Any]:
    """Machines that are there, reached by ssh. They are alike, so that none has a label."""
    machines = values.machines
    # Without the mode, a head that finds a token in its home wants it of workers, which do not look for one.
    start = f"PATH={machines.bin}:$PATH RAY_AUTH_MODE=disabled ray start --disable-usage-stats"
    return {
        "cluster_name": values.cluster,
        "provider": {"type": "local", "head_ip": machines.head, "worker_ips": list(machines.workers)},
        "auth": {"ssh_user": machines.user},
        # `ray up` starts anew whatever ran before. The dashboard takes jobs from everybody who reaches it, so that it
        # stays on the head's own interface: `ray dashboard` makes a tunnel.
        "head_start_ray_commands": [
            f"PATH={machines.bin}:$PATH ray stop",
            f"{start} --head --port={GCS} --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [
            f"PATH={machines.bin}:$PATH ray stop",
            f"{start} --address=$RAY_HEAD_IP:{GCS}",
        ],
    }


def slurm_script(values: Values) -> str:
    """`sbatch` options and the values as shell words, then slurm_body.sh as it is."""
    slurm = values.slurm
    options = {
        "job-name": values.cluster,
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": slurm.cpus,
        "mem": f"{slurm.memory_gib}G",
        **({"gpus-per-node": slurm.gpus} if slurm.gpus else {}),
        "time": slurm.time,
        "signal": "B:TERM@300",  # in time for a checkpoint
        "output": "%x-%j.log",
    }
    variables = {"bin": slurm.bin, "cpus": slurm.cpus, "gpus": slurm.gpus, "wait_s": slurm.wait_s}
    command = ["rlsys", "train", values.run.config, "--supervise", *settings(values)]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            NOTE.strip(),
            *(f"#SBATCH --{name}={value}" for name, value in options.items()),
            "#SBATCH --exclusive",
            "",
            *(f"{name}={shlex.quote(str(value))}" for name, value in variables.items()),
            f"command=({shlex.join(command)})",
            "",
            (HERE / "slurm_body.sh").read_text(encoding="utf-8"),
        ]
    )


def render(values: Values) -> dict[str, str]:
    """Every file by its name."""
    manifests = {
        "raycluster.yaml": ray_cluster(values),
        "rayjob.yaml": ray_job(values),
        "ray-up.yaml": ray_up(values),
        "nodes.yaml": described_nodes(values),
    }
    files = {name: NOTE + _dump(content) for name, content in manifests.items()}
    return {**files, "slurm.sh": slurm_script(values)}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # written out, for people to read
        return True


def _dump(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the manifests and scripts of a cluster.")
    parser.add_argument("values", type=Path, metavar="VALUES", help="such as launch/values.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="such as launch/rendered/gpu")
    arguments = parser.parse_args()
    try:
        files = render(read_values(arguments.values))
    except ValuesError as error:
        sys.exit(str(error))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (arguments.out / name).write_text(text, encoding="utf-8")
    print(f"{arguments.out}: {', '.join(files)}")


if __name__ == "__main__":
    main()
