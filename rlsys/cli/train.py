"""`rlsys train`: check, make the run directory, start the roles, run the driver, end cleanly."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rlsys.cli.checks import check_config, load_tokenizer
from rlsys.cli.plan import render
from rlsys.cli.rundir import archive_of, open_run_dir
from rlsys.config.loading import load_config
from rlsys.config.models import Config
from rlsys.trackers.console import ConsoleTracker
from rlsys.trackers.fanout import Trackers, open_trackers

if TYPE_CHECKING:
    from rlsys.driver.loop import Driver

INTERRUPTED = 130  # exit code, as shells have it


def train(path: Path, overrides: Sequence[str]) -> None:
    """Train to the last step, or until Ctrl-C: the first ends with a checkpoint, the second at once."""
    config = load_config(path, overrides)
    checked = check_config(config)
    try:
        with open_run_dir(config) as run_dir, console_of(config, run_dir) as console, log_to(run_dir, console):
            console.show(render(checked))
            model_path = ensure_model(config, console)
            trackers = open_trackers(config, run_dir, console)
            console.note("starting the workers")
            asyncio.run(run(config, model_path, run_dir, trackers, console))
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo("rlsys: interrupted; the same command goes on from the newest checkpoint, if there is one", err=True)
        raise typer.Exit(INTERRUPTED) from None


async def run(
    config: Config, model_path: str | Path, run_dir: Path, trackers: Trackers, console: ConsoleTracker
) -> dict[str, Any]:
    """Start every role, run the driver over them, end them again; returns the summary."""
    from rlsys.actors.cluster import start_roles
    from rlsys.algorithms.compose import Algorithm
    from rlsys.algorithms.rollout import bound_strategy
    from rlsys.driver.control import controlled
    from rlsys.driver.loop import Driver
    from rlsys.ledger.ledger import Ledger
    from rlsys.prompts.stream import PromptStream, eval_prompts

    archive = archive_of(config, run_dir)
    tokenizer = load_tokenizer(config)
    common = (config.prompts, tokenizer, config.model.max_length - config.rollout.max_new_tokens, config.run.seed)
    stream = PromptStream.from_config(config.prompts.train, *common)
    held_out = eval_prompts(config.prompts.eval, *common, config.eval.prompts) if config.prompts.eval else ()
    algorithm = Algorithm.from_config(config.algorithm)
    with Interrupts(console) as interrupts:
        async with start_roles(config, model_path, run_dir) as roles:
            ledger = Ledger(run_dir / "ledger.sqlite")
            try:
                driver = Driver(
                    *(config, roles, ledger, stream, trackers, run_dir, held_out, algorithm.filters),
                    curriculum=algorithm.curriculum,
                    strategy=bound_strategy(algorithm, config, model_path),
                    with_greedy=algorithm.needs.greedy,
                    with_expert=algorithm.needs.expert,
                    shelf=archive,
                )
                interrupts.driver = driver
                async with controlled(driver, run_dir):
                    summary = await driver.run()
            finally:
                try:
                    ledger.close()
                finally:
                    await roles.store.close()
        if archive is not None:  # what came after the last checkpoint: evaluation, summary
            await asyncio.to_thread(archive.push)
            console.note(f"the run is in {archive.storage}")
        return summary


class Interrupts:
    """Ctrl-C (and SIGTERM) while the event loop runs.

    The first asks the driver to stop, or ends the start of the roles; the second cancels whatever is running. Both ways
    lead through the same clean-up, so no process is left behind.
    """

    def __init__(self, console: ConsoleTracker) -> None:
        self.driver: Driver | None = None
        self._console = console
        self._count = 0

    def __enter__(self) -> Interrupts:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.remove_signal_handler(number)

    def _interrupt(self) -> None:
        self._count += 1
        if self.driver is not None and self.driver.started and self._count == 1:
            self._console.warn("stopping after this step, with a checkpoint; Ctrl-C again ends at once")
            self.driver.stop()
        elif self._task is not None:
            self._task.cancel()


def console_of(config: Config, run_dir: Path) -> ConsoleTracker:
    return ConsoleTracker(config.run.name, run_dir, config.run.steps, config.trackers.console)


@contextmanager
def log_to(run_dir: Path, console: ConsoleTracker) -> Iterator[None]:
    """Messages of rlsys go to RUN/rlsys.log; warnings are shown as well."""
    file = logging.FileHandler(run_dir / "rlsys.log", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    screen = _ToConsole(console)
    logger = logging.getLogger("rlsys")
    logger.setLevel(logging.INFO)
    logger.addHandler(file)
    logger.addHandler(screen)
    try:
        yield
    finally:
        logger.removeHandler(screen)
        logger.removeHandler(file)
        file.close()


class _ToConsole(logging.Handler):
    def __init__(self, console: ConsoleTracker) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warn(record.getMessage())


def ensure_model(config: Config, console: ConsoleTracker) -> str | Path:
    """The folder, hub name or URL of the initial model; a tiny one is built first, unless it is in the cache."""
    tiny = config.model.tiny
    if tiny is None:
        assert config.model.path is not None
        return config.model.path
    from transformers.utils import logging as transformers_logging
    from transformers.utils.logging import disable_progress_bar

    from rlsys.models.tiny import ensure_tiny_model
    from rlsys.prompts.sums import demonstrations

    transformers_logging.disable_progress_bar()  # ours is on the screen
    disable_progress_bar()  # of the writing of one small file

    source, warm = config.prompts.train, tiny.warm_start
    if source.kind == "sums":
        arguments = (warm.seed, source.terms, source.largest, warm.wrong_step)
    else:  # no warm start, so none is drawn: the plan has refused everything else
        arguments = (warm.seed, (1, 1), 1, 0.0)
    every = max(1, warm.steps // 10)

    def progress(step: int, steps: int, loss: float) -> None:
        if step % every == 0 or step == steps:
            console.note(f"warm start of the tiny model: step {step}/{steps}, loss {loss:.3f}")

    return ensure_tiny_model(
        tiny, config.model.max_length, lambda: demonstrations(*arguments), f"sums {arguments}", progress
    )
