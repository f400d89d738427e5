"""Weights & Biases: offline unless a key is there. Figures against our own `step`, a sample table, the resolved config.

The run id is kept in RUN/wandb/run-id, so a resumed run is the same run in W&B. W&B's history cannot be taken back:
steps that a resumed run does again are there twice, the later ones being those that count. The key stays in the
environment, from where W&B's own client takes it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rlsys.roles import SampleRow
from rlsys.trackers import TrackerError

COLUMNS = ("step", "prompt_id", "prompt", "response", "answer", "score", "versions", "finish_reason")


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
        tags: Sequence[str] = (),
        deadline_s: float = 60.0,
    ) -> None:
        # W&B would stage tables under the home directory, where an offline run could not be moved along with them.
        os.environ.setdefault("WANDB_DATA_DIR", str((directory / "wandb" / "data").resolve()))
        import wandb
        from wandb.errors import Error

        self._wandb, self._error = wandb, Error
        (directory / "wandb").mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off",  # output is not captured: it stays where the user sent it
            silent=True,
            disable_git=True,
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
            self.warning = f"W&B cannot be reached, so this run is kept offline (`wandb sync` sends it later): {error}"
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

    def log_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._log({"step": step, **{f"eval/{name}": value for name, value in metrics.items()}})

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        if not rows:
            return
        for row in rows:
            self._table.add_data(*(getattr(row, column) for column in COLUMNS))
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
            self._run.finish()
        except (self._error, TimeoutError) as error:
            raise TrackerError(f"W&B did not take everything: {error}; `wandb sync` sends what is on disk") from error

    def _log(self, values: Mapping[str, Any]) -> None:
        try:
            self._run.log(dict(values))
        except self._error as error:
            raise TrackerError(f"W&B: {error}") from error


def _run_id(path: Path) -> str:
    if not path.is_file():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
