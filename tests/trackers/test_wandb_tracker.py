"""The W&B run, offline, read back with W&B's own reader (`wandb leet inspect`)."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.util import get_core_path

from rlsys.roles import SampleRow
from rlsys.trackers import TrackerError
from rlsys.trackers.wandb import WandbTracker, _run_id, resolve_mode

SECRET = "0123456789abcdef" * 2 + "fedcba98"  # the form of a W&B key: 40 hexadecimal digits
CONFIG = {"run": {"name": "n", "seed": 3}, "rollout": {"stop": ["\n"]}}


def sample(step: int, response: str) -> SampleRow:
    more = {"components": {"right": 1.0, "brief": -0.25}, "advantage": 0.5, "fate": "trained"}
    return SampleRow(step, f"sums/{step}@0", "1+1=", response, "2", 1.0, f"{step - 1}", "stop", **more)  # type: ignore[arg-type]


def records(file: Path) -> list[dict[str, Any]]:
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", str(file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()]


def history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An offline run of two steps, which fails, with a key in the environment, then resumed for a third."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.delenv("WANDB_DATA_DIR", raising=False)
        patch.delenv("WANDB_MODE", raising=False)
        for steps in ((1, 2), (3,)):
            names = {"name": "n", "project": "p", "group": "g", "job_type": "seed", "tags": ("t",)}
            last = steps == (3,)
            tracker = WandbTracker(
                *(directory,),
                mode="offline",
                config=CONFIG,
                deadline_s=30,
                log_model=last,
                **names,  # type: ignore[arg-type]
            )
            if not last:
                tracker.log_eval(0, {"accuracy": 0.125}, [0.0] * 7 + [1.0])
                tracker.incident("the entropy has collapsed", "0.01 nats")
            for step in steps:
                tracker.log_step(step, {"reward/mean": step / 8, "staleness/max": 1.0})
                tracker.log_samples(step, [sample(step, f"answer {step}")])
            for step in (2, 3):
                model = directory / "checkpoints" / f"step-{step:06d}" / "learner" / "hf"
                model.mkdir(parents=True, exist_ok=True)
                (model / "config.json").write_text(json.dumps({"step": step}))
            tracker.finish({"steps": steps[-1], "failure": None if last else "WorkerDied: reference died"})
        wandb.teardown()  # its service closes the file a little later than a run is finished
        yield directory
        patch.delenv("WANDB_DATA_DIR")


@pytest.fixture(scope="module")
def segments(run_directory: Path) -> list[list[dict[str, Any]]]:
    files = sorted(run_directory.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    return sorted(map(records, files), key=lambda segment: history(segment)[0]["step"])


def test_metrics(segments: list[list[dict[str, Any]]]) -> None:
    rows = [row for segment in segments for row in history(segment)]
    rewards = [(row["step"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    assert rewards == [(1, 0.125), (2, 0.25), (3, 0.375)]
    assert [(row["step"], row["eval/accuracy"]) for row in rows if "eval/accuracy" in row] == [(0, 0.125)]
    [scores] = [row for row in rows if row.get("eval/scores._type") == "histogram"]
    assert sum(scores["eval/scores.values"]) == 8
    assert scores["step"] == 0
    assert all("step" in row for row in rows), "the one axis, of tables and histograms, too"
    metrics = [record["metric"] for record in segments[0] if record["type"] == "metric"]
    assert {"glob_name": "*", "step_metric": "step"}.items() <= metrics[1].items()


def test_config_name_and_exit(segments: list[list[dict[str, Any]]]) -> None:
    for segment in segments:
        run = next(record["run"] for record in segment if record["type"] == "run")
        assert CONFIG.items() <= run["config"]["update"].items()
        assert (run["display_name"], run["project"], run["tags"]) == ("n", "p", ["t"])
        assert (run["run_group"], run["job_type"]) == ("g", "seed")
    exits = [[record["exit"]["exit_code"] for record in segment if record["type"] == "exit"] for segment in segments]
    assert exits == [[1], [0]], "the first one failed"


def test_a_resumed_run_is_the_same_run(run_directory: Path, segments: list[list[dict[str, Any]]]) -> None:
    ids = {record["run"]["run_id"] for segment in segments for record in segment if record["type"] == "run"}
    assert ids == {(run_directory / "wandb" / "run-id").read_text().strip()}


def test_sample_tables_are_incremental(run_directory: Path, segments: list[list[dict[str, Any]]]) -> None:
    tables = [row for row in history(segments[0]) if row.get("samples._type") == "incremental-table-file"]
    assert [row["step"] for row in tables] == [1, 2]
    contents = []
    for row in tables:
        [path] = run_directory.glob(f"wandb/offline-run-*/files/{row['samples.path']}")
        contents.append(json.loads(path.read_text()))
    # each increment holds the new rows only
    assert [[cells[3] for cells in table["data"]] for table in contents] == [["answer 1"], ["answer 2"]]
    rows = [dict(zip(table["columns"], cells, strict=True)) for table in contents for cells in table["data"]]
    expected = {
        "components": "right 1, brief -0.25",
        "advantage": 0.5,
        "fate": "trained",
        "versions": "0",
        "score": 1.0,
    }
    assert expected.items() <= rows[0].items()


def test_the_key_is_nowhere(run_directory: Path) -> None:
    files = [path for path in run_directory.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_nothing_is_staged_outside_the_run(run_directory: Path) -> None:
    assert list(run_directory.glob("wandb/data/artifacts/staging/*"))


def test_alerts(segments: list[list[dict[str, Any]]]) -> None:
    alerts = [record["alert"] for record in segments[0] if record["type"] == "alert"]
    assert [(alert["title"], alert["text"], alert["level"]) for alert in alerts] == [
        ("the entropy has collapsed", "0.01 nats", "WARN")
    ]


def test_the_final_model_is_kept_where_it_is_asked_for(
    run_directory: Path, segments: list[list[dict[str, Any]]]
) -> None:
    kept = [[r["artifact"] for r in segment if r["type"] == "artifact"] for segment in segments]
    models = [[artifact for artifact in artifacts if artifact["type"] == "model"] for artifacts in kept]
    assert models[0] == []
    [model] = models[1]
    assert model["name"] == f"model-{(run_directory / 'wandb' / 'run-id').read_text().strip()}"
    assert json.loads(model["metadata"]) == {"step": 3}
    assert [entry["path"] for entry in model["manifest"]["contents"]] == ["config.json"]


def test_the_agent_of_a_sweep_gives_the_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-sweep")
    assert _run_id(tmp_path / "run-id") == "of-the-sweep"
    monkeypatch.setenv("WANDB_RUN_ID", "of-another")
    assert _run_id(tmp_path / "run-id") == "of-the-sweep", "a run that is resumed stays what it is"


def test_modes() -> None:
    assert resolve_mode("auto", {}) == "offline"
    assert resolve_mode("auto", {"WANDB_API_KEY": SECRET}) == "online"
    assert resolve_mode("auto", {"WANDB_API_KEY": SECRET, "WANDB_MODE": "offline"}) == "offline"
    assert resolve_mode("online", {"WANDB_MODE": "offline"}) == "online"
    with pytest.raises(TrackerError, match="WANDB_MODE is 'on'"):
        resolve_mode("auto", {"WANDB_MODE": "on"})


@pytest.mark.slow
def test_online_without_a_server_falls_back_to_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    wandb.teardown()  # so that its service reads the address anew
    tracker = WandbTracker(tmp_path, name="n", project="p", mode="online", config={}, deadline_s=2)
    assert tracker.warning is not None
    assert "offline" in tracker.warning
    tracker.log_step(1, {"a": 1.0})
    tracker.finish({})
    wandb.teardown()
    assert "127.0.0.1:9" in tracker.warning
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["a"] for row in history(records(file))] == [1.0]


class Refusing(BaseHTTPRequestHandler):
    """Answers every request as W&B answers a key that is wrong or has expired."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"errors": [{"message": "user is not logged in"}]}).encode()
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("key", [SECRET, "not-a-key"], ids=["refused", "of no form"])
def test_a_wrong_key_keeps_the_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    wandb.teardown()
    try:
        tracker = WandbTracker(tmp_path, name="n", project="p", mode="online", config={}, deadline_s=10)
        assert tracker.warning is not None
        assert "kept offline" in tracker.warning
        assert "key is wrong" in tracker.warning
        assert key not in tracker.warning
        tracker.log_step(1, {"a": 1.0})
        tracker.finish({})
    finally:
        server.shutdown()
        wandb.teardown()
    [file] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert [row["a"] for row in history(records(file))] == [1.0]


