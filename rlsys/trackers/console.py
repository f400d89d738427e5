"""Progress for the person in front of the terminal: a live panel, or a plain line a step when it is no terminal."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlsys.roles import SampleRow

Mode = Literal["auto", "live", "plain", "none"]

_NOTICEABLE = 0.05  # share of a step's time that waiting must take to be named


class ConsoleTracker:
    """Use as a context manager, so that the terminal is given back however the run ends.

    `auto` is live on a terminal and plain elsewhere; `none` says nothing but `warn`.
    """

    def __init__(
        self, name: str, run_dir: Path, steps: int, mode: Mode = "auto", console: Console | None = None
    ) -> None:
        self._console = console or Console(highlight=False)
        self._mode = mode if mode != "auto" else ("live" if self._console.is_terminal else "plain")
        self._name = name
        self._run_dir = run_dir
        self._steps = steps
        self._step = 0
        self._metrics: Mapping[str, float] = {}
        self._accuracy: tuple[int, float] | None = None
        self._durations: deque[float] = deque(maxlen=20)
        self._status = "starting"
        self._live: Live | None = None

    def __enter__(self) -> ConsoleTracker:
        if self._mode == "live":
            self._live = Live(self._panel(), console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def note(self, text: str) -> None:
        """What is going on now, such as the building of the model."""
        self._status = text
        if self._live is not None:
            self._live.update(self._panel())
        elif self._mode == "plain":
            self._line(text)

    def show(self, thing: RenderableType) -> None:
        """A table or the like, above the progress."""
        if self._mode != "none":
            self._console.print(thing)

    def warn(self, text: str) -> None:
        """Something that the user should know, whatever the mode."""
        self._console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)

    # ---- the tracker ----

    def log_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step, self._metrics, self._status = step, metrics, "training"
        if "time/step_s" in metrics:
            self._durations.append(metrics["time/step_s"])
        if self._live is not None:
            self._live.update(self._panel())
        elif self._mode == "plain":
            self._line("  ".join([f"step {step}/{self._steps}", *(f"{name} {text}" for name, text in self._figures())]))

    def log_eval(self, step: int, metrics: Mapping[str, float], scores: Sequence[float] = ()) -> None:
        if "accuracy" in metrics:
            self._accuracy = (step, metrics["accuracy"])
            said = f"accuracy {metrics['accuracy']:.1%}"
        else:
            said = "nothing could be scored"
        if self._mode != "none":
            self._line(f"held-out after step {step}: {said} ({metrics.get('prompts', 0):.0f} problems)")

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        """Samples are in W&B and in the rollout store."""

    def event(self, name: str, start: float, end: float, lane: str, trace: str = "") -> None:
        """Events are in the timeline."""

    def incident(self, title: str, text: str) -> None:
        """The log is on the screen already."""

    def resumed(self, step: int) -> None:
        self._step = step
        self.note(f"going on from the checkpoint of step {step}")

    def finish(self, summary: Mapping[str, Any]) -> None:
        self._stop()
        self.show(final_table(self._name, self._run_dir, summary))

    # ---- what it looks like ----

    def _figures(self) -> list[tuple[str, str]]:
        """Names and values of one line or panel, in order; what is not known is left out."""
        m = self._metrics
        figures = []
        if "reward/mean" in m:
            figures.append(("reward", f"{m['reward/mean']:.3f}"))
        if self._accuracy is not None:
            figures.append(("held-out", f"{self._accuracy[1]:.1%} (step {self._accuracy[0]})"))
        if "staleness/mean" in m:
            figures.append(("staleness", f"{m['staleness/mean']:.2f} (max {m.get('staleness/max', 0):.0f})"))
        rates = [
            f"{m[key]:,.0f} {word}"
            for key, word in (("tokens/generated_per_s", "generated"), ("tokens/trained_per_s", "trained"))
            if key in m
        ]
        if rates:
            figures.append(("tokens/s", ", ".join(rates)))
        if m.get("time/step_s"):
            figures.append(("waiting", waiting(m)))
        if bound := bound_by(m):
            figures.append(("bound by", bound))
        if self._durations:
            seconds = sum(self._durations) / len(self._durations) * (self._steps - self._step)
            figures.append(("left", duration(seconds)))
        return figures

    def _panel(self) -> Panel:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        bar = ProgressBar(total=self._steps, completed=self._step, width=40)
        table.add_row(f"step {self._step}/{self._steps}", bar)
        for name, text in self._figures():
            table.add_row(name, text)
        return Panel(
            table, title=f"{self._name}: {self._status}", title_align="left", width=min(100, self._console.width)
        )

    def _line(self, text: str) -> None:
        self._console.print(Text(text), soft_wrap=True)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def waiting(metrics: Mapping[str, float]) -> str:
    """Who waited for whom in the last step, and for how much of it."""
    total = metrics["time/step_s"]
    said = [
        f"{who} for {whom} {metrics[key] / total:.0%}"
        for key, who, whom in (
            ("wait/learner_for_rollouts_s", "learner", "rollouts"),
            ("wait/generators_for_learner_s", "generators", "learner"),
        )
        if metrics.get(key, 0.0) > _NOTICEABLE * total
    ]
    return ", ".join(said) or "nobody"


def bound_by(metrics: Mapping[str, float]) -> str | None:
    """The stage that most of the step's time belongs to, with its share; None when that is hardly any."""
    shares = {name.removeprefix("bound/"): share for name, share in metrics.items() if name.startswith("bound/")}
    stage = max(shares, key=lambda name: shares[name], default=None)
    return None if stage is None or shares[stage] <= _NOTICEABLE else f"{stage} {shares[stage]:.0%}"


def duration(seconds: float) -> str:
    """`45s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def final_table(name: str, run_dir: Path, summary: Mapping[str, Any]) -> Table:
    """Before, after, what it took, and where things are. `summary` is the content of summary.json."""
    table = Table(title=f"{name}: {summary['steps']} steps in {duration(summary['wall_s'])}", show_header=False)
    table.title_justify = "left"
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    accuracies = {
        when: result["accuracy"]
        for when in ("before", "after")
        if (result := summary["eval"].get(when)) and result.get("accuracy") is not None
    }
    for when, accuracy in accuracies.items():
        table.add_row(f"held-out accuracy {when}", f"{accuracy:.1%}")
    if len(accuracies) == 2:
        table.add_row("change", f"{100 * (accuracies['after'] - accuracies['before']):+.1f} points")
    tokens, staleness, fates = summary["tokens"], summary["staleness"], summary["fates"]
    table.add_row("tokens", f"{tokens['generated']:,} generated, {tokens['trained']:,} trained")
    if staleness["mean"] is not None:
        table.add_row("staleness", f"mean {staleness['mean']:.2f}, max {staleness['max']}")
    dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in fates["dropped"].items())
    table.add_row("prompts", f"{fates['trained']:,} trained{dropped}, {fates['pending']:,} pending")
    for what, file in (
        ("summary", "summary.json"),
        ("metrics", "metrics.jsonl"),
        ("rollouts", "rollouts/"),
        ("checkpoints", "checkpoints/"),
        ("timeline", "timeline.json"),
        ("W&B", "wandb/"),
        ("TensorBoard", "tensorboard/"),
    ):
        if (run_dir / file).exists():
            table.add_row(what, str(run_dir / file))
    return table
