"""`rlsys replay`: one step of a run once more, from its rollout store, with its figures beside the logged ones.

The learner begins with the newest checkpoint before the step (without one, with the initial model), repeats the steps
up to it, and takes it. Nothing of the run is changed, so this works beside one that goes on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.cli.rundir import CONFIG, checkpoints_of
from rlsys.config.loading import load_config
from rlsys.config.models import Config
from rlsys.errors import ConfigError, DataError, RunDirError
from rlsys.ledger.story import ROLLOUTS_DIR, Consumed, read_consumed
from rlsys.metrics import reduce
from rlsys.models.staging import staged
from rlsys.roles import StepReport
from rlsys.storage import Place, readable
from rlsys.trackers.jsonl import METRICS, read_rows

DIFFERENT = 1  # exit code

# Another number of ranks adds up in another order: relative, and absolute for sums that cancel out.
RELATIVE, ABSOLUTE = 1e-5, 1e-6

Values = Mapping[str, float | str]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a step. None where it was not logged, or not found again."""

    name: str
    logged: float | str | None
    replayed: float | str | None

    @property
    def difference(self) -> float:
        """Of numbers; infinite between a number and something else, 0 between equal texts."""
        if isinstance(self.logged, float) and isinstance(self.replayed, float):
            return self.replayed - self.logged
        return 0.0 if self.logged == self.replayed else math.inf

    @property
    def relative(self) -> float:
        """The difference over the larger of the two."""
        if isinstance(self.logged, float) and isinstance(self.replayed, float) and self.difference:
            return abs(self.difference) / max(abs(self.logged), abs(self.replayed))
        return self.difference

    def equal(self, exact: bool) -> bool:
        if exact:
            return self.logged == self.replayed
        return self.relative <= RELATIVE or abs(self.difference) <= ABSOLUTE

    def __str__(self) -> str:
        return f"{self.name}: logged {_text(self.logged)}, replayed {_text(self.replayed)}"


def replay(run_dir: Path, step: int, ranks: int | None = None, save: Path | None = None) -> None:
    """Print the table of figures; exit with 1 when one of them differs.

    `ranks`: of the learner, when not those of the run. `save`: a Parquet file to be written, see `repeat.table_of`.

    Raises RunDirError or DataError for what is not there.
    """
    config, logged = _read_run(run_dir)
    _check_step(run_dir, config, logged, step)
    if save is not None and not save.parent.is_dir():
        raise DataError(f"--save: there is no folder {save.parent}")
    exact = ranks is None or ranks == config.learner.ranks
    if ranks is not None:
        config = config.model_copy(update={"learner": config.learner.model_copy(update={"ranks": ranks})})
    console = Console(highlight=False)

    def say(text: str) -> None:
        console.print(Text(text), soft_wrap=True)

    checkpoint, version = _checkpoint(run_dir, step, say)
    batches = read_consumed(run_dir, range(version + 1, step + 1))
    _check_files(run_dir, batches)
    count = config.learner.ranks
    say(f"step {step} of {run_dir}, {count} rank{'s' * (count > 1)}: {_way(version, step)}")

    from rlsys.cli.repeat import Repetition, repeat, table_of

    ids = {number: batch.prompt_ids for number, batch in batches.items()}
    with nullcontext() if checkpoint is None else readable(checkpoint) as folder:
        work = Repetition(config, _model(config, run_dir), run_dir / ROLLOUTS_DIR, folder, ids, save is not None)
        repeated = repeat(work)
    compared = {
        report.version: compare(
            logged_values(logged[report.version], batches[report.version].skipped), replayed_values(report)
        )
        for report in repeated.reports
        if report.version in logged
    }
    console.print(table(compared[step], exact))
    if save is not None and repeated.trace is not None:
        import pyarrow.parquet as pq

        pq.write_table(table_of(repeated.trace), save)
        say(f"the batch is in {save}")
    say(verdict(compared, exact))
    if not all(figure.equal(exact) for figure in compared[step]):
        raise typer.Exit(DIFFERENT)


# ---- what there is to repeat ----------------------------------------------------------------------------------------


def _read_run(run_dir: Path) -> tuple[Config, dict[int, dict[str, float]]]:
    """Its config, and its lines of figures by step."""
    path = run_dir / CONFIG
    if not run_dir.is_dir():
        raise RunDirError(f"{run_dir}: no such run directory")
    if not path.is_file():
        raise RunDirError(f"{run_dir} is no run directory: it has no {CONFIG}")
    try:
        config = load_config(path)
    except ConfigError as error:
        raise RunDirError(
            f"{path} is no config of this version of rlsys; replay the step with the version that trained it:\n{error}"
        ) from error
    return config, {row["step"]: row for row in read_rows(run_dir / METRICS)}


