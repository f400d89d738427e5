"""`rlsys`: the commands, and what a failure of one looks like.

Exit codes: 0 done; 1 something failed, the message names the culprit; 2 the user can mend it (config, data, a cluster
without room), the message says how; 130 ended by a second Ctrl-C. Only an exception that nobody foresaw shows its
traceback.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from rlsys.errors import ConfigError, PlacementError, RlsysError, UserError

app = typer.Typer(
    name="rlsys",
    help="Asynchronous actor-learner reinforcement learning for language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file.", show_default=False)]
Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A run directory; with --address, a job's id or the name of its run.", show_default=False
    ),
]
Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Of a Ray cluster's dashboard, such as http://head:8265.", show_default=False),
]
_HOW = "\n\nKeys of the config are set with `--dotted.key value`, after CONFIG."


@app.command(context_settings=_OVERRIDES, help="Train, as the config says, or go on with a run." + _HOW)
def train(
    context: typer.Context,
    config: ConfigPath,
    supervise: Annotated[bool, typer.Option("--supervise", help="Start the driver again when it dies.")] = False,
) -> None:
    if supervise:
        from rlsys.cli.supervise import supervise as run
    else:
        from rlsys.cli.train import train as run
    run(_checked_path(config), context.args)


@app.command(context_settings=_OVERRIDES, help="Print the resolved config and its arithmetic; start nothing." + _HOW)
def plan(
    context: typer.Context,
    config: ConfigPath,
    cluster: Annotated[
        str | None,
        typer.Option(
            metavar="FILE or ADDRESS", help="Place the workers on these nodes: a YAML file, or a Ray cluster (auto)."
        ),
    ] = None,
) -> None:
    from rlsys.cli.plan import plan as run

    run(_checked_path(config), context.args, cluster)


@app.command("eval", context_settings=_OVERRIDES, help="Evaluate a model on the held-out prompts." + _HOW)
def evaluate(
    context: typer.Context,
    config: ConfigPath,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="A checkpoint of a run, or a model folder; without it: the initial model."),
    ] = None,
) -> None:
    from rlsys.cli.evaluate import evaluate as run

    run(_checked_path(config), checkpoint, context.args)


@app.command(help="List the algorithms, or explain one.")
def algorithms(
    name: Annotated[str | None, typer.Argument(help="A preset.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of them as one page.")] = False,
) -> None:
    from rlsys.cli.algorithms import algorithms as run

    run(name, markdown)


@app.command(help="What a run logs, or how to read one metric.")
def metrics(
    name: Annotated[str | None, typer.Argument(help="A metric.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="All of them as one page.")] = False,
    grafana: Annotated[bool, typer.Option("--grafana", help="A Grafana dashboard of them.")] = False,
) -> None:
    from rlsys.cli.metrics import metrics as run

    run(name, markdown, grafana)


@app.command(help="What a run did, or the whole story of one of its prompts.")
def inspect(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    prompt: Annotated[str | None, typer.Argument(metavar="[PROMPT]", help="The id of a prompt.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it to a page, too.")] = None,
) -> None:
    from rlsys.cli.inspect import inspect as run

    run(run_dir, prompt, html)


@app.command(help="One HTML page of one run, or of several beside each other; runs that differ in seeds only are one.")
def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The page.")] = Path("report.html"),
) -> None:
    from rlsys.cli.report import report as run

    run(run_dirs, out)


@app.command(help="Where the time of a run went: the critical path of its steps, and who waited for whom.")
def timeline(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    step: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="This step; without it: the newest ones.")
    ] = None,
) -> None:
    from rlsys.cli.timeline import timeline as run

    run(run_dir, step)


@app.command(help="Watch a run that is going on; q ends it.")
def top(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
) -> None:
    from rlsys.cli.top import top as run

    run(run_dir)


@app.command(help="How a run stands: its roles, versions, queues, restarts and newest incident.")
def status(
    run: Run,
    as_json: Annotated[bool, typer.Option("--json", help="For programs; only of a run that is going on.")] = False,
    address: Address = None,
) -> None:
    if address is not None:
        from rlsys.cli.jobs import order

        order(address, run, "status", ["--json"] if as_json else [])
        return
    from rlsys.cli.control import status as here

    here(Path(run), as_json)


@app.command(help="Change the sizes of a run that is going on.")
def scale(
    run: Run,
    generators: Annotated[int | None, typer.Option(min=1)] = None,
    reward_workers: Annotated[int | None, typer.Option(min=1)] = None,
    learner_ranks: Annotated[int | None, typer.Option(min=1, help="The learner goes on from a checkpoint.")] = None,
    zero_stage: Annotated[int | None, typer.Option(min=0, max=3, help="The learner goes on from a checkpoint.")] = None,
    address: Address = None,
) -> None:
    from rlsys.config.models import Sizes

    given = {"generators": generators, "reward_workers": reward_workers}
    sizes = Sizes.model_validate({**given, "learner_ranks": learner_ranks, "zero_stage": zero_stage})
    if address is not None:
        from rlsys.cli.jobs import order

        wanted = sizes.model_dump(exclude_none=True)
        order(address, run, "scale", [f"--{key.replace('_', '-')}={value}" for key, value in wanted.items()])
        return
    from rlsys.cli.control import scale as here

    here(Path(run), sizes)


@app.command(help="Have a run that is going on end after its step, with a checkpoint.")
def stop(
    run: Run,
    now: Annotated[bool, typer.Option("--now", help="Of a job: end its processes, without a checkpoint.")] = False,
    address: Address = None,
) -> None:
    if address is not None:
        from rlsys.cli.jobs import stop as job

        job(address, run, now)
        return
    from rlsys.cli.control import stop as here

    here(Path(run))


@app.command(
    context_settings=_OVERRIDES, help="Train as a job of a Ray cluster, supervised, and show what it prints." + _HOW
)
def submit(
    context: typer.Context,
    config: ConfigPath,
    address: Address = None,
    working_dir: Annotated[
        Path, typer.Option(metavar="DIR", help="Sent along: the config and your code are in it.")
    ] = Path(),
    wait: Annotated[bool, typer.Option(help="Show what the job prints, until it ends.")] = True,
) -> None:
    from rlsys.cli.jobs import submit as run

    run(_checked_path(config), context.args, address, working_dir, wait)


@app.command(help="What a job has printed.")
def logs(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Its id, or the name of its run.", show_default=False)],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="And goes on to print, until it ends.")] = False,
    address: Address = None,
) -> None:
    from rlsys.cli.jobs import logs as run

    run(address, job, follow)


@app.command(help="Copy the model of a checkpoint, as an ordinary Hugging Face folder.")
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DIR", help="The new folder.", show_default=False)],
    step: Annotated[int | None, typer.Option(metavar="N", help="Of this step; without it: the newest.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Of the step with the best held-out accuracy.")] = False,
) -> None:
    from rlsys.cli.export import export as run

    run(run_dir, target, step, best)


@app.command(help="Take a step of a run once more, from its rollouts, and compare its figures with the logged ones.")
def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.", show_default=False)],
    step: Annotated[int, typer.Option("--step", metavar="N", min=1, help="Which step.", show_default=False)],
    ranks: Annotated[
        int | None,
        typer.Option(metavar="R", min=1, help="Learner ranks, all on this machine; without it: as in the run."),
    ] = None,
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Write its batch there, as Parquet.")] = None,
) -> None:
    from rlsys.cli.replay import replay as run

    run(run_dir, step, ranks, save)


def _checked_path(config: Path) -> Path:
    if str(config).startswith("-"):
        raise ConfigError(f"CONFIG comes first, before {config}: rlsys COMMAND CONFIG [--dotted.key value ...]")
    return config


def main() -> None:
    """The entry point: runs a command, and turns a failure into a message and an exit code."""
    # Several processes share the cores: idle OpenMP threads have to sleep, not spin. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except (UserError, PlacementError) as error:
        print(f"rlsys: {error}", file=sys.stderr)
        sys.exit(2)
    except RlsysError as error:
        print(f"rlsys: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
