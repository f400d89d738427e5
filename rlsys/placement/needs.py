"""What every role of a run asks for of the nodes that it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rlsys.config.models import Claim, Config
from rlsys.config.plan import RolePlan
from rlsys.placement.nodes import GIB

Strategy = Literal["pack", "spread", "strict_pack", "strict_spread"]

NOTHING = 0.001  # of a CPU: a place has to claim something

_ROLES = {"learner rank": "learner", "generator": "generator", "reference": "reference", "reward worker": "rewarder"}


@dataclass(frozen=True, slots=True)
class Need:
    """What each of `workers` takes of one node, by Ray's names, and which nodes it may be on."""

    role: str
    workers: tuple[str, ...]
    resources: Mapping[str, float]
    labels: Mapping[str, str]
    strategy: Strategy


def needs_of(config: Config, roles: tuple[RolePlan, ...]) -> list[Need]:
    """Of the roles of a plan, but for the driver, which is where it was started."""
    return [_need(_ROLES[plan.name], plan, config) for plan in roles if plan.name in _ROLES]


def worker_names(role: str, count: int) -> tuple[str, ...]:
    """As the driver calls them; there is one reference server."""
    return ("reference",) if role == "reference" else tuple(f"{role}-{i}" for i in range(count))


def _need(role: str, plan: RolePlan, config: Config) -> Need:
    claim: Claim = getattr(config.resources.roles, role)
    asked = {
        "CPU": plan.threads if claim.cpus is None else claim.cpus,
        "GPU": plan.gpus if claim.gpus is None else claim.gpus,
        "memory": 0.0 if claim.memory_gib is None else claim.memory_gib * GIB,
        **claim.custom,
    }
    resources = {name: float(amount) for name, amount in asked.items() if amount} or {"CPU": NOTHING}
    strategy: Strategy = claim.strategy or ("pack" if role == "learner" else "spread")
    return Need(role, worker_names(role, plan.workers), resources, claim.labels, strategy)
