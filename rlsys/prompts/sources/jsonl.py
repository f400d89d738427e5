"""Prompts from a JSONL file: one JSON object a line."""

from __future__ import annotations

import json
from pathlib import Path

from rlsys.config.models import JsonlSource
from rlsys.errors import DataError
from rlsys.prompts import RawPrompt
from rlsys.prompts.rows import raw_prompt, source_name


class JsonlRows:
    """The whole file is read and checked at once, so that a bad line is found before a run starts.

    Blank lines are skipped.
    """

    generated = False

    def __init__(self, config: JsonlSource) -> None:
        self.name = source_name(config.path)
        self.task = config.task
        self._path = Path(config.path)
        self._rows: list[RawPrompt] = []
        self._lines: list[int] = []
        self._read(config)
        self.size = len(self._rows)

    def row(self, i: int) -> RawPrompt:
        return self._rows[i]

    def where(self, i: int) -> str:
        return f"{self._path} line {self._lines[i]}"

    def _read(self, config: JsonlSource) -> None:
        try:
            with self._path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if len(self._rows) == config.limit:
                        break
                    if line.strip():
                        where = f"{self._path} line {number}"
                        row = _parse(line, where)
                        self._rows.append(
                            raw_prompt(
                                *(row, config.prompt_key, config.answer_key, config.metadata_keys, where),
                                config.demonstration_key,
                            )
                        )
                        self._lines.append(number)
        except FileNotFoundError:
            raise DataError(f"{self._path}: there is no such file") from None
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {error.strerror}") from None
        if not self._rows:
            raise DataError(f"{self._path}: the file holds no prompts")


def _parse(line: bytes, where: str) -> object:
    try:
        return json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: is not UTF-8 text (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from None
