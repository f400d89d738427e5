"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rlsys.roles import SampleRow
from rlsys.trackers import TrackerError
from rlsys.trackers.tensorboard import TensorboardTracker


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """Three steps, then resumed after the second."""
    pytest.importorskip("tensorboard")
    tracker = TensorboardTracker(tmp_path)
    tracker.log_eval(0, {"accuracy": 0.25}, [0.0, 0.0, 0.0, 1.0])
    for step in (1, 2, 3):
        tracker.log_step(step, {"reward/mean": step / 8})
    tracker.log_samples(2, [SampleRow(2, "sums/1@0", "1+1=", "2\nso 2", "2", 1.0, "1", "stop")])
    tracker.finish({})
    again = TensorboardTracker(tmp_path)
    again.resumed(2)
    again.log_step(3, {"reward/mean": 0.5})
    again.finish({})
    return tmp_path


def reader(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(directory / "tensorboard"))
    found.Reload()
    return found


def test_names_and_steps(run_directory: Path) -> None:
    found = reader(run_directory)
    assert [(e.step, e.value) for e in found.Scalars("eval/accuracy")] == [(0, 0.25)]
    [scores] = found.Histograms("eval/scores")
    assert (scores.step, scores.histogram_value.num) == (0, 4)
    [text] = found.Tensors("samples/0/text_summary")
    assert b"    1+1=2\n    so 2" in text.tensor_proto.string_val[0]


def test_steps_done_again_replace_their_earlier_values(run_directory: Path) -> None:
    assert [(e.step, e.value) for e in reader(run_directory).Scalars("reward/mean")] == [
        (1, 0.125),
        (2, 0.25),
        (3, 0.5),
    ]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TrackerError, match="needs the package tensorboard"):
        TensorboardTracker(tmp_path)
