"""Keys and passwords live in the environment and nowhere else, and a process sees those that its role needs.

W&B and the Hugging Face hub take theirs from the driver's environment and, for models that are downloaded, from that of
the roles that load one. Those of a storage are seen by the roles that read or write there. User code in reward workers
sees none, but for those that `rewards.secrets` names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from rlsys.storage import is_url

_HUB = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_KNOWN = ("WANDB_API_KEY", *_HUB)  # also where this process has none: other nodes may
_LIKELY = re.compile(
    r"_API_KEY$|_TOKEN$|_SECRET$|_PASSWORD$|_PASSPHRASE$|_CREDENTIALS$|_PRIVATE_KEY$|_ACCESS_KEY(_ID)?$", re.IGNORECASE
)
_OF_STORAGE = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "FSSPEC_S3_KEY", "FSSPEC_S3_SECRET"),
    *("GOOGLE_APPLICATION_CREDENTIALS", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY"),
    *("AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET"),
)


def of_models(*places: object) -> frozenset[str]:
    """For a role that loads a model: the hub's, and those of a storage where one of the places is a URL."""
    return frozenset(_HUB) | (frozenset(_OF_STORAGE) if any(is_url(place) for place in places) else frozenset())


def is_secret(name: str) -> bool:
    """Whether a variable is taken for a key or password, by its name. Ray's own have to reach its processes."""
    return name in _KNOWN or (_LIKELY.search(name) is not None and not name.startswith("RAY_"))


def without_secrets(environment: Mapping[str, str], granted: Collection[str] = ()) -> dict[str, str]:
    """The environment for a process that is started from here."""
    return {name: value for name, value in environment.items() if name in granted or not is_secret(name)}


def blanks(environment: Mapping[str, str], granted: Collection[str] = ()) -> dict[str, str]:
    """Empty values for what an actor is not to see. Ray can set a variable of an actor's process, and not remove it."""
    names = {*_KNOWN, *filter(is_secret, environment)} - set(granted)
    return dict.fromkeys(sorted(names), "")
