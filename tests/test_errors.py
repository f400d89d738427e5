"""Errors out of task groups."""

from __future__ import annotations

from rlsys.errors import first_of


def test_the_first_error_of_nested_groups_is_an_error_of_its_own() -> None:
    wanted = OSError("first")
    inner = BaseExceptionGroup("inner", [wanted, ValueError("second")])
    assert first_of(BaseExceptionGroup("outer", [BaseExceptionGroup("middle", [inner]), KeyError("third")])) is wanted
