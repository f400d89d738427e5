"""`rlsys eval`: a model on the held-out prompts, by the same generators and reward workers as in training."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from rlsys.cli.checks import check_config, load_tokenizer
from rlsys.cli.train import INTERRUPTED, ensure_model
from rlsys.config.loading import load_config
from rlsys.config.models import Config
from rlsys.errors import ConfigError, DataError, EngineError
from rlsys.roles import Generator, Rewarder, Sampling
from rlsys.trackers.console import ConsoleTracker
from rlsys.types import GroupInfo, Prompt

# Where a checkpoint of a run keeps its model, and where a step directory is within a run.
_MODEL_IN_CHECKPOINT = Path("learner") / "hf"


def evaluate(path: Path, checkpoint: Path | None, overrides: Sequence[str]) -> None:
    """Print accuracy and what else there is. Writes nothing but the cache of a tiny model.

    Raises UserError for a config or checkpoint that cannot work, EngineError past `eval.timeout_s`.
    """
    config = load_config(path, overrides)
    model = None if checkpoint is None else model_folder(checkpoint)
    if config.prompts.eval is None:
        raise ConfigError("prompts.eval is null: there is nothing to evaluate on")
    check_config(config)
    with ConsoleTracker(config.run.name, Path(config.run.dir), 1, "plain") as console:
        evaluated = model or ensure_model(config, console)
        console.note(f"evaluating {evaluated}")
        try:
            results = asyncio.run(_evaluate(config, evaluated))
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
    table = Table(show_header=False)
    for name in ("prompts", "rollouts", "accuracy", "unscored", "length_mean", "truncated"):
        if name in results:
            value = results[name]
            table.add_row(name, f"{value:.1%}" if name in ("accuracy", "truncated") else f"{value:,.6g}")
    Console().print(table)


def model_folder(checkpoint: Path) -> Path:
    """The model of a checkpoint (RUN/checkpoints/step-N), or a model folder itself. Raises DataError for neither."""
    from rlsys.models.loading import WEIGHT_PATTERNS, check_folder

    if not checkpoint.is_dir():
        raise DataError(f"--checkpoint: there is no folder {checkpoint}")
    folder = checkpoint / _MODEL_IN_CHECKPOINT
    if folder.is_dir():
        if not any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
            raise DataError(
                f"--checkpoint: {checkpoint} has no weights; those of a run with run.storage are there: copy them with "
                "rlsys export RUN DIR, and give that DIR"
            )
        return folder
    if not (checkpoint / "config.json").is_file():
        steps = sorted(p.name for p in (checkpoint / "checkpoints").glob("step-*"))
        if steps:
            hint = (
                f"; it is a run directory: choose one of its checkpoints, such as {checkpoint}/checkpoints/{steps[-1]}"
            )
        else:
            hint = "; give RUN/checkpoints/step-N, or a folder in Hugging Face format"
        raise DataError(f"--checkpoint: {checkpoint} holds no model{hint}")
    check_folder(checkpoint)
    return checkpoint


async def _evaluate(config: Config, model: str | Path) -> dict[str, float]:
    from rlsys.driver.evaluation import summarize
    from rlsys.prompts.stream import eval_prompts

    assert config.prompts.eval is not None
    room = config.model.max_length - config.rollout.max_new_tokens
    prompts = eval_prompts(
        config.prompts.eval, config.prompts, load_tokenizer(config), room, config.run.seed, config.eval.prompts
    )
    async with _workers(config, model) as (generators, rewarders):
        try:
            async with asyncio.timeout(config.eval.timeout_s):
                return summarize(await _score(config, prompts, generators, rewarders), failed=0)
        except TimeoutError:
            raise EngineError(
                f"the evaluation did not end within eval.timeout_s={config.eval.timeout_s:g} s: raise it, or evaluate "
                "fewer prompts (eval.prompts)"
            ) from None


async def _score(
    config: Config, prompts: Sequence[Prompt], generators: Sequence[Generator], rewarders: Sequence[Rewarder]
) -> list[GroupInfo]:
    """Every generator takes its share of the prompts; groups are scored as they come."""
    sampling = Sampling(
        n=config.eval.samples_per_prompt,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.eval.temperature,
        stop=config.rollout.stop,
        ignore_eos=config.rollout.ignore_eos,
    )

    async def one(generator: Generator, share: Sequence[Prompt]) -> list[GroupInfo]:
        async def score(generating: object, rewarder: Rewarder) -> GroupInfo:
            return (await rewarder.score([[(await generating).payload]], training=False)).info  # type: ignore[misc]

        answers = await generator.generate(share, sampling)
        return await asyncio.gather(*(score(a, rewarders[i % len(rewarders)]) for i, a in enumerate(answers)))

    shares = [prompts[i :: len(generators)] for i in range(len(generators))]
    done = await asyncio.gather(*(one(g, share) for g, share in zip(generators, shares, strict=True) if share))
    return [info for infos in done for info in infos]


@asynccontextmanager
async def _workers(config: Config, model: str | Path) -> AsyncIterator[tuple[list[Generator], list[Rewarder]]]:
    """The generators and reward workers alone; ended on the way out."""
    from rlsys.actors.cluster import end_cluster, needs, start_cluster
    from rlsys.actors.generator import start_generator
    from rlsys.actors.placement import Places
    from rlsys.actors.rewards import start_rewarder
    from rlsys.placement.needs import worker_names

    start_cluster(config)
    started: list[Generator | Rewarder] = []
    places = Places(
        [n for n in needs(config) if n.role in ("generator", "rewarder")], config.resources.placement_timeout_s
    )
    try:
        await places.reserve()
        async with asyncio.timeout(config.rollout.start_timeout_s):
            names = worker_names("generator", config.rollout.generators)
            generators = await asyncio.gather(
                *[start_generator(name, config, model, place=await places.options(name)) for name in names]
            )
            started += generators
            names = worker_names("rewarder", config.rewards.workers)
            rewarders = await asyncio.gather(
                *[start_rewarder(name, config.rewards, place=await places.options(name)) for name in names]
            )
            started += rewarders
        yield list(generators), list(rewarders)
    finally:
        await end_cluster(started)
