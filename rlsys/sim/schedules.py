"""Seeded fault schedules: a run, the processes that it takes, and what goes wrong in each. Pure: a seed says it all."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlsys.config.models import Config
from rlsys.curricula import Curriculum
from rlsys.curricula.category_bandit import CategoryBandit
from rlsys.curricula.predicted_difficulty import PredictedDifficulty
from rlsys.curricula.success_budget import SuccessBudget
from rlsys.curricula.uncertain_first import UncertainFirst
from rlsys.curricula.variance_promotion import VariancePromotion
from rlsys.segments import Strategy
from rlsys.segments.partitions.fixed_length import FixedLength
from rlsys.segments.strategies.chain import Chain
from rlsys.segments.strategies.tree import Tree
from rlsys.segments.strategies.windows import Windows
from rlsys.sim.drive import SimPrompts, sim_config
from rlsys.sim.faults import DAMAGE, Damage, Fault
from rlsys.sim.roles import Timing
from rlsys.types import GroupInfo

MAX_TOKENS = 24

TIMINGS = {
    "usual": Timing(lengths=(2, 20), tokens_per_s=8.0),
    "instant": Timing((2, 20), None, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    "slow learner": Timing((2, 8), 16.0, step_s=20.0, publish_s=3.0),
    "slow sampling": Timing((2, 24), 0.5, step_s=0.2),
    "slow scoring": Timing((2, 20), 16.0, score_s=6.0, reference_s=3.0),
    "slow weights": Timing((2, 20), 8.0, publish_s=2.0, update_s=5.0),
    "slow starts": Timing((2, 20), 8.0, spawn_s=30.0),
}

# The calls that a fault can come with, by role; each as it begins and when it has its result.
MOMENTS = {
    "generator": ("spawn", "generate", "answer", "update", "progress", "inspect", "close"),
    "rewarder": ("spawn", "score", "branch", "progress", "close"),
    "learner": ("spawn", "load", "step", "publish", "save", "written", "progress", "close"),
    "reference": ("spawn", "load", "logprobs", "update", "save", "progress", "close"),
}
LOSE = {  # calls that are given a handle of something that another node may have
    "generator": ("update",),
    "rewarder": ("score", "branch"),
    "learner": ("step",),
    "reference": ("logprobs", "update"),
}
CORRUPT = {
    "generator": ("answer", "update"),
    "rewarder": ("score",),
    "learner": ("step", "publish", "load"),
}


@dataclass(frozen=True, slots=True)
class Life:
    """One process of the run: its config, what goes wrong in it, and what becomes of its files afterwards."""

    config: Config
    faults: tuple[Fault, ...] = ()
    damage: tuple[Damage, ...] = ()


@dataclass(frozen=True, slots=True)
class Schedule:
    seed: int
    lives: tuple[Life, ...]
    timing: str
    strategy: str
    curriculum: str
    rows: int | None  # of the data; None: endless
    rule: str  # of the filter; "": there is none
    reference: bool
    skipped: frozenset[int]  # steps that apply nothing
    disk_s: float  # mean time of a piece of work for a thread

    def __str__(self) -> str:
        first = self.lives[0].config
        parts = [
            f"bound {first.driver.max_staleness}, {first.run.steps} steps of {first.driver.prompts_per_step}",
            f"{self.strategy}, {self.timing}",
            *([f"curriculum {self.curriculum}"] if self.curriculum else []),
            *([f"filter {self.rule}"] if self.rule else []),
            *([f"reference {first.reference.update}"] if self.reference else []),
            *([f"skips {sorted(self.skipped)}"] if self.skipped else []),
        ]
        lines = ["; ".join(parts)]
        for i, life in enumerate(self.lives):
            c = life.config
            sizes = f"{c.rollout.generators} generators, {c.rewards.workers} reward workers"
            what = [*map(str, life.faults), *(f"then {damage}" for damage in life.damage)]
            lines.append(f"process {i} ({sizes}, {c.driver.restarts} restarts): {', '.join(what) or 'nothing'}")
        return "\n".join(lines)

    def parts(self) -> dict[str, Any]:
        """What a `Simulation` is made of, anew for each process."""
        return {
            "timing": TIMINGS[self.timing],
            "with_reference": self.reference,
            "skip": lambda step: step in self.skipped,
            "filters": [Rule(self.rule)] if self.rule else [],
            "curriculum": curriculum(self.curriculum),
            "strategy": strategy(self.strategy),
            "prompts": SimPrompts(size=self.rows),
        }


def longest_piece_s(schedule: Schedule) -> float:
    """The longest that a generator may be at one prompt."""
    timing = TIMINGS[schedule.timing]
    return 0.0 if timing.tokens_per_s is None else MAX_TOKENS / timing.tokens_per_s


@dataclass(frozen=True, slots=True)
class Rule:
    """A filter: groups without variance, or every fourth one."""

    name: str

    def drop_reason(self, info: GroupInfo) -> str | None:
        drop = len(set(info.scores)) == 1 if self.name == "variance" else info.index % 4 == 3
        return f"filtered: {self.name}" if drop else None


def strategy(name: str) -> Strategy | None:
    made: Strategy
    match name:
        case "chain":
            made = Chain(continuations=2)
        case "tree":
            made = Tree(breadth=(2, 2), segment_tokens=8)
        case "windows":
            made = Windows(tokens=8)
        case _:
            return None
    made.bind(FixedLength(tokens=8), MAX_TOKENS)
    return made


def curriculum(name: str) -> Curriculum | None:
    match name:
        case "bandit":
            return CategoryBandit(key="kind")
        case "budget":
            return SuccessBudget()
        case "predicted":
            return PredictedDifficulty()
        case "uncertain":
            return UncertainFirst()
        case "promotion":
            return VariancePromotion(refresh=1)
    return None


def schedule(seed: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(f"chaos/{seed}")
    bound = rng.choice((0, 0, 1, 1, 2, 3))
    kind = rng.choice(("plain", "plain", "plain", "chain", "tree", "windows"))
    timing = rng.choice(("usual", "usual", "usual", *TIMINGS))
    chosen = rng.choice(("", "", "", "bandit", "budget", "predicted", "uncertain", "promotion"))
    rule = rng.choice(("", "", "fourth", "variance" if kind != "windows" else "fourth"))
    reference, update = rng.random() < 0.5, rng.choice(("frozen", "every", "moving_average"))
    steps, batch = rng.randint(4, 8), rng.randint(1, 4)
    if kind in ("chain", "tree"):
        steps, batch = min(steps, 6), min(batch, 2)
    skipped = frozenset(rng.sample(range(1, steps + 1), 2)) if rng.random() < 0.2 else frozenset()
    sections: dict[str, Any] = {
        "run": {"steps": steps, "seed": rng.randrange(1000)},
        "rollout": {
            "generators": rng.choice((1, 1, 2, 3, 4)),
            "samples_per_prompt": rng.randint(2, 3),
            "max_new_tokens": MAX_TOKENS,
            "attempts": rng.randint(1, 3),
            "stall_timeout_s": 20.0,
            "start_timeout_s": 120.0,
        },
        "rewards": {"workers": rng.choice((1, 1, 2, 3)), "timeout_s": 5.0, "start_timeout_s": 120.0},
        "reference": {"update": update if reference else "frozen", "every": rng.randint(1, 3)},
        "learner": {"step_timeout_s": 400.0 if timing == "slow learner" else 100.0, "start_timeout_s": 120.0},
        "weights": {"timeout_s": 60.0},
        "driver": {
            "prompts_per_step": batch,
            "max_staleness": bound,
            "restarts": rng.choice((0, 1, 3, 3, 3)),
            "silence_timeout_s": rng.choice((15.0, 30.0, 60.0)),
            "max_groups_in_flight": rng.choice((None, None, None, batch, 2 * batch)),
        },
        "eval": {
            "prompts": 2,
            "every": rng.choice((0, 2, 3)),
            "before": rng.random() < 0.4,
            "after": rng.random() < 0.4,
            "timeout_s": 3600.0,
        },
        "checkpoint": {"every": rng.choice((0, 1, 2, 2, 3)), "keep_last": rng.randint(1, 3)},
    }
    sections["rewards"]["functions"] = [{"name": "parity", "kind": "python", "path": "none:none"}]
    lives: list[Life] = []
    count = rng.choice((1, 1, 2, 2, 3, 4))
    expected_s = _expected_s(sim_config(**sections), TIMINGS[timing], kind)
    # The learner twice: what it takes to bring it back is the most that there is.
    roles = ["generator", "rewarder", "learner", "learner", *(["reference"] if reference else [])]
    for i in range(count):
        last = i == count - 1
        if i:
            sections = _changed(sections, rng)
        if not last and i == 0 and not chosen and rng.random() < 0.15:
            config = sim_config(**{**sections, "run": {**sections["run"], "steps": max(1, steps - 2)}})
        else:
            config = sim_config(**sections)
        moving = config.reference.update != "frozen"
        faults: list[Fault] = []
        for _ in range(rng.choice((0, 1, 2, 3, 4, 6))):
            faults += _faults(rng, roles, moving, expected_s)
        if not last:
            faults.append(_ending(rng, roles, moving, expected_s))
        damage = () if last else tuple(_damage(rng) for _ in range(rng.choice((0, 0, 1, 2))))
        lives.append(Life(config, tuple(faults), damage))
    return Schedule(
        seed=seed,
        lives=tuple(lives),
        timing=timing,
        strategy=kind,
        curriculum=chosen,
        rows=rng.choice((5, 50)) if chosen else rng.choice((None, 7)),
        rule=rule,
        reference=reference,
        skipped=skipped,
        disk_s=rng.choice((0.0, 0.02, 0.5)),
    )


def _changed(sections: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Other settings among those that the next process of a run may have."""
    out = {name: dict(section) for name, section in sections.items()}
    if rng.random() < 0.5:
        out["rollout"] |= {"generators": rng.choice((1, 1, 2, 3, 4)), "attempts": rng.randint(1, 3)}
        out["rewards"] |= {"workers": rng.choice((1, 1, 2, 3))}
        out["driver"] |= {"restarts": rng.choice((0, 1, 3))}
        out["checkpoint"] |= {"every": rng.choice((0, 1, 2, 3)), "keep_last": rng.randint(1, 3)}
        out["eval"] |= {"every": rng.choice((0, 2)), "after": rng.random() < 0.4}
        out["learner"] |= {"ranks": rng.randint(1, 2)}
    return out


