"""Log-probs that are not the learner's: who is to blame, with the figures of both."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from rlsys.errors import EngineError, ModelMismatchError, UserError, WeightUpdateError
from rlsys.roles import Probe, PublishedWeights
from rlsys.rollouts.probe import check_probe

CHECKED = {"version": 4, "checksum": "xxh3_64:9f", "tensors": [{}, {}, {}]}
PROBE = Probe((7, 8, 9, 10), (-1.0, -2.0, -3.0))
FOUND = np.array([-1.001, -2.021, -3.002])  # apart by 0.001, 0.021, 0.002: 0.008 on average


def check(found: np.ndarray = FOUND, manifest: Any = CHECKED, dtype: str = "float32", agreed: bool = False) -> float:
    weights = PublishedWeights(4, manifest, None, PROBE)
    return check_probe("generator-0", "vLLM 1.2, SomeForCausalLM", weights, found, dtype, agreed)


def test_within_the_tolerance_the_largest_difference_is_the_answer() -> None:
    assert check(np.array([-1.0, -2.0005, -3.0])) == pytest.approx(0.0005)
    assert check(dtype="bfloat16") == pytest.approx(0.021)


def test_the_first_weights_that_arrive_whole_and_are_computed_differently_tell_of_two_implementations() -> None:
    with pytest.raises(ModelMismatchError) as caught:
        check()
    error = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(error, UserError)
    assert not isinstance(error, EngineError)  # which would be restarted
    assert error.kind == "probe"
    said = str(error)
    assert said.startswith("generator-0: version 4 arrived as it was sent (xxh3_64:9f, all 3 tensors)")
    assert "by up to 2.10e-02 (8.00e-03 on average; 0.001 is allowed in float32)" in said
    assert "token 2 of 4, id 9: -2 at the learner, -2.021 here" in said
    assert "vLLM 1.2, SomeForCausalLM" in said
    assert "model.dtype" not in said  # which is float32 already
    with pytest.raises(ModelMismatchError, match=r"Try model\.dtype: float32"):
        check(FOUND * 2, dtype="bfloat16")


def test_after_they_have_agreed_the_weights_are_to_blame() -> None:
    with pytest.raises(WeightUpdateError, match=r"by up to 2.10e-02 .* the weights did not arrive") as caught:
        check(agreed=True)
    assert caught.value.kind == "probe"


def test_without_a_checksum_nobody_knows_whether_they_arrived() -> None:
    with pytest.raises(WeightUpdateError, match="the weights did not arrive"):
        check(manifest={"version": 4, "tensors": []})


def test_a_number_that_is_none_is_the_worst() -> None:
    with pytest.raises(ModelMismatchError, match=r"by up to nan .*token 3 of 4, id 10: -3 at the learner, nan here"):
        check(np.array([-1.0, -2.5, np.nan]))
