"""Runs as jobs of a Ray cluster: `rlsys submit`, `logs`, and `status`, `scale` and `stop` with `--address`.

A job's description can be read by everybody who reaches the cluster, so that no key is ever in it: keys are those in
the environment of the cluster's nodes. Orders to a run go to where its driver is, as small jobs of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rlsys.config.loading import load_config
from rlsys.config.source import split_overrides
from rlsys.errors import ClusterError, ConfigError
from rlsys.secrets import is_secret

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

RUN, RUN_DIR = "rlsys_run", "rlsys_run_dir"  # in a job's metadata
STOP_TIMEOUT_S = 600.0  # for the step that is going on, and a checkpoint
_NOT_SENT = ["/runs", "/cache", ".venv", ".git", "__pycache__", "*.safetensors"]
_SET_BY_US = ("run.dir", "resources.ray_address")
AGENT_TIMEOUT_S = 60.0  # for the part of a node that takes jobs to be there
_POLL_S = 0.5
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # from where the driver's Ray would take the job's working directory


def submit(path: Path, overrides: Sequence[str], address: str | None, working_dir: Path, wait: bool) -> None:
    """Send a working directory with the config in it, and start the run there; show what it prints.

    Raises ConfigError for a config that is wrong or outside of the directory, ClusterError. It ends as the job does.
    """
    config = load_config(path, overrides)
    directory = working_dir.resolve()
    if not path.resolve().is_relative_to(directory):
        raise ConfigError(f"{path} is not in the directory that is sent, {directory}: choose another (--working-dir)")
    run_dir = Path(config.run.dir).absolute()
    given = [(key, value) for key, value in split_overrides(overrides) if key not in _SET_BY_US]
    settings = [*given, ("run.dir", str(run_dir)), ("resources.ray_address", "auto")]
    command = ["rlsys", "train", str(path.resolve().relative_to(directory)), "--supervise"]
    command += [part for key, value in settings for part in (f"--{key}", value)]
    client = _connect(address)
    job = f"{config.run.name}-{secrets.token_hex(3)}"
    _send(
        client,
        entrypoint=_from_a_copy(command, f"{run_dir}.code/{job}", job),
        submission_id=job,
        runtime_env={"working_dir": str(directory), "excludes": _NOT_SENT},
        metadata={RUN: config.run.name, RUN_DIR: str(run_dir)},
    )
    print(f"job {job}: run {config.run.name} in {run_dir}, on the cluster's machines")
    if here := sorted(filter(is_secret, os.environ)):
        print(f"keys are not sent ({', '.join(here)}): the job has those in the environment of the cluster's nodes")
    at = f"--address {client.get_address()}"
    print(f"rlsys logs {job} -f {at}   rlsys status {job} {at}   rlsys stop {job} {at}", flush=True)
    if wait:
        _follow(client, job)


def _send(client: JobSubmissionClient, **job: Any) -> str:
    """Submit a job; a cluster that has only just started is given time. Raises ClusterError."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    with _refused(client):
        while True:
            try:
                return str(client.submit_job(**job))
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL_S)


def _from_a_copy(command: Sequence[str], code: str, job: str) -> str:
    """Run a command in a copy of the job's working directory, beside the run directory, where all nodes find it.

    Ray's own copies are made and taken away node by node, as it sees fit; the actors' are not needed then.
    """
    made = f"mkdir -p {shlex.quote(code)} && cp -R . {shlex.quote(code)} && cd {shlex.quote(code)}"
    described = json.dumps({"metadata": {"job_submission_id": job, "job_name": job}})
    return f"{made} && {_JOB_CONFIG}={shlex.quote(described)} exec {shlex.join(command)}"


def logs(address: str | None, job: str, follow: bool) -> None:
    """Raises ClusterError."""
    client = _connect(address)
    found = _find(client, job)
    if follow:
        _follow(client, found)
    else:
        with _refused(client):
            print(client.get_job_logs(found), end="")


def order(address: str, job: str, command: str, options: Sequence[str]) -> None:
    """Run a command of `rlsys` on a run where its driver is. Raises ClusterError."""
    client = _connect(address)
    _order(client, _find(client, job), command, options)


def stop(address: str, job: str, now: bool) -> None:
    """Returns when the job has ended. Raises ClusterError."""
    client = _connect(address)
    found = _find(client, job)
    if now:
        with _refused(client):
            client.stop_job(found)
    else:
        _order(client, found, "stop", [])
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while not (status := client.get_job_status(found)).is_terminal():
        if time.monotonic() > deadline:
            raise ClusterError(f"job {found} has not ended after {STOP_TIMEOUT_S:g} s; --now ends its processes")
        time.sleep(_POLL_S)
    print(f"job {found}: {status.value.lower()}")


def _order(client: JobSubmissionClient, job: str, command: str, options: Sequence[str]) -> None:
    with _refused(client):
        metadata = client.get_job_info(job).metadata or {}
        if RUN_DIR not in metadata:
            raise ClusterError(f"job {job} is no run of rlsys: `rlsys submit` did not start it")
    asked = _send(client, entrypoint=shlex.join(["rlsys", command, metadata[RUN_DIR], *options]))
    _follow(client, asked)


def _find(client: JobSubmissionClient, job: str) -> str:
    """The id of a job by its id, or the newest one by the name of its run."""
    with _refused(client):
        jobs: list[JobDetails] = client.list_jobs()
    named = [found for found in jobs if found.submission_id == job or (found.metadata or {}).get(RUN) == job]
    if not named:
        there = sorted({name for found in jobs if (name := (found.metadata or {}).get(RUN))})
        raise ClusterError(f"there is no job {job} at {client.get_address()}; its runs: {', '.join(there) or 'none'}")
    return str(max(named, key=lambda found: found.start_time or 0).submission_id)


def _follow(client: JobSubmissionClient, job: str) -> None:
    """Print what a job prints until it ends, and end as it did."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()

    try:
        with _refused(client):
            asyncio.run(tail())
            info = client.get_job_info(job)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; rlsys stop {job} --address {client.get_address()} ends it")
        raise typer.Exit(130) from None
    if info.status.value != "SUCCEEDED":
        code = info.driver_exit_code
        if code is None or code < 0:
            print(f"job {job}: {info.status.value.lower()}: {info.message}", file=sys.stderr)
        raise typer.Exit(code if code is not None and code > 0 else 1)


def _connect(address: str | None) -> JobSubmissionClient:
    """Raises ClusterError when nobody answers there, or a Ray of another version."""
    import ray
    from ray.job_submission import JobSubmissionClient

    where = address or os.environ.get("RAY_ADDRESS") or "http://127.0.0.1:8265"
    try:
        client = JobSubmissionClient(where)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {where}: {str(error).splitlines()[0]}. Its dashboard's address is wanted "
            "(--address, or RAY_ADDRESS), such as http://head:8265"
        ) from error
    version = client._server_ray_version  # asked for with whatever token Ray has; there is no public way to it
    if version != ray.__version__:
        raise ClusterError(f"the cluster at {where} has Ray {version}, and this is Ray {ray.__version__}: use the same")
    return client


@contextmanager
def _refused(client: JobSubmissionClient) -> Iterator[None]:
    """What the cluster does not do is a ClusterError."""
    try:
        yield
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise ClusterError(f"the cluster at {client.get_address()} refuses: {str(error).strip()}") from error