class Accepting(BaseHTTPRequestHandler):
    """Takes a run as W&B does, until it is `gone`: then it answers nobody any more."""

    protocol_version = "HTTP/1.1"
    gone: threading.Event
    files: list[str]  # of which lines have been taken

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if self.gone.is_set():
            self.close_connection = True
            return
        data: dict[str, Any] = {}
        if "upsertBucket" in asked.get("query", ""):
            project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
            bucket = {"id": "1", "name": asked["variables"]["name"], "displayName": "n", "project": project}
            data = {"upsertBucket": {"bucket": {**bucket, "config": "{}"}, "inserted": True}}
        elif self.path.endswith("file_stream"):
            self.files += asked.get("files", {})
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.slow
def test_a_server_that_goes_away_in_mid_run_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is logged goes to disk as before, and the end says how to send it later."""
    handler = type("Handler", (Accepting,), {"gone": threading.Event(), "files": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    wandb.teardown()
    try:
        tracker = WandbTracker(tmp_path, name="n", project="p", mode="online", config={}, deadline_s=5)
        assert tracker.warning is None
        handler.gone.set()
        for step in range(1, 6):
            tracker.log_step(step, {"a": float(step)})
        with pytest.raises(TrackerError, match="`wandb sync` sends what is on disk"):
            tracker.finish({})
    finally:
        server.shutdown()
        wandb.teardown()
    assert "wandb-history.jsonl" not in handler.files
    [file] = tmp_path.glob("wandb/run-*/run-*.wandb")
    assert [row["a"] for row in history(records(file))] == [1.0, 2.0, 3.0, 4.0, 5.0]
