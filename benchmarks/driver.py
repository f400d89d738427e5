"""The driver's own cost per rollout, with roles that take no time."""

from __future__ import annotations

import statistics

from benchmarks.common import Result, seconds, tiny_model
from benchmarks.learner import groups, start_rank
from rlsys.sim.drive import drive


def run(rounds: int, count: int = 64, samples: int = 8) -> Result:
    """CPU time of the loop in memory and with rollouts on disk, and its share of a learner step of the same size."""
    model = tiny_model()
    made = groups(model, count, samples)
    rank = start_rank(model)
    try:
        rank.step(made)
        step_s = statistics.median(seconds(lambda: rank.step(made)) for _ in range(rounds))
    finally:
        rank.close()
    figures: dict[str, float] = {"learner_step_s": step_s}
    rows = []
    for on_disk, where in ((False, "in memory"), (True, "rollouts on disk")):
        costs = [drive(10, count, samples, on_disk=on_disk) for _ in range(rounds)]
        cpu_us = statistics.median(cost.cpu_per_rollout_us for cost in costs)
        share = cpu_us * count * samples / 1e6 / step_s
        figures |= {f"cpu_us_per_rollout, {where}": cpu_us, f"share of a learner step, {where}": share}
        rows.append((where, f"{cpu_us:.0f} us per rollout", f"{share:.1%} of a learner step of the tiny model"))
    return Result("driver", f"Driver: CPU time per rollout, {count} x {samples} rollouts a step", tuple(rows), figures)