def _faults(rng: random.Random, roles: Sequence[str], moving: bool, expected_s: float) -> list[Fault]:
    """One fault, or a few of a kind in a row."""
    role: Any = rng.choice(roles)
    if rng.random() < 0.12:
        size = rng.randint(1, 4)
        which: Any = rng.choice(("generator", "rewarder", "learner"))
        return [Fault("scale", which, "", rng.uniform(0, expected_s), 0, size)]
    if rng.random() < 0.05:
        return [Fault("damage", "driver", "checkpoint", rng.randint(1, 3), 0, rng.random())]
    if rng.random() < 0.35:
        kind: Any = rng.choice(("die", "die", "hang", "slow", "fail" if role in ("generator", "rewarder") else "die"))
        when = rng.uniform(0, 4.0) if rng.random() < 0.2 else rng.uniform(0, 1.2 * expected_s)
        return [Fault(kind, role, "", when, rng.randrange(4), rng.uniform(1, 60) if kind in ("slow", "fail") else 0.0)]
    moment = _moment(rng, role, moving)
    call = moment.removesuffix(" done")
    kinds = ["die", "die", "hang", "wedge"]
    kinds += [] if call in ("progress", "inspect", "close") else ["slow", "fail"]
    if call in CORRUPT.get(role, ()) and rng.random() < 0.4:
        moment, kinds = call, ["corrupt"]
    elif call in LOSE.get(role, ()) and rng.random() < 0.25:
        moment, kinds = call, ["lose"]
    elif role == "rewarder" and call in ("score", "branch") and rng.random() < 0.25:
        moment, kinds = call, ["refuse"]
    kind = rng.choice(kinds)
    nth = rng.randint(1, 3) if moment in ("spawn", "load", "close") or rng.random() < 0.3 else rng.randint(1, 8)
    one = Fault(kind, role, moment, nth, 0, round(rng.uniform(1, 60), 1) if kind == "slow" else 0.0)
    return [replace(one, when=nth + i) for i in range(rng.choice((1, 1, 1, 1, 2, 4)))]


