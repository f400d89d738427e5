"""Which variables are taken for keys, and who sees them."""

from __future__ import annotations

import pytest

from rlsys.secrets import blanks, is_secret, of_models, without_secrets

SECRETS = (
    "WANDB_API_KEY",
    "HF_TOKEN",
    "OPENAI_API_KEY",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "DB_PASSWORD",
)
OTHERS = (
    "PATH",
    "HOME",
    "OMP_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "WANDB_MODE",
    "HF_HOME",
    "PYTHONPATH",
    "RAY_AUTH_TOKEN",
    "SSH_AUTH_SOCK",
)


@pytest.mark.parametrize("name", SECRETS)
def test_keys_are_known_by_their_names(name: str) -> None:
    assert is_secret(name)
    assert without_secrets({name: "x", "PATH": "y"}) == {"PATH": "y"}
    assert without_secrets({name: "x"}, [name]) == {name: "x"}


@pytest.mark.parametrize("name", OTHERS)
def test_other_variables_are_left(name: str) -> None:
    assert not is_secret(name)
    assert without_secrets({name: "x"}) == {name: "x"}


def test_what_an_actor_is_not_to_see_is_blank_whether_or_not_it_is_here() -> None:
    assert blanks({"PATH": "y"}) == {"WANDB_API_KEY": "", "HF_TOKEN": "", "HUGGING_FACE_HUB_TOKEN": ""}
    assert blanks({"JUDGE_API_KEY": "x"}, ["JUDGE_API_KEY"]).keys() == blanks({}).keys()
    assert blanks({"DB_PASSWORD": "x"}, of_models()) == {"WANDB_API_KEY": "", "DB_PASSWORD": ""}
