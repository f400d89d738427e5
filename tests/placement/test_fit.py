"""Workers on nodes: laws for any cluster, and what is said of clusters that are too small or oddly shaped."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlsys.errors import ConfigError
from rlsys.placement.fit import Placement, fit
from rlsys.placement.needs import Need, Strategy, worker_names
from rlsys.placement.nodes import GIB, Node, read_nodes


def need(
    role: str, count: int, strategy: Strategy = "spread", labels: dict[str, str] | None = None, **takes: float
) -> Need:
    return Need(role, worker_names(role, count), takes, labels or {}, strategy)


def node(name: str, labels: dict[str, str] | None = None, **has: float) -> Node:
    return Node(name, has, has, labels or {})


def nodes(count: int, labels: dict[str, str] | None = None, **has: float) -> list[Node]:
    return [node(f"node-{i}", labels, **has) for i in range(count)]


def check(placement: Placement) -> None:
    """Nothing is taken twice, and everybody is where they may be."""
    for index, there in enumerate(placement.nodes):
        taken: Counter[str] = Counter()
        for asked in placement.needs:
            here = [worker for worker in asked.workers if placement.places.get(worker) == index]
            assert not here or there.has(asked.labels)
            for name, amount in asked.resources.items():
                taken[name] += amount * len(here)
        assert all(amount <= there.free.get(name, 0) for name, amount in taken.items())
    for asked in placement.needs:
        used = [placement.places[worker] for worker in asked.workers if worker in placement.places]
        assert asked.strategy != "strict_pack" or len(set(used)) <= 1
        assert asked.strategy != "strict_spread" or len(set(used)) == len(used)
    everybody = {worker for asked in placement.needs for worker in asked.workers}
    assert (placement.places.keys() == everybody) == (not placement.missing)
    assert placement.places.keys() <= everybody


amounts = st.integers(0, 4).map(float)


@st.composite
def some_needs(draw: st.DrawFn) -> list[Need]:
    found = []
    for role in draw(st.permutations(["learner", "generator", "rewarder"])):
        strategy = draw(st.sampled_from(["pack", "spread", "strict_pack", "strict_spread"]))
        labels = draw(st.sampled_from([{}, {"pool": "a"}, {"pool": "!a"}, {"pool": "in(a,b)"}]))
        takes = {"CPU": 1.0 + draw(amounts), "GPU": draw(amounts)}
        found.append(need(role, draw(st.integers(1, 5)), strategy, labels, **{k: v for k, v in takes.items() if v}))
    return found


some_nodes = st.lists(
    st.builds(
        lambda cpus, gpus, pool: node("some", {"pool": pool} if pool else {}, CPU=2 * cpus, GPU=gpus),
        *(amounts, amounts, st.sampled_from(["a", "b", ""])),
    ),
    max_size=6,
)


@given(some_needs(), some_nodes)
def test_nothing_is_taken_twice_and_who_has_no_place_is_told_why(needs: list[Need], there: list[Node]) -> None:
    check(fit(needs, there))


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 8))
def test_of_equal_workers_as_many_are_placed_as_fit(count: int, of: int, gpus: int) -> None:
    placement = fit([need("generator", count, GPU=gpus)], nodes(of, GPU=8.0))
    assert len(placement.places) == min(count, of * (8 // gpus))


def test_spread_and_pack() -> None:
    there = nodes(4, CPU=8.0)
    spread = fit([need("generator", 8, CPU=2.0)], there)
    assert Counter(spread.places.values()) == {0: 2, 1: 2, 2: 2, 3: 2}
    packed = fit([need("learner", 4, "pack", CPU=2.0)], there)
    assert set(packed.places.values()) == {0}
    roomy = fit([need("learner", 4, "pack", CPU=2.0)], [node("small", CPU=2.0), *nodes(2, CPU=8.0)])
    assert set(roomy.places.values()) == {1}, "first where all of them are together"


def test_workers_without_gpus_keep_off_nodes_that_have_some() -> None:
    there = [node("gpu", CPU=64.0, GPU=8.0), node("cpu", CPU=4.0)]
    placement = fit([need("rewarder", 5, CPU=1.0)], there)
    assert Counter(placement.places.values()) == {1: 4, 0: 1} or Counter(placement.places.values()) == {1: 3, 0: 2}
    assert fit([need("rewarder", 1, CPU=1.0)], there).places == {"rewarder-0": 1}


def test_large_pieces_are_kept_for_large_workers() -> None:
    """Whole nodes for tensor-parallel generators; ranks of one GPU each go where a node is begun already."""
    needs = [need("learner", 4, "pack", GPU=1.0, CPU=1.0), need("generator", 2, GPU=8.0, CPU=1.0)]
    placement = fit(needs, nodes(3, GPU=8.0, CPU=32.0))
    check(placement)
    assert not placement.missing


def test_64_generators_and_8_ranks_on_a_described_cluster(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "nodes:\n"
        "  - {name: gpu, count: 33, cpus: 96, gpus: 8, memory_gib: 1000, labels: {pool: gpu}}\n"
        "  - {name: cpu, count: 4, cpus: 64, memory_gib: 256, labels: {pool: cpu}}\n"
    )
    needs = [
        need("generator", 64, CPU=8.0, GPU=4.0),
        need("learner", 8, "strict_pack", CPU=8.0, GPU=1.0),
        need("reference", 1, CPU=4.0),
        need("rewarder", 128, labels={"pool": "cpu"}, CPU=1.0, memory=1.0 * GIB),
    ]
    there = read_nodes(file)
    assert len(there) == 37
    placement = fit(needs, there)
    check(placement)
    assert not placement.missing
    used = {
        role: {placement.places[w] for n in needs if n.role == role for w in n.workers}
        for role in ("learner", "generator")
    }
    assert len(used["learner"]) == 1
    assert len(used["generator"]) == 32
    assert not used["learner"] & used["generator"]
    assert {there[placement.places[f"rewarder-{i}"]].labels["pool"] for i in range(128)} == {"cpu"}


# Too small, or oddly shaped: (needs, nodes, what is said)
MISFITS = {
    "too few GPUs": (
        [need("generator", 64, CPU=4.0, GPU=4.0)],
        nodes(30, CPU=64.0, GPU=8.0),
        r"generator: 60 of 64 workers .* takes 4 CPUs, 4 GPUs\. 16 more GPUs are needed: of 240, 0 are left",
    ),
    "GPUs in pieces": (
        [need("generator", 2, CPU=1.0, GPU=4.0)],
        nodes(4, CPU=8.0, GPU=2.0),
        r"No node is large enough for one: the largest has 2 GPUs\.",
    ),
    "GPUs in the hands of the ranks": (
        [need("learner", 4, "strict_spread", CPU=1.0, GPU=5.0), need("generator", 2, CPU=1.0, GPU=4.0)],
        nodes(4, CPU=8.0, GPU=8.0),
        r"generator: 0 of 2 .*What is left is in pieces that are too small \(node-0: 7 CPUs, 3 GPUs; ",
    ),
    "no such label": (
        [need("rewarder", 2, labels={"pool": "cpu"}, CPU=1.0)],
        nodes(2, {"pool": "gpu"}, CPU=8.0),
        r"of a node with pool=cpu\. No node has these labels \(there are: pool=gpu\)",
    ),
    "no such resource": (
        [need("rewarder", 1, CPU=1.0, sandbox=1.0)],
        nodes(2, CPU=8.0),
        r"No node has any of 'sandbox'",
    ),
    "no GPU at all": ([need("reference", 1, GPU=1.0)], nodes(2, CPU=8.0), r"reference: 0 of 1 .*No node has any GPUs"),
    "more ranks than nodes": (
        [need("learner", 4, "strict_spread", GPU=1.0)],
        nodes(3, GPU=8.0),
        r"strict_spread puts each on a node of its own, and there are 3 nodes",
    ),
    "ranks that do not fit on one node": (
        [need("learner", 16, "strict_pack", GPU=1.0)],
        nodes(4, GPU=8.0),
        r"strict_pack puts all of them on one node; the best has room for 8",
    ),
    "CPUs on one node and GPUs on another": (
        [need("generator", 1, CPU=16.0, GPU=1.0)],
        [node("a", CPU=64.0), node("b", CPU=2.0, GPU=8.0)],
        r"No single node has all of that; the largest parts are 64 CPUs, 8 GPUs",
    ),
    "memory": (
        [need("rewarder", 4, memory=8.0 * GIB)],
        nodes(1, memory=16.0 * GIB),
        r"rewarder: 2 of 4 .*16 more GiB of memory are needed: of 16, 0 are left",
    ),
    "taken by another run": (
        [need("learner", 2, "pack", GPU=1.0)],
        [Node("busy", {"GPU": 8.0}, {"GPU": 1.0})],
        r"learner: 1 of 2 .*1 more GPUs are needed: of 8, 0 are left",
    ),
    "no node": ([need("learner", 1, CPU=1.0)], [], r"No node has"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_what_does_not_fit_is_told_with_what_is_missing(name: str) -> None:
    needs, there, said = MISFITS[name]
    placement = fit(needs, there)
    check(placement)
    assert any(re.search(said, line) for line in placement.missing), placement.missing


@pytest.mark.parametrize(
    ("selector", "value", "selected"),
    [
        *(("a", "a", True), ("a", "b", False), ("a", None, False)),
        *(("!a", "a", False), ("!a", "b", True), ("!a", None, True)),
        *(("in(a, b)", "b", True), ("in(a,b)", "c", False), ("!in(a,b)", "b", False), ("!in(a,b)", "c", True)),
    ],
)
def test_labels_are_selected_as_ray_does(selector: str, value: str | None, selected: bool) -> None:
    there = node("some", {} if value is None else {"key": value})
    assert there.has({"key": selector}) == selected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: []", "nodes: List should have at least 1 item"),
        ("nodes: [{name: a, cpus: 1}]", "nodes.0.memory_gib: Field required"),
        ("nodes: [{name: a, cpus: -1, memory_gib: 1}]", "nodes.0.cpus"),
        ("nodes: [{name: a, cpus: 1, memory_gib: 1, gpu: 1}]", "nodes.0.gpu: Extra inputs"),
        ("- a\n- b", "the file: Input should be"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_a_description_that_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_nodes(file)
    assert str(file) in str(caught.value)


def test_a_selector_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="no selector"):
        node("a", {"key": "b"}).has({"key": "in(a"})


# ---- workers that have a place already ------------------------------------------------------------------------------


@given(some_needs(), some_nodes, st.data())
def test_places_made_one_after_the_other_are_places(needs: list[Need], there: list[Node], data: st.DataObject) -> None:
    """Some workers of every role first, then the others: nothing is taken twice, and strategies hold for all."""
    parts = {asked.role: data.draw(st.integers(0, len(asked.workers))) for asked in needs}
    first = fit([replace(asked, workers=asked.workers[: parts[asked.role]]) for asked in needs], there)
    rest = fit(needs, first.remaining(), first.places)
    assert not rest.places.keys() & first.places.keys()
    whole = {**first.places, **rest.places}
    check(Placement(there, needs, whole, rest.missing))


def test_who_joins_keeps_the_strategy_of_those_who_are_there() -> None:
    there = nodes(2, CPU=4.0)

    def joins(strategy: Strategy, **free: float) -> Placement:
        left = [replace(n, free={"CPU": free[n.name.replace("-", "_")]}) for n in there]
        return fit([need("learner", 2, strategy, CPU=2.0)], left, {"learner-0": 0})

    assert joins("spread", node_0=2.0, node_1=4.0).places == {"learner-1": 1}
    assert joins("spread", node_0=2.0, node_1=0.0).places == {"learner-1": 0}
    assert joins("pack", node_0=2.0, node_1=4.0).places == {"learner-1": 0}
    assert joins("pack", node_0=0.0, node_1=4.0).places == {"learner-1": 1}
    assert joins("strict_pack", node_0=2.0, node_1=4.0).places == {"learner-1": 0}
    assert "1 of 2 workers have a place" in joins("strict_pack", node_0=0.0, node_1=4.0).missing[0]
    assert "1 of 2 workers have a place" in joins("strict_spread", node_0=2.0, node_1=0.0).missing[0]


def test_one_whose_node_nobody_knows_is_not_placed_again() -> None:
    placement = fit([need("generator", 2, CPU=2.0)], nodes(1, CPU=2.0), {"generator-0": None})
    assert placement.places == {"generator-1": 0}
