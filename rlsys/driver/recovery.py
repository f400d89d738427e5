"""Going on from the newest checkpoint: what is kept, and which prompts are drawn again."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlsys.driver.checkpoints import Checkpoint
from rlsys.ledger.ledger import Ledger
from rlsys.roles import RolloutStore, Scored
from rlsys.types import GroupInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the run goes on: `reuse` is complete and only has to be buffered again, `redraw` lists the indices to be
    drawn again (in order, before new ones), `next_index` is the first new one. `choices` says of each of the first two
    what was drawn."""

    version: int
    reuse: list[Scored]
    redraw: list[int]
    next_index: int
    choices: Mapping[int, Mapping[str, Any]]


def reusable(infos: Iterable[GroupInfo], version: int, batch: int, bound: int, room: int) -> list[GroupInfo]:
    """The buffered groups that a learner at `version` may still train on.

    None with a bound of 0: there a batch is sampled in one piece, and a resumed run repeats that exactly. Otherwise
    those that no later weights have touched, oldest first, as many as the buffer's invariant (I) allows:
    `outstanding(start <= s) <= (s + S + 1 - version) * B`, and at most `room` of them, which is what the run has left
    to train. Groups of one run always fit; the checks are for a run that is to end earlier than it was meant to, and
    for files that something else has left there.
    """
    if bound == 0:
        return []
    kept: list[GroupInfo] = []
    for info in sorted(infos, key=lambda info: (info.min_version, info.index)):
        limit = min(room, (info.min_version + bound + 1 - version) * batch)
        if info.max_version <= version and len(kept) < limit:
            kept.append(info)
    return kept


async def recover(
    checkpoint: Checkpoint | None,
    ledger: Ledger,
    store: RolloutStore,
    batch: int,
    bound: int,
    steps: int,
    defers: bool = False,
) -> Plan:
    """Bring ledger and store back to the checkpoint (to the start of the run when there is none).

    Where responses go on in later steps (`Strategy.defers`) nothing is reused: what has been begun since the
    checkpoint is not in its memory, and would not go on.
    """
    version, position = (checkpoint.manifest.version, checkpoint.manifest.position) if checkpoint else (0, 0)
    undone = ledger.roll_back(position)
    await store.roll_back(version)
    found = await store.load_buffered()
    outstanding = {prompt.id: prompt for prompt in ledger.outstanding()}

    known = (found[prompt_id].info for prompt_id in found if prompt_id in outstanding)
    reused = [] if defers else reusable(known, version, batch, bound, (steps - version) * batch)
    keep = {info.prompt_id for info in reused}
    settled = ledger.fate_of(i for i in found if i not in outstanding)
    for prompt_id, (state, reason, _) in settled.items():
        if state == "dropped":  # its group had not reached a final file
            await store.settled([prompt_id], f"dropped: {reason}", version)
    dropped = {prompt_id for prompt_id, (state, _, _) in settled.items() if state == "dropped"}
    await store.discard([prompt_id for prompt_id in found if prompt_id not in keep | dropped])

    for prompt_id, prompt in outstanding.items():
        if prompt.state == "buffered":
            ledger.unbuffered(prompt_id, "reused" if prompt_id in keep else "to be drawn again")
    plan = Plan(
        version=version,
        reuse=[found[prompt_id] for prompt_id in sorted(keep, key=lambda i: outstanding[i].index)],
        redraw=[prompt.index for prompt in outstanding.values() if prompt.id not in keep],
        next_index=ledger.next_index(),
        choices={prompt.index: prompt.choice for prompt in outstanding.values()},
    )
    if plan.next_index:
        ledger.note("resumed", version=version, undone=undone, reused=len(plan.reuse), redrawn=len(plan.redraw))
        logger.info(
            "resuming at step %d: %d fates undone, %d groups reused, %d prompts drawn again",
            *(version, undone, len(plan.reuse), len(plan.redraw)),
        )
    return plan
