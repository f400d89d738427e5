"""Weights & Biases: offline unless a key is there.

Figures and evaluations against our own `step` (panels are grouped by what stands before the `/` of a name), a table of
samples, the distribution of held-out scores, the resolved config, the commit it ran with, alerts, and the final model
if that is asked for.

A run that failed is one that failed in W&B, too, so that a sweep knows.

The run id is kept in RUN/wandb/run-id, so a resumed run is the same run in W&B; the agent of a sweep gives it in
WANDB_RUN_ID. W&B's history cannot be taken back: steps that a resumed run does again are there twice, the later ones
being those that count. The key stays in the environment, from where W&B's own client takes it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlsys.roles import SampleRow
from rlsys.trackers import TrackerError

COLUMNS = (
    *("step", "prompt_id", "prompt", "response", "answer", "score", "components", "advantage"),
    *("versions", "finish_reason", "fate"),
)  # of the table of samples: the fields of SampleRow
MODEL = "checkpoints/step-*/learner/hf"  # below a run directory: the models of its checkpoints


def resolve_mode(mode: str, environment: Mapping[str, str]) -> Literal["online", "offline", "disabled"]:
    """`auto` is what WANDB_MODE says, else online when there is a key, else offline."""
    if mode == "auto":
        mode = environment.get("WANDB_MODE") or ("online" if environment.get("WANDB_API_KEY") else "offline")
    if mode not in ("online", "offline", "disabled"):
        raise TrackerError(f"WANDB_MODE is {mode!r}; it must be online, offline or disabled")
    return mode  # type: ignore[return-value]


class WandbTracker:
    """One W&B run. `mode` is resolved already. An online run that cannot be started is started offline, with a warning.

    Raises TrackerError, from any method, when W&B itself fails.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        project: str,
        mode: Literal["online", "offline"],
        config: Mapping[str, Any],
        entity: str | None = None,
        group: str | None = None,
        job_type: str | None = None,
        tags: Sequence[str] = (),
        log_model: bool = False,
        deadline_s: float = 60.0,
    ) -> None:
        # W&B would stage tables under the home directory, where an offline run could not be moved along with them.
        os.environ.setdefault("WANDB_DATA_DIR", str((directory / "wandb" / "data").resolve()))
        import wandb
        from wandb.errors import Error

        self._wandb, self._error = wandb, Error
        self._directory, self._log_model = directory, log_model
        (directory / "wandb").mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off",  # output is not captured: it stays where the user sent it
            silent=True,
            disable_git=True,  # it would keep the diff, which may hold keys
            disable_code=True,
            x_save_requirements=False,
            init_timeout=deadline_s,
            login_timeout=deadline_s,
            finish_timeout=deadline_s,
            finish_timeout_raises=True,
        )

        def start(mode: Literal["online", "offline"]) -> Any:
            return wandb.init(
                dir=str(directory),
                id=_run_id(directory / "wandb" / "run-id"),
                name=name,
                project=project,
                entity=entity,
                group=group,
                job_type=job_type,
                tags=list(tags),
                mode=mode,
                config=dict(config),
                resume="allow",
                reinit="create_new",
                settings=settings,
            )

        self.warning: str | None = None
        try:
            self._run = start(mode)
        except (Error, OSError) as error:
            if mode == "offline":
                raise TrackerError(f"W&B does not start: {error}") from error
            self.warning = (
                "W&B did not take the run (it cannot be reached, or the key is wrong or has expired), so it is kept "
                f"offline, and `wandb sync` sends it later: {error}"
            )
            try:
                wandb.teardown()  # or its service would say that the run is in use
                self._run = start("offline")
            except (Error, OSError) as second:
                raise TrackerError(f"W&B does not start: {second}") from second
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._table = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log({"step": step, **metrics})

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        values: dict[str, Any] = {f"eval/{name}": value for name, value in metrics.items()}
        if scores:
            values["eval/scores"] = self._wandb.Histogram(list(scores))
        self._log({"step": step, **values})

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        if not rows:
            return
        for row in rows:
            self._table.add_data(*(_cell(getattr(row, column)) for column in COLUMNS))
        self._log({"step": step, "samples": self._table})

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        """Events are in the timeline."""

    def incident(self, title: str, text: str) -> None:
        try:
            self._run.alert(title, text, level="WARN")
        except self._error as error:
            raise TrackerError(f"W&B: {error}") from error

    def resumed(self, step: int) -> None:
        """W&B's history cannot be taken back."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        try:
            self._run.summary.update({"final": dict(summary)})
            if self._log_model:
                self._keep_model()
            self._run.finish(exit_code=1 if summary.get("failure") else 0)
        except (self._error, TimeoutError) as error:
            raise TrackerError(f"W&B did not take everything: {error}; `wandb sync` sends what is on disk") from error

    def _keep_model(self) -> None:
        """The model of the newest checkpoint, which is the last step's unless the run has failed."""
        models = sorted(self._directory.glob(MODEL))
        if not models:
            return
        step = models[-1].parents[1].name.removeprefix("step-")
        artifact = self._wandb.Artifact(f"model-{self._run.id}", type="model", metadata={"step": int(step)})
        for file in sorted(models[-1].iterdir()):  # add_dir would print
            artifact.add_file(str(file), file.name)
        self._run.log_artifact(artifact, aliases=["final", f"step-{int(step)}"])

    def _log(self, values: Mapping[str, Any]) -> None:
        try:
            self._run.log(dict(values))
        except self._error as error:
            raise TrackerError(f"W&B: {error}") from error


def _cell(value: Any) -> Any:
    """What a column of one type can hold: `correct 1, brief -0.1` for a dict of numbers."""
    return ", ".join(f"{k} {v:g}" for k, v in value.items()) if isinstance(value, Mapping) else value


def _run_id(path: Path) -> str:
    if not path.is_file():
        path.write_text((os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)) + "\n")
    return path.read_text().strip()
