"""Weights as one block of bytes: what goes in comes out, and a damaged block is noticed."""

from __future__ import annotations

import json
import multiprocessing

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlsys.errors import WeightUpdateError
from rlsys.weights.expected import ExpectedTensors
from rlsys.weights.publish import ALIGNMENT, pack, unpack, verify
from rlsys.weights.shared_memory import attach, shared

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]
SHAPES = st.lists(st.integers(1, 5), max_size=3)


@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=6), st.integers(0, 10**6))
def test_unpack_gives_back_what_was_packed(tensors: list[tuple[list[int], torch.dtype]], version: int) -> None:
    named = {
        f"layer.{i}": (torch.arange(int(np.prod(shape))) - 3).to(dtype).reshape(shape)
        for i, (shape, dtype) in enumerate(tensors)
    }
    payload, manifest = pack(named.items(), version)
    manifest = json.loads(json.dumps(manifest))  # it must survive as plain data

    assert payload.dtype == np.uint8
    assert manifest["version"] == version
    assert all(entry["offset"] % ALIGNMENT == 0 for entry in manifest["tensors"])
    verify(payload, manifest)
    found = unpack(payload, manifest)
    assert list(found) == list(named)
    for name, tensor in named.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_tensors_that_are_not_contiguous_are_packed_in_their_own_order() -> None:
    tensor = torch.arange(12, dtype=torch.float32).reshape(3, 4).t()
    payload, manifest = pack([("w", tensor)], 1)
    assert torch.equal(unpack(payload, manifest)["w"], tensor)


def test_a_name_that_comes_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="two tensors named 'w'"):
        pack([("w", torch.zeros(1)), ("w", torch.ones(1))], 1)


def packed() -> tuple[np.ndarray, dict]:
    return pack([("a", torch.arange(100.0)), ("b", torch.ones(2, 3))], 7)


@given(st.integers(0, 423), st.integers(0, 7))
def test_one_flipped_bit_is_noticed(byte: int, bit: int) -> None:
    payload, manifest = packed()
    payload[byte % payload.nbytes] ^= 1 << bit
    with pytest.raises(WeightUpdateError, match="version 7: checksum"):
        verify(payload, manifest)


@pytest.mark.parametrize("change", [{"name": "c"}, {"shape": [3, 2]}, {"dtype": "int32"}, {"offset": 0}])
def test_a_changed_table_is_noticed(change: dict) -> None:
    payload, manifest = packed()
    manifest["tensors"][1] |= change
    with pytest.raises(WeightUpdateError, match="checksum"):
        verify(payload, manifest)


def test_a_payload_of_another_size_is_noticed() -> None:
    payload, manifest = packed()
    with pytest.raises(WeightUpdateError, match="bytes came, the manifest says"):
        verify(payload[:-1], manifest)


def _sum(path: str, answers: multiprocessing.SimpleQueue) -> None:
    answers.put(int(attach(path).sum()))


def test_another_process_reads_shared_bytes_and_nothing_is_left() -> None:
    payload = np.arange(100_000, dtype=np.uint64).view(np.uint8)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    with shared(payload, "test") as path:
        child = context.Process(target=_sum, args=(path, answers))
        child.start()
        child.join(30)
        assert answers.get() == int(payload.sum())
    with pytest.raises(FileNotFoundError):
        attach(path)


def manifest_of(**shapes: list[int]) -> dict:
    return {"version": 3, "tensors": [{"name": name, "shape": shape} for name, shape in shapes.items()]}


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (manifest_of(a=[2, 3]), "lack 1 tensors, such as b"),
        (manifest_of(a=[2, 3], b=[4], z=[1]), "no tensor z"),
        (manifest_of(a=[3, 2], b=[4]), r"a has shape \[3, 2\], the model's is \[2, 3\]"),
        (manifest_of(a=[2, 3], b=[4], tied=[9]), r"tied has shape \[9\]"),
    ],
)
def test_a_manifest_of_another_model_is_refused(manifest: dict, message: str) -> None:
    expected = ExpectedTensors({"a": (2, 3), "b": (4,)}, {"tied": (2, 3)})
    with pytest.raises(WeightUpdateError, match=message):
        expected.check(manifest)


def test_a_tied_tensor_may_come_or_not(tiny_model: object) -> None:
    expected = ExpectedTensors.of(str(tiny_model))
    assert set(expected.optional) == {"lm_head.weight"}
    shapes = {name: list(shape) for name, shape in expected.required.items()}
    expected.check(manifest_of(**shapes))
    expected.check(manifest_of(**shapes, **{"lm_head.weight": shapes["model.embed_tokens.weight"]}))
