"""How many workers a run has while it goes on, and of what shape its learner is.

    rlsys scale ──┬─> is there room? ──> RUN/sizes.json ──> pools grow and drain at once, the learner between two steps
    autoscaler ───┘         └──> refused, and nothing changes

Room is looked for before anything is changed. Where somebody else takes it meanwhile, the run goes on with what it has:
a worker that has no place is given up, the learner goes back to the shape that it had.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rlsys.config.models import AutoscaleConfig, Config, Sizes
from rlsys.config.sizes import KEYS, keep_sizes, resized
from rlsys.driver.autoscale import Autoscaler, Role
from rlsys.driver.bottleneck import STAGES
from rlsys.driver.generators import GeneratorPool
from rlsys.driver.incidents import Incidents
from rlsys.driver.rewarders import RewarderPool
from rlsys.driver.training import Training
from rlsys.errors import ConfigError, PlacementError

_ROLES: Mapping[str, Role] = {"generator": "generators", "rewarder": "reward_workers"}


class Scaling:
    """`check_room` is that of the roles; `changed` is called when sizes have been changed."""

    def __init__(
        self,
        generators: GeneratorPool,
        rewarders: RewarderPool,
        training: Training,
        incidents: Incidents,
        check_room: Callable[[Config], None],
        run_dir: Path,
        changed: Callable[[], None],
        autoscale: AutoscaleConfig | None,
    ) -> None:
        self._autoscaler = None if autoscale is None else Autoscaler(autoscale)
        self._generators = generators
        self._rewarders = rewarders
        self._training = training
        self._incidents = incidents
        self._check_room = check_room
        self._run_dir = run_dir
        self._changed = changed
        incidents.events.unplaced = self._unplaced

    @property
    def sizes(self) -> Sizes:
        """As they are to be: the roles may still be on their way there."""
        learner = (self._training.pending or self._training.config).learner
        return Sizes(
            generators=self._generators.size,
            reward_workers=self._rewarders.size,
            learner_ranks=learner.ranks,
            zero_stage=learner.zero_stage,
        )

    def scale(self, asked: Sizes, why: str = "rlsys scale") -> list[str]:
        """Begin to have so many workers, and a learner of such a shape; returns what is changed.

        New workers get the newest weights before they get work, leaving ones finish what they have. The learner is
        started anew from a checkpoint, between two steps. Raises PlacementError where there is no room, ConfigError for
        what cannot work; nothing is changed then.
        """
        if not self._generators.size:
            raise ConfigError("the run is still starting: ask again when `rlsys status` has it running")
        before = self.sizes
        after = before.model_copy(update=asked.model_dump(exclude_none=True))
        pairs = [(KEYS[name], getattr(before, name), getattr(after, name)) for name in KEYS]
        said = [f"{key}: {old} -> {new}" for key, old, new in pairs if old != new]
        if not said:
            return []
        shape = resized(self._training.config, after)
        self._check_room(shape)
        keep_sizes(self._run_dir, after)
        for pool, count in ((self._generators, after.generators), (self._rewarders, after.reward_workers)):
            if count is not None and count != pool.size:
                pool.resize(count)
        self._training.pending = shape if shape.learner != self._training.config.learner else None
        if self._autoscaler is not None:
            self._autoscaler.changed()
        self._incidents.scaled(said, why)
        self._changed()
        return said

    def step(self, record: Mapping[str, float]) -> None:
        """A step was taken, with these figures: the autoscaler may want other sizes."""
        scaler = self._autoscaler
        if scaler is None:
            return
        shares = {stage: record[f"bound/{stage}"] for stage in STAGES if f"bound/{stage}" in record}
        sizes: dict[Role, int] = {"generators": self._generators.size, "reward_workers": self._rewarders.size}
        wish = scaler.step(
            record["time/step_s"], shares, sizes, settled=self._generators.settled and self._rewarders.settled
        )
        if wish is None:
            return
        try:
            self.scale(Sizes.model_validate({wish.role: wish.size}), wish.why)
        except (PlacementError, ConfigError) as error:
            scaler.refused(wish.role)
            self._incidents.no_room(f"{wish.size} {wish.role} ({wish.why})", error)
        else:
            scaler.granted(wish, sizes[wish.role])

    def figures(self) -> dict[str, float]:
        """The sizes, as metrics."""
        return {
            "scale/generators": float(self._generators.size),
            "scale/reward_workers": float(self._rewarders.size),
            "scale/learner_ranks": float(self._training.config.learner.ranks),
        }

    def _unplaced(self, worker: str, error: PlacementError) -> None:
        """Somebody else was faster."""
        self._incidents.no_room(worker, error)
        if self._autoscaler is not None and (role := _ROLES.get(worker.partition("-")[0])):
            self._autoscaler.refused(role)
        keep_sizes(self._run_dir, self.sizes)
