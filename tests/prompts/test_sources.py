"""Prompt sources, and every way in which a data set can be wrong."""

from __future__ import annotations

import inspect
import json
from typing import get_args

import pytest
from pydantic import TypeAdapter

from rlsys.config import models
from rlsys.errors import ConfigError, DataError
from rlsys.prompts.sources import open_source

ROWS = [
    {"prompt": "1+2=", "answer": "3", "level": 1},
    {"prompt": [{"role": "user", "content": "2+2="}], "answer": 4, "level": 2},
    {"prompt": "3+2=", "answer": 5.5, "level": None},
]


def source(**settings):
    return open_source(TypeAdapter(models.PromptSource).validate_python(settings))


def write(path, rows) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def no_hub(tmp_path, monkeypatch):
    """The data set library, cut off from the network, with a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return datasets


def test_jsonl(tmp_path):
    rows = source(kind="jsonl", path=write(tmp_path / "some.jsonl", [ROWS[0], "", *ROWS[1:]]), metadata_keys=["level"])
    assert (rows.size, rows.name, rows.task) == (3, "some", "default")
    assert [rows.row(i).answer for i in range(3)] == ["3", "4", "5.5"]
    assert rows.row(0).content == "1+2="
    assert rows.row(1).content == ({"role": "user", "content": "2+2="},)
    assert [rows.row(i).metadata for i in range(3)] == [{"level": 1}, {"level": 2}, {"level": None}]
    assert rows.where(1).endswith("some.jsonl line 3")  # the blank line counts


def test_jsonl_settings(tmp_path):
    path = write(tmp_path / "q.jsonl", [{"question": "a", "n": 1}, {"question": "b", "n": 2}, "not looked at"])
    rows = source(kind="jsonl", path=path, prompt_key="question", answer_key=None, limit=2)
    assert [(rows.row(i).content, rows.row(i).answer) for i in range(rows.size)] == [("a", None), ("b", None)]


BAD_ROWS = [
    (
        {"promt": "x", "answer": "1"},
        r"no key 'prompt' \(did you mean 'promt'\?\); it has 'promt', 'answer' \(set",
    ),
    ({"prompt": "x", "anwser": "1"}, r"no key 'answer' \(did you mean 'anwser'\?\).*\(set answer_key\)"),
    ({"prompt": "", "answer": "1"}, "'prompt' is an empty prompt"),
    ({"prompt": " \n", "answer": "1"}, "'prompt' is an empty prompt"),
    ({"prompt": [], "answer": "1"}, "'prompt' is an empty prompt"),
    ({"prompt": 7, "answer": "1"}, "'prompt' is a number, not text or a list of chat messages"),
    ({"prompt": None, "answer": "1"}, "'prompt' is null, not text or a list of chat messages"),
    ({"prompt": "x", "answer": ["1"]}, "'answer' is a list, not text or a number"),
    ({"prompt": "x", "answer": True}, "'answer' is true or false, not text or a number"),
    ({"prompt": ["hello"], "answer": "1"}, "message 1: is text, not an object"),
    (
        {"prompt": [{"role": "usr", "content": "x"}], "answer": "1"},
        r"message 1: 'role' is 'usr' \(did you mean",
    ),
    ({"prompt": [{"role": "user", "content": 1}], "answer": "1"}, "message 1: 'content' is a number, not text"),
    ({"prompt": [{"role": "user", "content": ""}], "answer": "1"}, "message 1: 'content' is empty"),
]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        *BAD_ROWS,
        ("{'prompt': 1}", "is not JSON: Expecting property name enclosed in double quotes at column 2"),
        ('{"prompt": "x", "answer"', "is not JSON: Expecting ':' delimiter at column 25"),
        ('["x"]', "is a list, not an object with the key 'prompt'"),
    ],
)
def test_a_bad_line_is_named_when_the_file_is_opened(line, message, tmp_path):
    path = write(tmp_path / "bad.jsonl", [ROWS[0], "", line, ROWS[1]])
    with pytest.raises(DataError, match=rf"bad.jsonl line 3: ('prompt', )?{message}"):
        source(kind="jsonl", path=path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl: there is no such file"):
        source(kind="jsonl", path=str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        source(kind="jsonl", path=str(tmp_path))
    with pytest.raises(DataError, match=r"empty.jsonl: the file holds no prompts"):
        source(kind="jsonl", path=write(tmp_path / "empty.jsonl", ["", " "]))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9", "answer": "1"}')
    with pytest.raises(DataError, match=r"latin.jsonl line 1: is not UTF-8 text \(byte 16\)"):
        source(kind="jsonl", path=str(tmp_path / "latin.jsonl"))


def test_huggingface_reads_a_file_and_a_saved_folder(tmp_path, no_hub):
    rows = [{"prompt": f"p{i}", "answer": i, "level": {"of": i}} for i in range(4)]
    path = write(tmp_path / "some.jsonl", rows)
    no_hub.Dataset.from_list(rows).save_to_disk(tmp_path / "one")
    no_hub.DatasetDict({"train": no_hub.Dataset.from_list(rows)}).save_to_disk(tmp_path / "many")
    no_hub.Dataset.from_list(rows).to_parquet(tmp_path / "some.parquet")
    for where in (path, str(tmp_path / "one"), str(tmp_path / "many"), str(tmp_path / "some.parquet")):
        opened = source(kind="huggingface", path=where, metadata_keys=["level"], limit=3)
        assert opened.size == 3
        assert [opened.row(i).content for i in range(3)] == ["p0", "p1", "p2"]
        assert [opened.row(i).answer for i in range(3)] == ["0", "1", "2"]
        assert opened.row(2).metadata == {"level": {"of": 2}}
    assert source(kind="huggingface", path=path, limit=100).size == 4


def test_huggingface_chat_messages(tmp_path, no_hub):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    no_hub.Dataset.from_list([{"prompt": messages, "answer": "1"}]).save_to_disk(tmp_path / "chat")
    assert list(source(kind="huggingface", path=str(tmp_path / "chat")).row(0).content) == messages


def test_bad_huggingface_data_sets(tmp_path, no_hub):
    good = write(tmp_path / "good.jsonl", [{"prompt": "x", "answer": "1"}])
    with pytest.raises(DataError, match=r"good.jsonl split train row 0: no key 'prom' \(did you mean 'prompt'\?\)"):
        source(kind="huggingface", path=good, prompt_key="prom")
    empty = write(tmp_path / "b.jsonl", [{"prompt": "x", "answer": "1"}, {"prompt": "", "answer": ""}])
    empty = write(tmp_path / "b.jsonl", [{"prompt": "x", "answer": "1"}, {"prompt": "", "answer": ""}])
    with pytest.raises(DataError, match=r"split train row 1: 'prompt' is an empty prompt"):
        source(kind="huggingface", path=empty)
    with pytest.raises(DataError, match="no/such: `datasets` cannot load it"):
        source(kind="huggingface", path="no/such")
    with pytest.raises(DataError, match=r"notes.txt: ends in none of \.jsonl"):
        source(kind="huggingface", path=write(tmp_path / "notes.txt", ["hello"]))
    no_hub.DatasetDict({"train": no_hub.Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "many")
    with pytest.raises(DataError, match="no split 'test'; there are train"):
        source(kind="huggingface", path=str(tmp_path / "many"), split="test")
    write(tmp_path / "none.csv", ["prompt,answer"])
    with pytest.raises(DataError, match=r"none.csv: `datasets` cannot load it .* no data"):
        source(kind="huggingface", path=str(tmp_path / "none.csv"))


def test_reasoning_gym():
    import reasoning_gym

    terms = {"min_terms": 2, "max_terms": 2}
    terms = {"min_terms": 2, "max_terms": 2}
    rows = source(kind="reasoning_gym", dataset="chain_sum", size=7, seed=3, parameters=terms)
    own = reasoning_gym.create_dataset("chain_sum", size=7, seed=3, **terms)
    assert (rows.size, rows.name) == (7, "chain_sum-3")
    assert rows.row(6).content == own[6]["question"]
    assert rows.row(6).answer == own[6]["answer"]
    assert rows.row(6).metadata["entry"] == own[6]


@pytest.mark.parametrize(
    ("dataset", "parameters", "message"),
    [
        ("chain_sums", {}, r"no data set 'chain_sums' \(did you mean 'chain_sum'\?\)"),
        ("chain_sum", {"min_term": 2}, r"no parameter 'min_term' \(did you mean 'min_terms'\?\)"),
        ("chain_sum", {"seed": 2}, "parameters.seed: set `seed` of the source itself"),
        ("chain_sum", {"min_terms": 9, "max_terms": 2}, "refuses its parameters"),
    ],
)
def test_bad_reasoning_gym_settings(dataset, parameters, message):
    with pytest.raises(ConfigError, match=message):
        source(kind="reasoning_gym", dataset=dataset, parameters=parameters)


def test_sums():
    rows = source(kind="sums", terms=[3, 3], largest=9)
    assert rows.size is None
    terms = [int(term) for term in rows.row(5).content.removesuffix("=").split("+")]
    assert len(terms) == 3
    assert rows.row(5).answer == str(sum(terms))
    assert rows.row(5) == source(kind="sums", terms=[3, 3], largest=9).row(5)
    assert rows.size is None
    assert rows.row(5).metadata == {"terms": 3}
    assert source(kind="sums", limit=7).size == 7
    assert rows.row(5) != source(kind="sums", terms=[3, 3], largest=9, seed=1).row(5)
    assert len({source(kind="sums", seed=seed, held_out=h).name for seed in (0, 1) for h in (False, True)}) == 4
    with pytest.raises(ConfigError, match="the fewest terms come first"):
        source(kind="sums", terms=[5, 3])
    with pytest.raises(ConfigError, match="make only 14 different sums; there must be 50"):
        source(kind="sums", terms=[1, 3], largest=2)


def test_every_kind_of_source_can_be_opened():
    """The factory knows each kind that the config knows."""
    union = get_args(get_args(models.PromptSource)[0])
    cases = inspect.getsource(open_source)
    assert all(f"case {kind.__name__}()" in cases for kind in union)