def _moment(rng: random.Random, role: str, moving: bool) -> str:
    unmoved = ("load", "update", "save") if role == "reference" and not moving else ()
    moment = rng.choice([m for m in MOMENTS[role] if m not in unmoved])
    return moment if moment == "spawn" or rng.random() < 0.5 else f"{moment} done"


def _ending(rng: random.Random, roles: Sequence[str], moving: bool, expected_s: float) -> Fault:
    """What ends a process before its time."""
    kind: Any = rng.choice(("kill", "kill", "kill", "stop", "interrupt"))
    choice = rng.random()
    if choice < 0.3:
        return Fault(kind, "driver", "", rng.uniform(0.1, expected_s))
    if choice < 0.4:
        return Fault("kill", "disk", "work", rng.randint(1, 60))
    if choice < 0.75:
        moment = rng.choice(("checkpoint", "checkpoint", "step", "gate"))
        return Fault(kind, "driver", moment, rng.randint(1, 2 if moment == "checkpoint" else 5))
    role: Any = rng.choice(roles)
    moment = _moment(rng, role, moving)
    return Fault(kind, role, moment, 1 if moment == "spawn" else rng.randint(1, 12))


def _damage(rng: random.Random) -> Damage:
    where: Any = rng.choice(("checkpoint", "checkpoint", "pending"))
    if where == "checkpoint":
        what: Any = rng.choice(DAMAGE)
    else:
        what = rng.choice(("flip", "truncate", "delete"))
    return Damage(what, where, rng.random())


def _expected_s(config: Config, timing: Timing, kind: str) -> float:
    rounds = {"chain": 2, "tree": 2}.get(kind, 1)
    sampling = 0.0 if timing.tokens_per_s is None else rounds * timing.lengths[1] / timing.tokens_per_s
    step = sampling + timing.score_s + timing.reference_s + timing.step_s + timing.publish_s
    return 1.0 + timing.spawn_s + config.run.steps * (step + timing.update_s * config.rollout.generators)
