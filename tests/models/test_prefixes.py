"""Rows as prefix trees: by hand, and equal to the plain computation in log-probs, values and gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.models.loading import load_causal_lm
from rlsys.models.logprobs import PolicyModel, ValueModel
from rlsys.models.prefixes import forest, shared_order, split_shared, worth_sharing


def padded(rows: list[list[int]]) -> np.ndarray:
    width = max(map(len, rows))
    return np.array([row + [0] * (width - len(row)) for row in rows])


def test_forest_by_hand() -> None:
    """Two prompts; the rows of the first share [1, 2, 5], and one of them is the beginning of another."""
    rows = [[1, 2, 5, 6], [3, 4, 9], [1, 2, 5], [1, 2, 5, 7]]
    prompts = np.array([2, 2, 2, 2])
    found = forest(padded(rows), prompts, np.array([2, 1, 1, 2]))
    assert found.ids.tolist() == [[1, 2, 5, 6, 7], [3, 4, 9, 0, 0]]
    assert found.positions.tolist() == [[0, 1, 2, 3, 3], [0, 1, 2, 0, 0]]
    assert found.mask[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 0, 1],
    ]
    assert found.mask[1, 3:].sum() == 2, "padding sees itself alone"
    assert found.targets.tolist() == [5, 6, 7, 9]
    assert found.before.tolist() == [1, 2, 2, 6]
    assert found.index.tolist() == [0, 1, 3, 0, 0, 2], "tokens in order of rows"
    shared = shared_order(padded(rows), prompts, np.array([4, 3, 3, 4]))
    assert shared.order == [2, 0, 3, 1]
    assert shared.fresh == [3, 1, 1, 3]
    assert shared.starts == [True, False, False, True]


def sharing(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of a group, a chain of continuations, a tree; of two prompts each."""
    rng = np.random.default_rng(seed)
    rows, prompts = [], []
    for _ in range(2):
        prompt = rng.integers(2, 90, int(rng.integers(1, 9))).tolist()
        trunk = rng.integers(2, 90, 9).tolist()
        if kind == "group":
            made = [rng.integers(2, 90, int(rng.integers(1, 8))).tolist() for _ in range(4)]
        elif kind == "chain":
            made = [trunk, *(trunk[:cut] + rng.integers(2, 90, 3).tolist() for cut in (0, 3, 3, 6))]
        else:
            made = [
                first + second + rng.integers(2, 90, int(rng.integers(1, 4))).tolist()
                for first in ([5, 6], [7, 8, 9])
                for second in ([10], [11, 12])
                for _ in range(2)
            ]
        rows += [prompt + response for response in made]
        prompts += [len(prompt)] * len(made)
    order = rng.permutation(len(rows))
    rows, prompts = [rows[i] for i in order], [prompts[i] for i in order]
    responses = [len(row) - prompt for row, prompt in zip(rows, prompts, strict=True)]
    return torch.from_numpy(padded(rows)), torch.tensor(prompts), torch.tensor(responses)


@pytest.fixture(scope="module")
def model(tiny_model: Path):  # type: ignore[no-untyped-def]
    model = load_causal_lm(tiny_model, torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["group", "chain", "tree"])
def test_log_probs_and_gradients_are_those_of_plain_rows(model, kind: str, seed: int) -> None:  # type: ignore[no-untyped-def]
    ids, prompts, responses = sharing(kind, seed)
    policy = PolicyModel(model)
    width = int(responses.max())
    weight = torch.randn(len(ids), width, generator=torch.Generator().manual_seed(seed))

    def computed(packing):  # type: ignore[no-untyped-def]
        model.zero_grad()
        logprobs, entropies = policy(
            *(ids, prompts, responses), width=width, chunk=8, temperature=0.7, entropy=True, packing=packing
        )
        (logprobs * weight + 0.1 * entropies).sum().backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        return logprobs.detach(), entropies.detach(), gradient

    plain, shared = computed("padded"), computed("shared")
    torch.testing.assert_close(shared[0], plain[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared[1], plain[1], rtol=1e-5, atol=1e-5)
    assert (shared[2] - plain[2]).norm() <= 1e-5 * plain[2].norm()
    nodes = forest(ids.numpy(), prompts.numpy(), responses.numpy()).ids.size
    assert nodes < ids.numel(), "there was something to share"


def test_values_are_those_of_plain_rows(model) -> None:  # type: ignore[no-untyped-def]
    ids, prompts, responses = sharing("tree", 0)
    critic = ValueModel(model)
    torch.nn.init.normal_(critic.head.weight)
    plain, shared = (critic(ids, prompts, responses, width=8, packing=packing) for packing in ("padded", "shared"))
    torch.testing.assert_close(shared, plain, rtol=1e-5, atol=1e-5)


def test_sharing_is_worth_it_where_most_tokens_are_common() -> None:
    def order(common: int, own: int, rows: int = 8):  # type: ignore[no-untyped-def]
        whole = [[1] * common + [10 + i] * own for i in range(rows)]
        lengths = np.full(rows, common + own)
        return shared_order(padded(whole), np.full(rows, 1), lengths), lengths

    assert worth_sharing(*order(common=7, own=3), budget=4096), "(7 + 8 * 3) / 80 = 39%"
    assert not worth_sharing(*order(common=6, own=4), budget=4096), "(6 + 8 * 4) / 80 = 48%"
    assert not worth_sharing(*order(common=7, own=3), budget=32_768), "its mask would be too large"


ROWS = st.lists(
    st.tuples(st.integers(0, 2), st.lists(st.integers(0, 2), min_size=1, max_size=6)), min_size=1, max_size=12
)


@settings(deadline=None)
@given(rows=ROWS, ranks=st.integers(1, 3), budget=st.integers(1, 40))
def test_split(rows: list[tuple[int, list[int]]], ranks: int, budget: int) -> None:
    """Every row once; micro-batches of all ranks equal in number; within the budget where that is possible."""
    whole = [[50 + prompt, 7, *response] for prompt, response in rows]
    lengths = np.array([len(row) for row in whole])
    prompts = np.full(len(whole), 2)
    out = split_shared(shared_order(padded(whole), prompts, lengths), lengths.tolist(), ranks, budget)
    assert len(out) == ranks
    assert len({len(micro) for micro in out}) == 1
    assert sorted(row for share in out for micro in share for row in micro) == list(range(len(whole)))
    for share in out:
        for micro in share:
            if len(micro) > 1:
                part = [whole[i] for i in micro]
                found = forest(padded(part), np.full(len(part), 2), np.array([len(row) - 2 for row in part]))
                assert found.ids.size <= budget
    seen = [{whole[i][0] for micro in share for i in micro} for share in out]
    assert sum(map(len, seen)) == len({row[0] for row in whole}), "the rows of a prompt stay on one rank"


@settings(deadline=None)
@given(rows=ROWS)
def test_every_path_of_the_forest_is_its_row(rows: list[tuple[int, list[int]]]) -> None:
    whole = [[50 + prompt, 7, *response] for prompt, response in rows]
    responses = np.array([len(row) - 2 for row in whole])
    found = forest(padded(whole), np.full(len(whole), 2), responses)
    ends = np.cumsum(responses)
    width = found.ids.shape[1]
    for row, end, count in zip(whole, ends, responses, strict=True):
        places = found.index[end - count : end]
        assert found.targets[places].tolist() == row[2:]
        tree, node = divmod(int(found.before[places[-1]]), width)
        seen = found.mask[tree, node]
        order = np.argsort(found.positions[tree][seen])
        assert found.ids[tree][seen][order].tolist() == row[:-1], "it sees what stands before it, and nothing else"
