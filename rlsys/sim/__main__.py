"""`python -m rlsys.sim`: the driver's own cost per rollout, over roles that take no time."""

from __future__ import annotations

import argparse

from rlsys.sim.drive import drive


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rlsys.sim", description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts-per-step", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--generators", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    for on_disk in (False, True):
        cost = drive(**vars(options), on_disk=on_disk)
        where = "rollouts on disk" if on_disk else "rollouts in memory"
        print(
            f"{where}: {cost.per_rollout_us:.0f} us per rollout ({cost.cpu_per_rollout_us:.0f} us of CPU time), "
            f"{cost.per_step_ms:.1f} ms per step"
        )


if __name__ == "__main__":
    main()
