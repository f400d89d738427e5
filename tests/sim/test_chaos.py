"""Thirty of the schedules that `make chaos` runs five hundred of, six of them with the fast tests; and that what is
broken on purpose is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlsys.driver.books import Books
from rlsys.driver.gate import StalenessGate
from rlsys.driver.leases import Leases
from rlsys.driver.training import Training
from rlsys.driver.workers import WorkerPool
from rlsys.ledger.ledger import Ledger
from rlsys.sim.chaos import run_schedule


@pytest.mark.parametrize("seed", [pytest.param(i, marks=pytest.mark.slow if i >= 6 else ()) for i in range(30)])
def test_every_invariant_holds_whatever_goes_wrong(seed: int) -> None:
    assert run_schedule(seed).violations == []


def _one_batch_more(old: Any) -> Any:
    return property(lambda gate: old.fget(gate) + gate.batch)


def _never(_: Any) -> Any:
    return lambda *arguments: None


async def _nothing_is_repeated(self: Training, learner: Any, version: int) -> None:
    learner._worker.version = version


def _in_any_order(old: Callable[..., Any]) -> Any:
    return lambda books, step: old(books, step) if step % 2 else _reversed(old(books, step))


async def _reversed(batch: Any) -> Any:
    return list(reversed(await batch))


@pytest.mark.parametrize(
    ("where", "name", "broken", "seen", "first"),
    [
        (StalenessGate, "limit", _one_batch_more, "nothing_can_become_too_old", 1),
        (StalenessGate, "drop", _never, "the_gate_counts_what_is_started", 1),
        (Leases, "release", _never, "every_lease_has_its_work", 1),
        (Training, "_repeat", lambda _: _nothing_is_repeated, "with_a_bound_of_0_nothing_has_changed", 5),
        (Books, "consumed", _in_any_order, "a_repeated_step_has_the_same_batch", 7),
        (Ledger, "buffered", _never, "the_books_agree", 1),
        (WorkerPool, "_try_again", _never, "no_wait_without_end", 9),
    ],
    ids=[
        *("the gate is too wide", "slots are not given back", "leases stay", "no step is repeated"),
        *("batches in another order", "the ledger does not hear of groups", "work is forgotten"),
    ],
)
def test_what_is_broken_is_seen(
    monkeypatch: pytest.MonkeyPatch, where: type, name: str, broken: Callable[[Any], Any], seen: str, first: int
) -> None:
    """By the invariant that is there for it. (`first` is a seed that shows it, so that the search is short.)"""
    monkeypatch.setattr(where, name, broken(getattr(where, name)))
    violations = next((found for seed in range(first, 60) if (found := run_schedule(seed).violations)), [])
    assert any(seen in text for text in violations), violations or "nothing was seen"