def _check_step(run_dir: Path, config: Config, logged: Mapping[int, object], step: int) -> None:
    if step in logged:
        return
    if not logged:
        raise DataError(f"--step {step}: {run_dir} has not trained a step yet")
    done = f"it has trained steps {min(logged)} to {max(logged)}"
    if max(logged) < step <= config.run.steps:
        raise DataError(f"--step {step}: {run_dir} has not come there yet, {done} of {config.run.steps}")
    raise DataError(f"--step {step}: {run_dir} has no such step, {done}")


def _checkpoint(run_dir: Path, step: int, say: Callable[[str], None]) -> tuple[Place | None, int]:
    """What the learner saved in the newest valid checkpoint before a step, and its version."""
    checkpoints = checkpoints_of(run_dir)
    for version in reversed(checkpoints.versions()):
        if version >= step:
            continue
        problem, found = checkpoints.check(version)
        if found is not None:
            return found.learner, version
        say(f"warning: passing over the checkpoint of step {version}: {problem}")
    return None, 0


def _check_files(run_dir: Path, batches: Mapping[int, Consumed]) -> None:
    """Before anything is started. Where the batch of a skipped step is, only reading tells."""
    from rlsys.ledger.store import step_file

    for step, batch in batches.items():
        path = step_file(run_dir / ROLLOUTS_DIR, step)
        if batch.skipped is None and not path.is_file():
            raise DataError(
                f"the rollouts of step {step} are gone: there is no {path}; only steps after a checkpoint that "
                f"come later than step {step} can be replayed"
            )


def _way(version: int, step: int) -> str:
    start = (
        f"from the checkpoint of step {version}" if version else "no checkpoint before it, so from the initial model"
    )
    steps = step - 1 - version
    if steps == 0:
        return start
    return f"{start}, by way of {f'steps {version + 1} to {step - 1}' if steps > 1 else f'step {step - 1}'}"


def _model(config: Config, run_dir: Path) -> Path:
    from rlsys.cli.train import ensure_model
    from rlsys.trackers.console import ConsoleTracker

    with ConsoleTracker(config.run.name, run_dir, 1, "plain") as console:
        return Path(staged(ensure_model(config, console)))


# ---- figures --------------------------------------------------------------------------------------------------------


def replayed_values(report: StepReport) -> dict[str, float | str]:
    """The figures of a step that its batch and the weights before it decide: without timings."""
    values: dict[str, float | str] = {
        name: value
        for name, value in reduce(report.metrics).items()
        if math.isfinite(value) and not name.endswith("_s")
    }
    if report.skipped is not None:
        values["skipped"] = report.skipped
    return values


def logged_values(row: Mapping[str, float], skipped: str | None) -> dict[str, float | str]:
    """A line of metrics.jsonl, and why the step was skipped."""
    values: dict[str, float | str] = {name: value for name, value in row.items() if not name.endswith("_s")}
    return values if skipped is None else {**values, "skipped": skipped}


def compare(logged: Values, replayed: Values) -> list[Figure]:
    """By name. Of those that were logged only, the learner's own: the driver logs many more."""
    names = {name for name in logged if name in replayed or name.startswith("learner/") or name == "skipped"}
    return [Figure(name, logged.get(name), replayed.get(name)) for name in sorted(names | replayed.keys())]


def table(figures: Iterable[Figure], exact: bool) -> Table:
    """Digits by which the two cannot be told apart are left out."""
    out = Table(box=None, pad_edge=False)
    for name in ("figure", "logged", "replayed", "difference", "equal"):
        out.add_column(name, justify="left" if name == "figure" else "right", overflow="fold")
    for figure in figures:
        equal, same = figure.equal(exact), figure.equal(exact=True)
        pair = (_text(value, short=same) for value in (figure.logged, figure.replayed))
        difference = f"{figure.difference:.3g}" if math.isfinite(figure.difference) else "-"
        row = (figure.name, *pair, difference, "yes" if equal else "no")
        out.add_row(*map(Text, row), style=None if equal else "red")
    return out


def verdict(compared: Mapping[int, Sequence[Figure]], exact: bool) -> str:
    """In words: of the last step, and of the first one whose figures differ."""
    step = max(compared)
    different = {number: [f for f in figures if not f.equal(exact)] for number, figures in compared.items()}
    found, count = len(different[step]), len(compared[step])
    if found:
        text = f"step {step}: {found} of {count} figures differ, most of all {_largest(different[step])}"
    else:
        how = "to the bit" if exact else f"within {RELATIVE:g} of their size, or {ABSOLUTE:g}"
        text = f"step {step}: {count} of {count} figures are equal {how}"
    first = min((number for number, figures in different.items() if figures), default=step)
    if first < step:
        text += f"\nit is step {first} that differs first: {_largest(different[first])}"
    return text


def _largest(figures: Sequence[Figure]) -> Figure:
    return max(figures, key=lambda figure: figure.relative)


def _text(value: float | str | None, short: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if short and not isinstance(value, str) else str(value)
