"""The order of prompts: seeded, every row once an epoch, and the same from any index on."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlsys.config.models import PromptsConfig
from rlsys.errors import ConfigError, DataError
from rlsys.models.tiny import build_tokenizer
from rlsys.prompts import RawPrompt
from rlsys.prompts.encoding import Encoder
from rlsys.prompts.stream import PromptStream, eval_prompts

TOKENIZER = build_tokenizer(256)
CONFIG = PromptsConfig.model_validate({"train": {"kind": "sums"}})


class Rows:
    """`size` different prompts."""

    name = "rows"
    task = "test"
    generated = False

    def __init__(self, size: int | None, texts: list[str] | None = None) -> None:
        self.size = size
        self._texts = texts

    def row(self, i: int) -> RawPrompt:
        return RawPrompt(f"prompt {i}" if self._texts is None else self._texts[i], str(i), {"row": i})

    def where(self, i: int) -> str:
        return f"row {i}"


def stream(size: int | None, seed: int = 0, max_tokens: int = 200, **settings) -> PromptStream:
    texts = settings.pop("texts", None)
    return PromptStream(Rows(size, texts), Encoder(CONFIG, TOKENIZER, max_tokens), seed, **settings)


def facts(prompt):
    return (
        prompt.id,
        prompt.index,
        prompt.text,
        prompt.answer,
        prompt.seed,
        prompt.token_ids.tolist(),
        prompt.metadata,
    )


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**63), st.integers(0, 200), st.lists(st.integers(0, 200), max_size=5))
def test_a_draw_depends_on_seed_and_index_alone(size, seed, index, drawn_before):
    resumed, running = stream(size, seed), stream(size, seed)
    for other in drawn_before:
        running.draw(other)
    assert facts(running.draw(index)) == facts(resumed.draw(index))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**63), st.integers(0, 5))
def test_every_row_comes_once_an_epoch(size, seed, epoch):
    drawn = [stream(size, seed).draw(index) for index in range(epoch * size, (epoch + 1) * size)]
    assert sorted(int(p.answer) for p in drawn) == list(range(size))
    assert {p.id for p in drawn} == {f"rows/{row}@{epoch}" for row in range(size)}
    assert [p.index for p in drawn] == list(range(epoch * size, (epoch + 1) * size))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**63))
def test_the_order_differs_by_epoch_and_seed(seed):
    # 40! orders: two being equal by chance is out of the question.
    first, other = stream(40, seed), stream(40, seed + 1)
    orders = {tuple(s.draw(e * 40 + i).answer for i in range(40)) for s in (first, other) for e in range(3)}
    assert len(orders) == 6
    assert tuple(map(str, range(40))) not in orders


def test_orders_are_uniform():
    # Each of 3! orders has probability 1/6: of 1500 epochs, 250 each with standard deviation 14.4.
    three = stream(3, seed=5)
    orders = ["".join(three.draw(e * 3 + i).answer for i in range(3)) for e in range(1500)]
    counts = [orders.count(order) for order in ("012", "021", "102", "120", "201", "210")]
    assert sum(counts) == 1500
    assert all(abs(count - 250) < 5 * 14.4 for count in counts)


def test_the_order_is_what_it_was():
    """In version 0.1: a run can be resumed by a later version, and on other versions of NumPy."""
    assert "".join(stream(8, seed=3).draw(i).answer for i in range(10)) == "5360271426"
    assert stream(8, seed=3).draw(0).seed == 3622358388925242325


@pytest.mark.slow
def test_another_process_draws_the_same():
    program = (
        "from rlsys.config.models import PromptsConfig\n"
        "from rlsys.models.tiny import build_tokenizer\n"
        "from rlsys.prompts.stream import PromptStream\n"
        "config = PromptsConfig.model_validate({'train': {'kind': 'sums'}})\n"
        "s = PromptStream.from_config(config.train, config, build_tokenizer(256), 200, 7)\n"
        "print([(p.id, p.text, p.seed) for p in map(s.draw, (0, 5, 1000))])\n"
    )
    command = [sys.executable, "-c", program]
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    here = PromptStream.from_config(CONFIG.train, CONFIG, TOKENIZER, 200, 7)
    assert said.strip() == str([(p.id, p.text, p.seed) for p in map(here.draw, (0, 5, 1000))])


def test_without_shuffling_rows_come_in_order():
    ids = [stream(3, shuffle=False).draw(i).id for i in range(5)]
    assert ids == ["rows/0@0", "rows/1@0", "rows/2@0", "rows/0@1", "rows/1@1"]


def test_an_endless_source_has_one_endless_epoch():
    endless = stream(None)
    assert endless.size is None
    assert endless.draw(10**9).id == f"rows/{10**9}@0"


def test_sampling_seeds_differ_and_leave_room():
    seeds = [stream(50).draw(i).seed for i in range(200)]
    assert len(set(seeds)) == 200
    assert all(0 <= seed < 2**62 for seed in seeds)
    assert stream(50, seed=1).draw(0).seed != stream(50, seed=2).draw(0).seed


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(0, 100))
def test_rows_that_are_too_long_are_left_out(lengths, seed):
    texts = ["x" * length for length in lengths]
    short = [i for i, length in enumerate(lengths) if length <= 20]
    if not short:
        with pytest.raises(DataError, match=f"rows: every one of its {len(lengths)} prompts is too long"):
            stream(len(texts), seed, 20, texts=texts, skip_too_long=True)
        return
    kept = stream(len(texts), seed, 20, texts=texts, skip_too_long=True)
    assert (kept.size, kept.skipped) == (len(short), len(texts) - len(short))
    assert sorted(int(kept.draw(i).answer) for i in range(len(short))) == short


def test_a_row_that_is_too_long_is_an_error_before_anything_is_drawn():
    message = r"row 1: the prompt has 21 tokens, and model.max_length .* leaves 20; .*too_long: skip"
    with pytest.raises(DataError, match=message):
        stream(2, max_tokens=20, texts=["short", "x" * 21])


def test_a_source_without_rows_is_an_error():
    with pytest.raises(DataError, match="rows: holds no prompts"):
        stream(0)


def test_no_room_for_a_prompt_is_an_error():
    with pytest.raises(ConfigError, match="leaves no room for a prompt"):
        stream(2, max_tokens=0)


def test_eval_prompts_are_the_first_different_ones(tmp_path):
    file = tmp_path / "held_out.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"p{i % 6}", "answer": i}) + "\n" for i in range(12)))
    config = PromptsConfig.model_validate({"train": {"kind": "jsonl", "path": str(file)}})

    def draw(count, seed=0):
        return eval_prompts(config.train, config, TOKENIZER, 100, seed, count)

    some = draw(4)
    assert len({p.text for p in some}) == 4
    assert [facts(p) for p in draw(4)] == [facts(p) for p in some]
    assert [facts(p) for p in draw(6)[:4]] == [facts(p) for p in some]
    assert [p.index for p in some] == [0, 1, 2, 3]
    assert all(p.id.startswith("held_out/") and p.id.endswith("@eval") for p in some)
    assert {p.text for p in draw(100)} == {f"p{i}" for i in range(6)}  # there are no more
    assert [p.text for p in draw(6, seed=1)] != [p.text for p in draw(6, seed=2)]


def test_eval_prompts_of_an_endless_source_end():
    """All there are of the 64 problems of two terms up to 8: each is either held out or not."""
    found = []
    for held_out in (False, True):
        source = {"kind": "sums", "terms": [2, 2], "largest": 8, "held_out": held_out}
        config = PromptsConfig.model_validate({"train": source})
        found += [p.text for p in eval_prompts(config.train, config, TOKENIZER, 100, 0, 512)]
    assert sorted(found) == [f"{a}+{b}=" for a in range(1, 9) for b in range(1, 9)]


def test_token_ids_are_those_of_the_text():
    prompt = stream(5).draw(0)
    assert prompt.token_ids.dtype == np.int32
    assert TOKENIZER.decode(prompt.token_ids) == prompt.text
