"""From a row of a data set (a dict) to a RawPrompt, with every way in which it can be wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rlsys.errors import DataError
from rlsys.prompts import Message, RawPrompt
from rlsys.registry import nearest

_ROLES = ("system", "user", "assistant", "tool")


def raw_prompt(
    row: object,
    prompt_key: str,
    answer_key: str | None,
    metadata_keys: Sequence[str],
    where: str,
    demonstration_key: str | None = None,
) -> RawPrompt:
    """Raises DataError, naming `where` and the key, for a missing key, a wrong type or an empty prompt."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: is {_kind(row)}, not an object with the key {prompt_key!r}")
    answer = None if answer_key is None else _answer(_get(row, answer_key, "answer_key", where), answer_key, where)
    return RawPrompt(
        content=_content(_get(row, prompt_key, "prompt_key", where), prompt_key, where),
        answer=answer,
        metadata={key: _get(row, key, "metadata_keys", where) for key in metadata_keys},
        demonstration=None if demonstration_key is None else _demonstration(row, demonstration_key, where),
    )


def source_name(path: str) -> str:
    """A short name for prompt ids: the file or folder name without its ending."""
    return PurePath(path).stem or path


def _get(row: Mapping[str, Any], key: str, setting: str, where: str) -> Any:
    if key not in row:
        have = ", ".join(repr(k) for k in row) or "none"
        raise DataError(f"{where}: no key {key!r}{nearest(key, list(row))}; it has {have} (set {setting})")
    return row[key]


def _demonstration(row: Mapping[str, Any], key: str, where: str) -> str:
    value = _get(row, key, "demonstration_key", where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {_kind(value)}, not the text of a demonstration")
    if not value.strip():
        raise DataError(f"{where}: {key!r} is an empty demonstration")
    return value


def _content(value: object, key: str, where: str) -> str | tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise DataError(f"{where}: {key!r} is an empty prompt")
        return value
    if not isinstance(value, list):
        raise DataError(f"{where}: {key!r} is {_kind(value)}, not text or a list of chat messages")
    if not value:
        raise DataError(f"{where}: {key!r} is an empty prompt: a list of no messages")
    return tuple(_message(message, f"{where}: {key!r}, message {i + 1}") for i, message in enumerate(value))


def _message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where}: is {_kind(message)}, not an object with 'role' and 'content'")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise DataError(
            f"{where}: 'role' is {role!r}{nearest(str(role), list(_ROLES))}, not one of {', '.join(_ROLES)}"
        )
    if not isinstance(content, str):
        raise DataError(f"{where}: 'content' is {_kind(content)}, not text")
    if not content.strip():
        raise DataError(f"{where}: 'content' is empty")
    return {"role": role, "content": content}


def _answer(value: object, key: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"{where}: {key!r} is {_kind(value)}, not text or a number (metadata_keys hand over anything to the rewards)"
    )


def _kind(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
