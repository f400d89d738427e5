"""`rlsys plan`: the resolved config and what it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.panel import Panel
from rich.syntax import Syntax
from rich.table import Table

from rlsys.cli.checks import Checked, check_config
from rlsys.config.loading import load_config, to_yaml
from rlsys.config.plan import Plan
from rlsys.errors import PlacementError
from rlsys.placement.fit import Placement, amounts, fit
from rlsys.placement.needs import needs_of
from rlsys.placement.nodes import Node, read_nodes

_SHOWN = ("CPU", "GPU", "memory")


def plan(path: Path, overrides: Sequence[str], cluster: str | None = None) -> None:
    """Print the config, the preset resolved too, then the plan, and where a `cluster` would have the workers.

    `cluster` is the address of a live one, or a file that describes one. Raises UserError for what cannot work,
    PlacementError when there is no room.
    """
    config = load_config(path, overrides)
    there = config
    if cluster is not None:
        there = config.model_copy(update={"resources": config.resources.model_copy(update={"ray_address": cluster})})
    checked = check_config(there)
    console = Console()
    values = config.model_dump(mode="json") | {"algorithm": checked.algorithm}
    console.print(Syntax(to_yaml(values), "yaml", background_color="default", word_wrap=True))
    console.print(render(checked))
    if cluster is not None:
        nodes = read_nodes(Path(cluster)) if Path(cluster).is_file() else _live(cluster)
        placement = fit(needs_of(config, checked.plan.roles), nodes)
        console.print(_placed(placement))
        if placement.missing:
            raise PlacementError("the cluster has no room for the run:\n  " + "\n  ".join(placement.missing))


def _live(address: str) -> list[Node]:
    from rlsys.actors.cluster import looked_at

    return looked_at(address)


def _placed(placement: Placement) -> Table:
    """Which workers every node has; nodes of the same kind with the same workers in one row."""
    table = Table(title="Placement", title_justify="left")
    for column in ("nodes", "workers", "left"):
        table.add_column(column)
    kinds: dict[tuple[str, str], list[str]] = {}
    for index, node in enumerate(placement.nodes):
        here: dict[str, list[str]] = {}
        for worker, at in placement.places.items():
            if at == index:
                here.setdefault(worker.partition("-")[0], []).append(worker.partition("-")[2])
        left = {name: amount for name, amount in placement.left(index).items() if name in _SHOWN or amount}
        counted = ", ".join(f"{len(numbers)} {role}" for role, numbers in here.items())
        kinds.setdefault((counted or "-", amounts(left)), []).append(node.name)
    for (workers, free), names in kinds.items():
        several = f"{names[0]} to {names[-1]} ({len(names)})" if len(names) > 2 else ", ".join(names)
        table.add_row(several, workers, free)
    return table


def render(checked: Checked) -> Group:
    """The arithmetic, the workers with the memory they take, and what the preset's paper did otherwise."""
    return Group(
        Panel(_arithmetic(checked.plan), title="One step", title_align="left"),
        _workers(checked.plan),
        *(
            f"{checked.algorithm['preset']} was published with {key} {published}; here it is {here}."
            for key, here, published in checked.departures
        ),
    )


def _arithmetic(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()

    def row(name: str, text: str) -> None:
        table.add_row(name, text)

    row(
        "rollouts per step",
        f"{plan.prompts_per_step:,} prompts x {plan.samples_per_prompt} samples = {plan.rollouts_per_step:,}",
    )
    bound = f"at most {_count(plan.staleness_bound, 'weight version')} behind"
    row("staleness", bound if plan.staleness_bound else "0: synchronous, generation and training take turns")
    row("groups in flight", f"at most {plan.groups_in_flight:,}")
    row(
        "tokens per step",
        f"at most {plan.rollouts_per_step:,} x {plan.row_tokens:,} = {plan.tokens_per_step:,}, "
        f"of them {plan.response_tokens_per_step:,} of responses",
    )
    row(
        "updates per step",
        f"{_count(plan.epochs, 'pass', 'es')} x {_count(plan.minibatches, 'minibatch', 'es')} = "
        f"{plan.updates_per_step}, of {plan.rows_per_update:,} rollouts",
    )
    row(
        "micro-batches",
        f"at most {plan.micro_batches_per_rank:,} per rank and update, of {plan.rows_per_micro_batch:,} rollouts",
    )
    if plan.sampled_per_step > plan.response_tokens_per_step:
        row(
            "sampled per step",
            f"up to about {plan.sampled_per_step:,.0f} tokens, branches included "
            f"({plan.sampled_per_step / plan.prompts_per_step:,.0f} a prompt)",
        )
    row("the run", f"{plan.steps:,} steps, {plan.updates:,} updates, {plan.rollouts:,} rollouts")
    if plan.steps_per_epoch is None or plan.epochs_of_data is None:
        row("training data", "endless, every problem is fresh")
    else:
        row(
            "training data",
            f"{plan.train_rows:,} prompts, {plan.steps_per_epoch:,.1f} steps per epoch; the run: "
            f"{plan.epochs_of_data:,.2f} epochs",
        )
    row("held-out problems", "none" if plan.eval_prompts is None else f"{plan.eval_prompts:,}")
    return table


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def _workers(plan: Plan) -> Table:
    machine = plan.machine
    table = Table(title="Workers", title_justify="left", show_footer=True)
    table.add_column("role", footer="in all, about")
    table.add_column("workers", justify="right", footer=str(sum(role.workers for role in plan.roles)))
    table.add_column(
        "threads each",
        justify="right",
        footer=f"{sum(role.workers * role.threads for role in plan.roles)} on {machine.cores} cores",
    )
    if plan.gpus:
        table.add_column("GPUs each", justify="right", footer=f"{plan.gpus} of {machine.gpus}")
    total = f"{plan.memory_gib:.1f} GiB of {machine.memory_gib:.1f}"
    table.add_column("memory each", justify="right", footer=total)
    for role in plan.roles:
        cells = [role.name, str(role.workers), str(role.threads)]
        if plan.gpus:
            cells.append(str(role.gpus))
        table.add_row(*cells, f"{role.memory_gib:.2f} GiB")
    if plan.cluster is not None:
        table.caption = f"These workers go to the cluster at {plan.cluster}."
    return table
