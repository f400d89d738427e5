"""Thirty of the schedules that `make chaos` runs five hundred of; and that what is broken on purpose is seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rlsys.driver.books import Books
from rlsys.driver.gate import StalenessGate
from rlsys.driver.leases import Leases
from rlsys.driver.training import Training
from rlsys.driver.workers import WorkerPool
from rlsys.sim.chaos import run_schedule


@pytest.mark.parametrize("seed", range(30))
def test_every_invariant_holds_whatever_goes_wrong(seed: int) -> None:
    assert run_schedule(seed).violations == []


def _one_batch_more(old: Any) -> Any:
    return property(lambda gate: old.fget(gate) + gate.batch)


def _never(_: Any) -> Any:
    return lambda *arguments: None


async def _nothing_is_repeated(self: Training, learner: Any, version: int) -> None:
    learner.version = version


def _in_any_order(old: Callable[..., Any]) -> Any:
    return lambda books, step: old(books, step) if step % 2 else _reversed(old(books, step))


async def _reversed(batch: Any) -> Any:
    return list(reversed(await batch))


@pytest.mark.parametrize(
    ("where", "name", "broken", "seen"),
    [
        (StalenessGate, "limit", _one_batch_more, "too old|outstanding|slots|counts"),
        (Leases, "release", _never, "lease"),
        (Training, "_repeat", lambda _: _nothing_is_repeated, "state|undisturbed|batch"),
        (Books, "consumed", _in_any_order, "batch"),
        (WorkerPool, "_try_again", _never, "wait|end|day|deadlock|still|work"),
    ],
    ids=["the gate is too wide", "leases stay", "no step is repeated", "batches in another order", "work is forgotten"],
)
def test_what_is_broken_is_seen(
    monkeypatch: pytest.MonkeyPatch, where: type, name: str, broken: Callable[[Any], Any], seen: str
) -> None:
    monkeypatch.setattr(where, name, broken(getattr(where, name)))
    violations = next((found for seed in range(60) if (found := run_schedule(seed).violations)), [])
    assert violations, "nothing was seen"
    assert any(word in violations[0] for word in seen.split("|")), violations
