"""Laws of the driver's pure state machines, over random schedules."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.driver.buffer import GroupBuffer
from rlsys.driver.gate import StalenessGate
from rlsys.driver.leases import Leases
from rlsys.driver.router import Router


@given(batch=st.integers(1, 5), bound=st.integers(0, 3), total=st.integers(1, 60), seed=st.integers(0, 2**32))
def test_gate_keeps_to_its_limit(batch: int, bound: int, total: int, seed: int) -> None:
    rng = random.Random(seed)
    gate = StalenessGate(batch, bound, total)
    started = dropped = version = 0
    for _ in range(60):
        action = rng.choice(["start", "drop", "advance"])
        if action == "start":
            slots = min((version + bound + 1) * batch, total) - (started - dropped)
            assert gate.open_slots() == max(0, slots)
            if slots > 0:
                take = rng.randint(1, slots)
                gate.start(take)
                started += take
            with pytest.raises(ValueError, match="slots are open"):
                gate.start(gate.open_slots() + 1)
        elif action == "drop" and started > dropped:
            gate.drop()
            dropped += 1
        elif action == "advance":
            seen = rng.randint(max(0, version - 1), version + 1)
            gate.advance(seen)
            version = max(version, seen)


@settings(max_examples=200)
@given(
    batch=st.integers(1, 4),
    bound=st.integers(0, 3),
    generators=st.integers(1, 3),
    drop_rate=st.sampled_from([0.0, 0.2, 0.6]),
    skew=st.sampled_from([0.0, 0.9]),
    seed=st.integers(0, 2**32),
)
def test_oldest_first_never_exceeds_the_bound_and_never_sticks(
    batch: int, bound: int, generators: int, drop_rate: float, skew: float, seed: int
) -> None:
    """Random completion order (with some groups always last), drops, and generators that pull weights late."""
    rng = random.Random(seed)
    steps = 8
    gate = StalenessGate(batch, bound, total=steps * batch)
    buffer: GroupBuffer[int] = GroupBuffer(batch, bound)
    pulled = [0] * generators
    learner = next_index = 0
    under_way: dict[int, int] = {}  # index -> the version that samples it, known to this test only
    slow: set[int] = set()
    ages: list[int] = []
    for _ in range(20_000):
        if learner == steps:
            break
        moves = []
        if gate.open_slots():
            moves.append("start")
        if set(under_way) - slow or (under_way and not buffer.ready(learner)):
            moves.append("finish")
        if buffer.ready(learner):
            moves.append("take")
        if min(pulled) < learner:
            moves.append("pull")
        assert moves, "nothing can move: stuck"
        move = rng.choice(moves)
        if move == "start":
            gate.start()
            buffer.start(next_index, gate.version)
            under_way[next_index] = rng.choice(pulled)
            if rng.random() < skew:
                slow.add(next_index)
            next_index += 1
        elif move == "finish":
            index = rng.choice(sorted(set(under_way) - slow) or sorted(under_way))
            version = under_way.pop(index)
            if rng.random() < drop_rate:
                buffer.drop(index)
                gate.drop()
            else:
                buffer.finish(index, version, index)
        elif move == "take":
            assert buffer.expire(learner) == []
            taken = buffer.take(learner)
            assert len(taken) == batch
            keys = [(entry.version, entry.index) for entry in taken]
            assert keys == sorted(keys)
            ages += [learner - entry.version for entry in taken]
            learner += 1
        else:
            late = rng.choice([i for i, version in enumerate(pulled) if version < learner])
            pulled[late] = learner
            gate.advance(min(pulled))
    assert learner == steps
    assert max(ages) <= bound


def test_buffer_waits_for_a_straggler_that_would_become_too_old() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(batch=1, bound=1)
    buffer.start(0, version=0)
    buffer.start(1, version=0)
    buffer.finish(1, 0, "b")
    assert buffer.ready(0)  # group 0 still fits into the next batch
    assert [entry.item for entry in buffer.take(0)] == ["b"]
    buffer.start(2, version=1)
    buffer.finish(2, 1, "c")
    assert not buffer.ready(1)  # group 0 has to be in this one
    buffer.finish(0, 0, "a")
    assert [entry.item for entry in buffer.take(1)] == ["a"]


def test_buffer_gives_up_what_is_too_old() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(batch=1, bound=0)
    buffer.start(0, version=0)
    buffer.finish(0, 0, "old")
    assert [entry.item for entry in buffer.expire(1)] == ["old"]
    assert buffer.finished == 0


@given(order=st.permutations(range(6)))
def test_synchronous_batches_are_sorted_by_index(order: list[int]) -> None:
    buffer: GroupBuffer[int] = GroupBuffer(batch=6, bound=0)
    for index in range(6):
        buffer.start(index, version=0)
    for index in order:
        assert not buffer.ready(0)
        buffer.finish(index, 0, index)
    assert [entry.item for entry in buffer.take(0)] == list(range(6))


@given(capacity=st.one_of(st.none(), st.integers(1, 3)), seed=st.integers(0, 2**32))
def test_router_uses_ready_workers_only_least_loaded_first(capacity: int | None, seed: int) -> None:
    rng = random.Random(seed)
    router = Router(capacity, backoff=1.0, longest=8.0)
    names = ["a", "b", "c"]
    load: dict[str, int] = {}
    failures: dict[str, int] = {}
    rest_until: dict[str, float] = {}
    now = 0.0
    for _ in range(80):
        now += rng.choice([0.0, 0.3, 5.0])
        move = rng.choice(["choose", "choose", "done", "fail", "die", "join"])
        busy = [name for name in load if load[name]]
        if move == "choose":
            ready = [n for n in load if rest_until[n] <= now and (capacity is None or load[n] < capacity)]
            chosen = router.choose(now)
            assert chosen == (min(ready, key=lambda n: (load[n], n)) if ready else None)
            if chosen:
                load[chosen] += 1
        elif move == "done" and busy:
            name = rng.choice(busy)
            router.done(name)
            load[name] -= 1
            failures[name], rest_until[name] = 0, now
        elif move == "fail" and busy:
            name = rng.choice(busy)
            router.failed(name, now)
            load[name] -= 1
            failures[name] += 1
            rest_until[name] = now + min(8.0, [1.0, 2.0, 4.0, 8.0][min(failures[name], 4) - 1])
        elif move == "die" and load:
            name = rng.choice(sorted(load))
            router.died(name)
            del load[name]
        elif move == "join" and len(load) < len(names):
            name = next(n for n in names if n not in load)
            router.joined(name)
            load[name], failures[name], rest_until[name] = 0, 0, now
    assert router.workers == tuple(sorted(load))


@given(seed=st.integers(0, 2**32))
def test_leases_expire_exactly_when_progress_stands_still_under_work(seed: int) -> None:
    rng = random.Random(seed)
    leases = Leases(patience=3.0)
    now, number = 0.0, 0
    held: set[str] = set()
    since = 0.0
    for piece in range(60):
        now += rng.choice([0.0, 1.0, 2.5])
        move = rng.choice(["grant", "release", "move", "still"])
        if move == "grant":
            if not held:
                since = now
            leases.grant("w", str(piece), now)
            held.add(str(piece))
        elif move == "release" and held:
            work = rng.choice(sorted(held))
            leases.release(work)
            held.discard(work)
        elif move == "move":
            number += 1
            assert leases.progress("w", number, now)
            since = now
        elif number:
            assert not leases.progress("w", number, now)
        assert leases.expired(now) == (["w"] if held and now - since >= 3.0 else [])
    assert leases.revoke("w") == sorted(held)
    assert leases.expired(now + 100) == []


def test_a_held_lease_does_not_expire() -> None:
    leases = Leases(patience=1.0)
    leases.grant("w", "x", 0.0)
    leases.hold("w")
    assert leases.expired(50.0) == []
    leases.resume("w", 50.0)
    assert leases.expired(50.5) == []
    assert leases.expired(51.0) == ["w"]


def test_work_is_lent_once() -> None:
    leases = Leases(patience=1.0)
    leases.grant("a", "x", 0.0)
    with pytest.raises(ValueError, match="lent to a"):
        leases.grant("b", "x", 0.0)
